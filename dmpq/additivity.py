"""``python -m dmpq.additivity``: whether losses add up on a model, so that searching is worth it.

The exact knapsack is optimal where the loss of a map is the sum of what its experts lose alone.
This measures how far that holds: on random maps, on maps near the knapsack's own, and for pairs of
experts within a layer and across layers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.config import TASK_OPTIONS, SearchConfig, add_options, from_arguments
from dmpq.console import (
    CommandParser,
    exit_code,
    plain_console,
    progress_bars,
    quiet_libraries,
)
from dmpq.errors import InputError
from dmpq.files import JsonLines, replace_atomically
from dmpq.run_folder import only_run_in, run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.problem import Problem

Floats = NDArray[np.float64]

_LEFT_OUT: Final = (
    *TASK_OPTIONS,
    "agent",
    "policy",
    "evaluations",
    "engine",
    "explain",
    "measure_every",
    "tdp_w",
)
_NEAR: Final = 0.3
"""Standard deviation of log-importances, of maps near the knapsack's: that of PPO's samples."""
_FINE: Final = 0.9
"""Rank correlation of near-optimal maps from which on the knapsack can tell them apart."""


@dataclass(frozen=True)
class Agreement:
    """How sums of sensitivities agree with what maps lose.

    Attributes:
        maps: Their number.
        spearman: Rank correlation.
        r2: Share of the losses' variance that the best line through the sums explains.
        ratio: Loss over sum, the median; 1 where all sums are 0.
    """

    maps: int
    spearman: float
    r2: float
    ratio: float

    @classmethod
    def of(cls, predicted: Floats, lost: Floats) -> Agreement:
        """Return the agreement of n sums with n losses; correlations of equal values are 0."""
        from scipy.stats import spearmanr

        known = predicted > 0
        varied = np.ptp(predicted) > 0 and np.ptp(lost) > 0
        return cls(
            maps=len(lost),
            spearman=float(spearmanr(predicted, lost).statistic) if varied else 0.0,
            r2=float(np.corrcoef(predicted, lost)[0, 1] ** 2) if varied else 0.0,
            ratio=float(np.median(lost[known] / predicted[known])) if known.any() else 1.0,
        )


@dataclass(frozen=True)
class Interaction:
    """What pairs of experts lose together beyond what each loses alone, both narrowest.

    Attributes:
        pairs: Their number.
        mean: Share of the sum of both alone: positive where they lose more together.
        std: Its standard deviation over pairs.
    """

    pairs: int
    mean: float
    std: float


@dataclass(frozen=True)
class Report:
    """Whether losses add up.

    Attributes:
        random: On maps whose importances are random.
        near: On maps near the knapsack's.
        within: Pairs of one layer.
        across: Pairs of two layers.
    """

    random: Agreement
    near: Agreement
    within: Interaction
    across: Interaction

    @property
    def verdict(self) -> str:
        """What it means for a search, in a sentence."""
        near = self.near.spearman
        if near >= _FINE:
            return (
                f"Additive is fine here: sums order near-optimal maps as losses do ({near:.2f})."
            )
        return (
            f"Sums order near-optimal maps with a rank correlation of {near:.2f} only: a search "
            "on true losses may find better ones than the knapsack's."
        )


def measure_additivity(
    problem: Problem,
    *,
    maps: int,
    pairs: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return how far losses add up on a problem's evaluator.

    Args:
        problem: Its decisions, sensitivities and text.
        maps: Number of random maps, and of maps near the knapsack's.
        pairs: Number of pairs within layers, and across.
        seed: Of the draws.
        progress: Called with the number of maps evaluated, and of all.
    """
    rng, count = np.random.default_rng(seed), problem.num_decisions
    done, total = 0, 2 * maps + 6 * pairs  # of a pair: each alone, and both

    def losses(wanted: NDArray[np.integer]) -> Floats:
        nonlocal done
        found = []
        for one in wanted:
            found.append(float(problem.evaluate(one[None]).kl[0]))
            done += 1
            if progress is not None:
                progress(done, total)
        return np.array(found)

    def agreement(wanted: NDArray[np.integer]) -> Agreement:
        return Agreement.of(problem.surrogate(wanted).kl, losses(wanted))

    drawn = np.stack([problem.project(-rng.random(problem.sizes.shape)) for _ in range(maps)])
    near = np.stack([problem.propose(rng.normal(0, _NEAR, count)) for _ in range(maps)])
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(float)).astype(int)
    widest = np.full(count, len(problem.menu) - 1)
    floor = float(problem.evaluate(widest[None]).kl[0])

    def interaction(chosen: NDArray[np.int64]) -> Interaction:
        alone = np.repeat(widest[None], 2 * len(chosen), axis=0)
        alone[np.arange(len(alone)), chosen.ravel()] = problem.menu.narrowest
        both = np.repeat(widest[None], len(chosen), axis=0)
        np.put_along_axis(both, chosen, problem.menu.narrowest, axis=1)
        apart = (losses(alone) - floor).reshape(-1, 2).sum(1)
        shares = (losses(both) - floor - apart) / np.where(apart > 0, apart, np.nan)
        known = shares[np.isfinite(shares)]
        if not len(known):
            return Interaction(0, 0.0, 0.0)
        return Interaction(len(known), float(known.mean()), float(known.std()))

    return Report(
        random=agreement(drawn),
        near=agreement(near),
        within=interaction(_pairs(layers, problem.unhit, pairs, rng, same=True)),
        across=interaction(_pairs(layers, problem.unhit, pairs, rng, same=False)),
    )


