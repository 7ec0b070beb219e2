"""Measure the evaluator against the model's own forward, as ratios in one run.

    python benchmarks/evaluator.py

Prints, on the same tokens: the time of evaluating one map over that of the model's own
``grouped_mm`` forward, which computes no loss (target at most 1.05); of profiling a variant over
that forward, as the mean over the layers that hold it (at most 0.65), beside the share of a
forward's weight FLOPs that is resumed; of a map that leaves a held one at the last layer; of a map
in a forward of eight over a map alone; and whether the logits at 16 bits are the model's own to
the bit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq.config import SearchConfig
from dmpq.session import Session


def paired(one: Callable[[int], None], other: Callable[[int], None], runs: int) -> float:
    """Return the median of one's time over other's, run in turn so that drift cancels."""
    ratios = []
    for i in range(runs + 1):
        marks = [time.perf_counter()]
        for run in (one, other):
            run(i)
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return float(np.median(ratios[1:]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    session = Session(SearchConfig(search_tokens=arguments.tokens))
    evaluator = session.evaluator("search")
    moe, experts = session.moe, session.moe.spec.num_experts
    rng = np.random.default_rng(0)
    full = len(session.menu) - 1
    evaluator.full_nll()

    def own_forward(_run: int) -> None:
        with torch.inference_mode():
            for ids in evaluator.id_batches:
                moe.logits(ids)

    def one_map(_run: int) -> None:
        evaluator.evaluate(rng.integers(0, full, (1, experts)))

    def eight_alone(_run: int) -> None:
        evaluator.evaluate(rng.integers(0, full, (8, experts)))

    def eight_together(_run: int) -> None:
        evaluator.screen(rng.integers(0, full, (8, experts)))

    layers = [layer.experts.num_experts for layer in session.bank.layers]
    starts = np.cumsum([0, *layers[:-1]])
    drawn = [
        rng.permutation([(start + e, f) for e in range(count) for f in range(full)])
        for start, count in zip(starts, layers, strict=True)
    ]
    rounds = min(arguments.runs, min(map(len, drawn)) - 1)
    counted = []

    def variant_of_each_layer(run: int) -> None:
        for variants in drawn:
            expert, fmt = variants[run]
            changed = np.full((1, experts), full)
            changed[0, expert] = fmt
            counted.append(evaluator.evaluate(changed).tokens / evaluator.tokens)

    def forward_per_layer(_run: int) -> None:
        for _ in layers:
            own_forward(0)

    def neighbour(_run: int) -> None:
        near = held.copy()
        near[starts[-1] :] = rng.integers(0, full, layers[-1])
        evaluator.evaluate(near[None])

    print(f"{evaluator.tokens:,} tokens, {experts} experts, {arguments.threads} threads")
    one = paired(one_map, own_forward, arguments.runs)
    print(f"one map / own forward                  {one:.3f}")
    variant = paired(variant_of_each_layer, forward_per_layer, rounds)
    print(f"profiling a variant / own forward      {variant:.3f}")
    print(f"  weight FLOPs resumed / of a forward  {np.mean(counted):.3f}")
    held = rng.integers(0, full, experts)
    evaluator.hold(held)
    near = paired(neighbour, own_forward, arguments.runs)
    print(f"the held map but last layer / forward  {near:.3f}")
    evaluator.hold(np.full(experts, full))
    print(f"a map among eight / a map alone        {paired(eight_together, eight_alone, 3):.3f}")
    session.bank.choose(np.full((1, experts, 2), full))
    with torch.inference_mode():
        own = moe.logits(evaluator.id_batches[0])
        with session.bank.attached():
            same = torch.equal(own, moe.logits(evaluator.id_batches[0]))
    print(f"logits at 16 bits identical to the bit {same}")


if __name__ == "__main__":
    main()
