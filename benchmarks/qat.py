r"""Quantization-aware training against quantizing alone, on the bundled model.

    python benchmarks/qat.py                         # the tables of docs/training.md, as kept
    python benchmarks/qat.py --run --work runs/qat   # about 15 minutes per map on two cores
    python benchmarks/qat.py --others --work runs/qat    # routers alone, random maps, co-design

Uniform 4, 3 and 2 bits, and the knapsack's maps at 2.5 effective bits; each is trained on the same
tokens, from the same weights. Beside them stands a control: the same weights trained in full
precision on these tokens, and quantized by the same maps afterwards. What training recovers is
counted from what quantizing costs against that control, whichever is better of it and the weights
at the start:

    recovered = (map before - map after) / (map before - min(full precision, control)), in nats

Judged on held-out text that neither the search nor the training has seen. ``--work`` keeps the
trainings, which go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.console import plain_console, progress_bars, quiet_libraries
from dmpq.files import JsonLines, replace_atomically
from dmpq.provenance import bitmap_of
from dmpq.session import Session
from dmpq.training.codesign import codesign
from dmpq.training.config import CodesignConfig, QatConfig
from dmpq.training.qat import qat
from dmpq.training.trainer import last_checkpoint

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "qat.json"
PICTURE = RESULTS / "qat.png"
HELDOUT = 65536
MAPS = ("4", "3", "2.5", "2")
"""Uniform widths, and one budget in effective bits that the knapsack spends."""
_MIXED = "2.5"
CODESIGNED = (2.5, 3.0)
"""Budgets of co-design, in effective bits."""


@dataclass(frozen=True)
class Recipe:
    """How every map is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At its highest.
        ranges: As for ``dmpq.train qat``.
        refresh: As for ``dmpq.train qat``.
    """

    steps: int
    learning_rate: float
    ranges: str
    refresh: int = 4

    def config(self, **more: Any) -> QatConfig:
        """Return the training's configuration."""
        return QatConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            ranges=self.ranges,
            refresh=self.refresh,
            save_every=100,
            heldout_tokens=HELDOUT,
            **more,
        )


def main() -> int:
    """Train what is asked for, keep it, and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="train, and keep what comes out")
    parser.add_argument("--others", action="store_true", help="run the other kinds of training")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--work", type=Path, default=Path("runs/qat"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ranges", nargs="+", default=["recomputed", "learned"])
    parser.add_argument("--loss", choices=("labels", "distillation"), default="distillation")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        for bits in arguments.maps:
            for ranges in arguments.ranges:
                known = json.loads(OUT.read_text()) if OUT.exists() else {}
                run(arguments, bits, ranges, control="control" not in known)
    if arguments.others:
        others(arguments)
    show(json.loads(OUT.read_text()))
    return 0


def run(arguments: argparse.Namespace, bits: str, ranges: str, *, control: bool) -> None:
    """Train one map, and keep what was measured."""
    recipe = Recipe(arguments.steps, arguments.learning_rate, ranges)
    bitmap = made(bits, arguments.work)
    weights = {"labels": 0.0, "distillation": 0.0} | {arguments.loss: 1.0}
    config = recipe.config(**weights, control=control)
    began = time.monotonic()
    console = plain_console()
    folder = arguments.work / f"{bits}-{ranges}-{config.digest()}"
    last = last_checkpoint(folder / "training")
    judged_again = last is not None and last.name == f"checkpoint-{arguments.steps}"
    with progress_bars(console) as show_progress:
        trained = qat(config, bitmap, folder, show_progress)
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = {name: row.to_json() for name, row in trained.rows.items()}
    found = known.setdefault("maps", {}).setdefault(bits, {"effective_bits": effective(bitmap)})
    seconds = round(time.monotonic() - began)
    if judged_again and ranges in found:
        seconds = found[ranges]["seconds"]
    found[ranges] = {
        **rows,
        "seconds": seconds,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "tokens": arguments.steps * config.batch_size * 128,
        "loss": arguments.loss,
    }
    if control:
        known["control"] = {name: row for name, row in rows.items() if "control" in name}
        known["full precision"] = rows["full precision"]
    replace_atomically(OUT, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


def others(arguments: argparse.Namespace) -> None:
    """Train routers alone, under random maps, and in turn with searches; keep what came out."""
    recipe = Recipe(arguments.steps, arguments.learning_rate, "recomputed")
    taught = {"labels": 0.0, "distillation": 1.0}
    console = plain_console()
    with progress_bars(console) as show_progress:
        config = recipe.config(distillation=0.0, routers=1.0, train="routers")
        folder = arguments.work / f"routers-{config.digest()}"
        routers = qat(config, made("2", arguments.work), folder, show_progress)
        keep(
            "routers alone, uniform 2", {name: row.to_json() for name, row in routers.rows.items()}
        )
        config = recipe.config(**taught, maps="random", bits="2,3,4,8")
        folder = arguments.work / f"random-{config.digest()}"
        robust = qat(config, None, folder, show_progress)
        keep("random maps", {name: row.to_json() for name, row in robust.rows.items()})
        for budget in CODESIGNED:
            turns = CodesignConfig(
                **taught,
                avg_bits=budget,
                steps=arguments.steps // 2,
                learning_rate=arguments.learning_rate,
                save_every=100,
                heldout_tokens=HELDOUT,
                search_tokens=8192,
                rounds=3,
            )
            folder = arguments.work / f"codesign-{turns.digest()}"
            designed = codesign(turns, folder, show_progress)
            facts = {
                "stable": designed.stable,
                "changed": designed.changed,
                "rounds": [one.to_json() for one in designed.rounds],
                "steps": turns.steps,
            }
            keep(f"co-design, {budget:g} bits", facts)


def keep(name: str, facts: dict[str, Any]) -> None:
    """Write what one of the other trainings has come to."""
    known = json.loads(OUT.read_text())
    known.setdefault("others", {})[name] = facts
    replace_atomically(OUT, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


def show_others(known: dict[str, Any]) -> None:
    """Print the tables of the other trainings."""
    for name, facts in known.get("others", {}).items():
        print(f"\n**{name}**\n")
        print("| | perplexity | next token | KL |\n| --- | ---: | ---: | ---: |")
        rounds = facts.get("rounds")
        rows = facts
        if rounds is not None:
            rows = {
                f"round {one['round']} ({one['changed']:.0%} of the map new), {when}": row
                for one in rounds
                for when, row in one["rows"].items()
            }
        for label in sorted(rows, key=lambda label: label.replace("before", "")):
            row = rows[label]
            cells = f"{row['perplexity']:.4f} | {row['accuracy']:.2%} | {row['kl']:.4f}"
            print(f"| {label} | {cells} |")
        if rounds is not None:
            stays = "the map stays" if facts["stable"] else "the map still changes"
            print(f"\nThe last search gave {facts['changed']:.0%} another format: {stays}.")


def effective(bitmap: BitMap) -> float:
    """Return a map's effective bits."""
    return float(bitmap.metrics["predicted"]["effective_bits"]["value"])


