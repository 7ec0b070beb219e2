"""``python -m dmpq.compare``: every agent on the same problems, at equal forwarded tokens."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmpq.config import TASK_OPTIONS, add_options, from_arguments
from dmpq.console import CommandParser, exit_code, plain_console, quiet_libraries
from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.referee.contest import Contest
from dmpq.referee.referee import KEPT, Group, Outcome, Plan, entrants, read_outcomes, run_group
from dmpq.run_folder import claim, only_run_in

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES: Final = """examples:
  python -m dmpq.compare --agents ppo evopress gemq --contests bits=2.5 bits=3
  python -m dmpq.compare --contests rtx4090:latency=60% rtx4090:bits=3+latency=60%
  python -m dmpq.compare --read --out runs/compare

A contest is a device and limits: bits in effective bits; memory, latency and energy in
percent of what uniform 8 bits takes. Without a device it is that of --hw.
"""
_AGENTS: Final = ("ppo", "evopress", "nsga2", "greedy-true", "gemq", "fisher", "frequency")
_CONTESTS: Final = ("bits=2.5", "bits=3")
_LEFT_OUT: Final = (
    *TASK_OPTIONS,
    *(
        "model",
        "agent",
        "policy",
        "seed",
        "profile",
        "engine",
        "explain",
        "measure_every",
        "tdp_w",
        "out",
    ),
    *("avg_bits", "memory_gb", "latency_ms", "energy_j"),
)
_OWN_DEFAULTS: Final = {
    "evaluations": 200,
    "search_tokens": 8192,
    "selection_tokens": 32768,
    "weights": "acc=1",
    "threads": 1,
    "cost_geometry": "olmoe-1b-7b",
}
_WRITTEN: Final = ("standings.md", "standings.csv", "outcomes.csv", "curves.png")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(
        lambda: _compared(arguments),
        memory="ask for fewer tokens",
        interrupted="Interrupted; the same command goes on from here.",
    )


def _compared(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    plan = Plan(
        config=from_arguments(arguments),
        models=tuple(arguments.models),
        seeds=tuple(range(arguments.seeds)),
        contests=tuple(map(Contest.parse, arguments.contests)),
        agents=tuple(arguments.agents),
        factor=arguments.factor,
    )
    folder = Path(arguments.out)
    compare(plan, folder, plain_console(), jobs=arguments.jobs, only_read=arguments.read)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m dmpq.compare",
        description="Compare agents on the same problems, at equal forwarded tokens.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lists = {
        "models": (("reference",), "checkpoints"),
        "agents": (
            _AGENTS,
            "agents by name, or module:Class, with options as in mckp,rescore=1; two controls are "
            "added",
        ),
        "contests": (_CONTESTS, "devices and limits, see below"),
    }
    for name, (default, text) in lists.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=list(default),
            metavar=name.upper()[:-1],
            help=f"{text} (default: {' '.join(default)})",
        )
    parser.add_argument(
        "--seeds", type=_count, default=3, help="calibration draws (default: %(default)s)"
    )
    parser.add_argument(
        "--factor",
        type=_count,
        default=1,
        help="run with so many times the evaluations, for the regret of the others",
    )
    parser.add_argument(
        "--jobs", type=_count, default=1, help="processes, one model and draw each"
    )
    parser.add_argument("--read", action="store_true", help="only show what --out holds")
    parser.add_argument("--out", default="runs/compare", help="folder (default: %(default)s)")
    add_options(parser, left_out=_LEFT_OUT)
    parser.set_defaults(**_OWN_DEFAULTS)
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def compare(
    plan: Plan, folder: Path, console: Console, *, jobs: int = 1, only_read: bool = False
) -> None:
    """Run what is missing of a plan, and write and show the standings of all that is there.

    Args:
        plan: The grid.
        folder: Where everything is kept; it belongs to what the plan's rows share.
        console: Where outcomes and tables are shown.
        jobs: Processes.
        only_read: Whether nothing is run.

    Raises:
        InputError: If the plan asks for what cannot be.
    """
    from dmpq.checks import check_numbers

    check_numbers(plan.config)
    entrants(plan.agents)
    claim(folder, plan.digest(), asdict(plan.config), written=_WRITTEN)
    with only_run_in(folder):
        if not only_read:
            _run(plan, folder, console, jobs=jobs)
        found = [one for path in sorted(folder.glob(f"*/{KEPT}")) for one in read_outcomes(path)]
        _show(found, folder, console)


def _run(plan: Plan, folder: Path, console: Console, *, jobs: int) -> None:
    groups = [(model, seed) for seed in plan.seeds for model in plan.models]
    todo = [one for one in groups if Group(plan, *one, folder).missing()]
    if jobs == 1 or len(todo) < 2:
        for model, seed in todo:
            run_group(plan, model, seed, folder, lambda outcome: console.print(said(outcome)))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_group, plan, *one, folder, _print) for one in todo]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _print(outcome: Outcome) -> None:
    """Show an outcome, from a process of its own."""
    plain_console().print(said(outcome))


def said(outcome: Outcome) -> str:
    """Return an outcome as a line."""
    return (
        f"{outcome.model} seed {outcome.seed}, {outcome.contest}: {outcome.agent} "
        f"KL {outcome.kl:.5f}, {outcome.evaluations} maps, {outcome.tokens / 1e6:.2f} M tokens, "
        f"{outcome.seconds:.0f} s"
    )


def _show(outcomes: list[Outcome], folder: Path, console: Console) -> None:
    """Write the standings in every form, and print them."""
    import pandas as pd

    from dmpq.referee import report as compare_report
    from dmpq.referee.standings import frame, standings
    from dmpq.report import save_figure

    if not outcomes:
        raise InputError(f"{folder} holds no outcome yet; run the comparison without --read.")
    rows = standings(outcomes)
    flat = pd.DataFrame([asdict(outcome) for outcome in outcomes]).drop(columns="curve")
    replace_atomically(folder / "outcomes.csv", flat.to_csv(index=False).encode())
    replace_atomically(folder / "standings.csv", frame(rows).to_csv(index=False).encode())
    replace_atomically(folder / "standings.md", compare_report.markdown(rows).encode())
    save_figure(compare_report.curves(outcomes), folder / "curves.png")
    for contest in dict.fromkeys(row.contest for row in rows):
        own = [row for row in rows if row.contest == contest]
        console.print(compare_report.table(contest, own))
        console.print()
    console.print(f"wrote {folder}/ {' '.join(_WRITTEN)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