def _pairs(
    layers: NDArray[np.int64],
    unhit: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
    *,
    same: bool,
) -> NDArray[np.int64]:
    """Return distinct pairs of decisions that calibration has hit, (n, 2), n <= ``count``."""
    hit = np.setdiff1d(np.arange(len(layers)), unhit)
    first, second = (hit[i] for i in np.triu_indices(len(hit), 1))
    fitting = np.flatnonzero((layers[first] == layers[second]) == same)
    chosen = rng.permutation(fitting)[:count]
    return np.stack([first[chosen], second[chosen]], axis=1)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(
        prog="python -m dmpq.additivity",
        description="Measure whether losses add up on a model, so that searching is worth it.",
    )
    add_options(parser, left_out=_LEFT_OUT)
    parser.set_defaults(search_tokens=8192, weights="acc=1")
    parser.add_argument("--maps", type=int, default=64, help="of each kind (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=32, help="likewise (default: %(default)s)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(lambda: _reported(arguments), memory="ask for fewer tokens")


def _reported(arguments: argparse.Namespace) -> int:
    from dmpq.checks import prepare
    from dmpq.session import Session

    quiet_libraries()
    config: SearchConfig = from_arguments(arguments)
    prepare(config)
    if min(arguments.maps, arguments.pairs) < 2:  # a correlation takes two
        raise InputError("--maps and --pairs need 2 or more each.")
    console = plain_console()
    with progress_bars(console) as show:
        session = Session(config, progress=show)
        session.check()
        folder = run_folder(config)
        with only_run_in(folder):
            session.journal = JsonLines(folder / "journal.jsonl")
            try:
                problem = session.problem(session.profile(), evaluator=session.evaluator("search"))
                report = measure_additivity(
                    problem,
                    maps=arguments.maps,
                    pairs=arguments.pairs,
                    seed=config.seed,
                    progress=lambda done, total: show("evaluating", done, total),
                )
            finally:
                session.journal.close()
    _show(report, console)
    _write(report, folder / "additivity.json")
    console.print(f"  wrote {folder}/additivity.json", soft_wrap=True)
    return 0


def _show(report: Report, console: Console) -> None:
    from rich import box
    from rich.table import Table

    maps = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for head in ("maps", "number", "Spearman", "R²", "loss / sum"):
        maps.add_column(head, justify="left" if head == "maps" else "right")
    for name, one in (("random", report.random), ("near the knapsack's", report.near)):
        maps.add_row(
            name, str(one.maps), f"{one.spearman:.3f}", f"{one.r2:.3f}", f"{one.ratio:.3f}"
        )
    console.print(maps)
    pairs = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for head in ("pairs", "number", "lose together, beyond the sum", "std over pairs"):
        pairs.add_column(head, justify="left" if head == "pairs" else "right")
    for name, two in (("within a layer", report.within), ("across layers", report.across)):
        pairs.add_row(name, str(two.pairs), f"{two.mean:+.1%}", f"{two.std:.1%}")
    console.print(pairs)
    console.print(f"  {report.verdict}")


def _write(report: Report, path: Path) -> None:
    text = json.dumps(asdict(report) | {"verdict": report.verdict}, indent=2) + "\n"
    replace_atomically(path, text.encode())


if __name__ == "__main__":
    sys.exit(main())