def made(bits: str, work: Path) -> BitMap:
    """Return the map of a width, or the knapsack's within a budget."""
    file = work / f"map-{bits}.json"
    if file.exists():
        return BitMap.read(file)
    work.mkdir(parents=True, exist_ok=True)
    mixed = bits == _MIXED
    config = SearchConfig(
        bits="2,3,4,8,16" if mixed else bits,
        avg_bits=float(bits) if mixed else None,
        weights="acc=1",
        agent="mckp" if mixed else "uniform",
        search_tokens=8192,
        selection_tokens=8192,
        further_tokens=0,
        heldout_tokens=HELDOUT,
    )
    if not mixed:
        config = SearchConfig(**{**vars(config), "avg_bits": 16.0})
    session = Session(config, JsonLines(work / f"journal-{bits}.jsonl"))
    profile = session.profile()
    problem = session.problem(profile, evaluator=session.evaluator("search"))
    chosen = problem.mckp() if mixed else np.zeros(problem.mckp().shape, np.int64)
    bitmap = bitmap_of(session, problem, chosen, evaluations=1, tokens=profile.cost_tokens)
    bitmap.write(file)
    return bitmap


def recovered(rows: dict[str, Any], known: dict[str, Any]) -> float:
    """Return the share of what quantizing costs that training gives back."""
    control = known["control"]["full precision, control"]["nll"]
    best = min(control, known["full precision"]["nll"])
    before, after = rows["the map, before"]["nll"], rows["the map, after"]["nll"]
    return float((before - after) / (before - best))


def show(known: dict[str, Any]) -> None:
    """Print the tables of what was kept, and draw them."""
    full = known["full precision"]
    control = known["control"]["full precision, control"]
    print("| weights | effective bits | perplexity | next token | KL | recovered |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(_line("full precision", 16.0, full, ""))
    print(_line("full precision, trained on the same tokens", 16.0, control, ""))
    for bits in (one for one in MAPS if one in known["maps"]):
        found = known["maps"][bits]
        name = f"uniform {bits}" if bits != _MIXED else "knapsack's map"
        kinds = [one for one in ("recomputed", "learned") if one in found]
        first = found[kinds[0]]
        print(_line(f"{name}, quantized", found["effective_bits"], first["the map, before"], ""))
        for kind in kinds:
            share = f"{recovered(found[kind], known):.0%}"
            row = found[kind]["the map, after"]
            print(_line(f"{name}, trained ({kind} ranges)", found["effective_bits"], row, share))
    one = next(iter(known["maps"].values()))
    one = one.get("recomputed", one.get("learned"))
    print(
        f"\n{one['steps']} steps, {one['tokens']:,} tokens, {one['loss']}; "
        f"{HELDOUT:,} held-out tokens"
    )
    for bits, found in known["maps"].items():
        for kind in ("recomputed", "learned"):
            if kind in found:
                print(f"{bits} bits, {kind}: {found[kind]['seconds']} s", end="; ")
    print()
    show_others(known)
    draw(known)


def _line(name: str, bits: float, row: dict[str, Any], share: str) -> str:
    return (
        f"| {name} | {bits:.2f} | {row['perplexity']:.4f} | {row['accuracy']:.2%} | "
        f"{row['kl']:.4f} | {share} |"
    )


def draw(known: dict[str, Any]) -> None:
    """Draw perplexity against effective bits, before training and after."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    maps = sorted(known["maps"].values(), key=lambda one: one["effective_bits"])
    bits = [one["effective_bits"] for one in maps]
    first = [one.get("recomputed", one.get("learned")) for one in maps]
    before = [one["the map, before"]["perplexity"] for one in first]
    axes.plot(bits, before, "o-", label="quantized (PTQ)")
    for kind, mark in (("recomputed", "s-"), ("learned", "^-")):
        pairs = [
            (b, one[kind]["the map, after"]["perplexity"])
            for b, one in zip(bits, maps, strict=True)
            if kind in one
        ]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), mark, label=f"trained (QAT), {kind} ranges")
    axes.axhline(known["full precision"]["perplexity"], color="k", lw=0.8)
    axes.annotate(
        "full precision",
        (bits[0], known["full precision"]["perplexity"]),
        va="top",
    )
    axes.set_xlabel("effective bits per expert weight")
    axes.set_ylabel("held-out perplexity per byte token")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
