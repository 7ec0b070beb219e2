"""The proposal's memory target: 40% below uniform 8 bits, at less than 1% loss, on held-out text.

    python benchmarks/memory_target.py                       # about 10 minutes on one core
    python benchmarks/memory_target.py --quantizer gptq,affinity

Sizes are of whole checkpoints as :mod:`dmpq.apply` stores them, headers included. The map is
searched within the bits that the target leaves to experts; beside it stand uniform 8 and 4 bits,
and the largest uniform format within the target. Everything is quantized in one way. Nothing is
chosen on the held-out text that the table is measured on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.bitmap import BitMap, assignment_from
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.quantized import QuantizedCheckpoint
from dmpq.config import SearchConfig
from dmpq.console import quiet_libraries
from dmpq.formats import Menu
from dmpq.guard import make_agent
from dmpq.model_evaluator import ModelEvaluator
from dmpq.provenance import bitmap_of
from dmpq.session import Session
from dmpq.spec import ModelSpec

RESULTS = Path(__file__).parent / "results" / "memory_target.json"
TARGET = 0.6
"""Of the bytes of uniform 8 bits."""


@dataclass(frozen=True)
class Row:
    """One allocation.

    Attributes:
        name: What it is called.
        bits: Effective bits per expert weight.
        checkpoint_bytes: Of all files with weights.
        kl: To full precision, nats per token.
        perplexity: Per token.
        accuracy: Share of next tokens predicted.
    """

    name: str
    bits: float
    checkpoint_bytes: int
    kl: float
    perplexity: float
    accuracy: float


def main() -> int:
    """Search, measure, print the table and the verdicts, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--quantizer", default="hqq")
    parser.add_argument("--group-sizes", default="32,128")
    parser.add_argument("--agent", default="mckp")
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    config = SearchConfig(
        model=arguments.model,
        quantizer=arguments.quantizer,
        group_sizes=arguments.group_sizes,
        weights="acc=1",
        cost_geometry="own",
        threads=arguments.threads,
    )
    session = Session(config)
    source = Checkpoint(arguments.model)
    profile = session.profile()
    template = bitmap_of(
        session, session.problem(profile), session.problem(profile).mckp(), evaluations=0, tokens=0
    )
    spec = session.moe.spec
    menu = session.menu
    size = {
        key: checkpoint_bytes(template, source, menu, np.full(spec.num_experts, place))
        for place, key in enumerate(menu.keys)
    }
    eight = next(key for key in menu.keys if key.partition("g")[0] == "8")
    allowed = int(TARGET * size[eight])
    others = size[eight] - stored_bytes(spec, menu, menu.keys.index(eight))
    evaluator, selector = session.evaluator("search"), session.evaluator("selection")
    spare = 0
    while True:
        avg_bits = 8 * (allowed - others - spare) / spec.expert_parameters
        own = Session(replace(config, avg_bits=avg_bits))
        problem = own.problem(profile, evaluator=evaluator, selector=selector)
        # A mixed map has more tensors than a uniform one, and each has its line in the header.
        over = checkpoint_bytes(template, source, menu, problem.mckp()) - allowed
        if over <= 0:
            break
        spare += over
    found = make_agent(arguments.agent).search(problem, evaluations=arguments.evaluations, seed=0)
    heldout = session.evaluator("heldout")
    rows = [Row("bf16", 16.0, full_bytes(source), 0.0, *full(heldout, spec.num_experts, menu))]

    def measured(name: str, assignment: NDArray[np.int64]) -> Row:
        values = heldout.evaluate(assignment[None])
        return Row(
            name,
            float(problem.effective_bits(assignment[None])[0]),
            checkpoint_bytes(template, source, menu, assignment),
            float(values.kl[0]),
            float(values.perplexity[0]),
            float(heldout.accuracy(assignment[None])[0]),
        )

    within = max((key for key in menu.keys if size[key] <= allowed), key=lambda key: size[key])
    for key in dict.fromkeys([eight, *uniform_fours(menu), within]):
        place = menu.keys.index(key)
        rows.append(measured(f"uniform {key}", np.full(spec.num_experts, place)))
    rows.append(measured(arguments.agent, found.assignment))
    report(rows, allowed, f"uniform {within}", arguments)
    return 0


def uniform_fours(menu: Menu) -> Iterator[str]:
    """Yield the menu's keys of 4 bits."""
    return (key for key in menu.keys if key.partition("g")[0] == "4")


def checkpoint_bytes(
    template: BitMap, source: Checkpoint, menu: Menu, assignment: NDArray[np.int64]
) -> int:
    """Return the bytes that the checkpoint of a map takes, as it would be written."""
    keys = assignment_from(template.geometry, menu, assignment)
    bitmap = replace(template, menu=menu, assignment=keys)

    def none(_layer: int, _expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("sizes need no weights")

    return QuantizedCheckpoint(bitmap, source, factors=none).num_bytes


def stored_bytes(spec: ModelSpec, menu: Menu, place: int) -> int:
    """Return the bytes of all experts in one format."""
    return int(spec.stored_bits(menu)[:, :, place].sum()) // 8


def full_bytes(source: Checkpoint) -> int:
    """Return the bytes of the source's files."""
    return sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))


def full(heldout: ModelEvaluator, experts: int, menu: Menu) -> tuple[float, float]:
    """Return perplexity and accuracy at full precision."""
    whole = np.full((1, experts), menu.keys.index("16"))
    return float(np.exp(heldout.full_nll())), float(heldout.accuracy(whole)[0])


def report(rows: list[Row], allowed: int, nearest: str, arguments: argparse.Namespace) -> None:
    """Print the rows and what becomes of the target, and keep the rows."""
    base, eight, own = rows[0], rows[1], rows[-1]
    print(f"{arguments.model}, {arguments.quantizer}; the target: {allowed / 1e6:.3f} MB\n")
    print("| allocation | bits | checkpoint, MB | of uniform 8 | KL | perplexity | next byte |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row.name} | {row.bits:.2f} | {row.checkpoint_bytes / 1e6:.3f} "
            f"| {row.checkpoint_bytes / eight.checkpoint_bytes:.1%} | {row.kl:.5f} "
            f"| {row.perplexity:.4f} ({row.perplexity / base.perplexity - 1:+.2%}) "
            f"| {row.accuracy:.2%} ({row.accuracy / base.accuracy - 1:+.2%}) |"
        )
    fours = [row for row in rows if row.name.startswith("uniform 4")]
    verdicts = {
        "40% below uniform 8": own.checkpoint_bytes <= allowed,
        "perplexity less than 1% above full precision": own.perplexity < 1.01 * base.perplexity,
        "accuracy less than 1% below full precision": own.accuracy > 0.99 * base.accuracy,
        "KL below uniform 4 bits of no larger a checkpoint": all(
            own.kl < row.kl for row in fours if row.checkpoint_bytes <= allowed
        ),
        f"KL below {nearest}, the largest uniform format within the target": own.kl
        < next(row for row in rows if row.name == nearest).kl,
    }
    print()
    for text, holds in verdicts.items():
        print(f"- {'yes' if holds else 'NO'}: {text}")
    kept = {"arguments": {k: str(v) for k, v in vars(arguments).items() if k != "out"}}
    kept["rows"] = [vars(row) for row in rows]
    arguments.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
