"""``python -m dmpq.pretrain``: searches on some models teach a policy for others."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dmpq.config import TASK_OPTIONS, SearchConfig, add_options, from_arguments
from dmpq.console import (
    CommandParser,
    exit_code,
    plain_console,
    progress_bars,
    quiet_libraries,
)
from dmpq.errors import InputError
from dmpq.files import JsonLines
from dmpq.objective import Constraints, Weights
from dmpq.run_folder import claim, only_run_in

if TYPE_CHECKING:
    from dmpq.agents.base import Candidate
    from dmpq.agents.lessons import Lesson
    from dmpq.agents.policy import Policy
    from dmpq.session import Progress

_EXAMPLES: Final = """examples:
  python -m dmpq.pretrain --models path/to/one path/to/another --out policies/small
  python -m dmpq.pretrain --models reference --above 16 --weightings acc=1,lat=0.1 acc=1,lat=1
  python -m dmpq.search --policy policies/small --signal gradient --model path/to/a/third
"""
_ABOVE: Final = (0.25, 0.75, 1.25)
_UNLIMITED: Final = 16.0
_LEFT_OUT: Final = (
    *TASK_OPTIONS,
    *(
        "model",
        "revision",
        "agent",
        "policy",
        "profile",
        "engine",
        "explain",
        "measure_every",
        "tdp_w",
    ),
    *("avg_bits", "memory_gb", "latency_ms", "energy_j", "out"),
)
_OWN_DEFAULTS: Final = {
    "signal": "gradient",
    "evaluations": 200,
    "search_tokens": 8192,
    "weights": "acc=1",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(
        lambda: _trained(arguments),
        memory="ask for fewer tokens",
        interrupted="Interrupted; the same command goes on from here.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m dmpq.pretrain",
        description="Search on some models, and teach a policy for others what was found.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="checkpoints")
    parser.add_argument(
        "--above",
        nargs="+",
        type=float,
        default=list(_ABOVE),
        metavar="BITS",
        help="budgets, effective bits above the narrowest uniform map (default: %(default)s)",
    )
    parser.add_argument(
        "--weightings",
        nargs="+",
        metavar="WEIGHTS",
        help="search every model and budget at each of these weights, as in acc=1 acc=1,lat=0.1 "
        "(default: once, at --weights)",
    )
    parser.add_argument("--out", default="runs/policy", help="folder (default: %(default)s)")
    add_options(parser, left_out=_LEFT_OUT)
    parser.set_defaults(**_OWN_DEFAULTS)
    return parser


def _trained(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    config, out = from_arguments(arguments), Path(arguments.out)
    console = plain_console()
    with progress_bars(console) as show:
        policy = pretrain(
            config,
            arguments.models,
            arguments.above,
            out,
            weightings=arguments.weightings,
            progress=show,
        )
    console.print(f"  learned from {policy.training['lessons']} searches; wrote {out}/policy.json")
    return 0


def pretrain(
    config: SearchConfig,
    models: Sequence[str],
    above: Sequence[float],
    folder: Path,
    *,
    weightings: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Policy:
    """Return a policy that has learned from a search per model, budget and weighting; save it.

    Args:
        config: What all searches share; its model, agent and limits are not read.
        models: Checkpoints whose menus have the same widths.
        above: Budgets, effective bits above the narrowest uniform map.
        folder: Where the policy is saved, and what was measured is kept: the same call goes on.
        weightings: Of the reward's terms, as ``"acc=1,lat=0.1"``, which the policy reads in its
            context; ``None`` for the configuration's own alone.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If a model cannot be searched, or the folder belongs to something else.
    """
    from dmpq.agents.lessons import learn
    from dmpq.checks import prepare

    if not above or not all(0 < bits <= _UNLIMITED for bits in above):
        raise InputError(f"--above {above} are no budgets; give bits from 0 to {_UNLIMITED:g}.")
    names = [Path(model).name for model in models]
    if len(set(names)) != len(names):
        raise InputError("Two models have one folder name, and would share a journal.")
    prepare(config)
    taught = _weights_of(config, [config.weights] if weightings is None else weightings)
    shared = replace(config, model=", ".join(models), out=None)
    asked: dict[str, list[float] | list[str]] = {"above": list(above)}
    # A policy of one weighting belongs to the folder that it belonged to before there were more.
    identity = f"{shared.digest()} {list(above)}"
    if weightings is not None:
        asked["weightings"] = [weights.spelled() for weights in taught]
        identity += f" {asked['weightings']}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    claim(folder, digest, asdict(shared) | asked, written={"policy.json"})
    lessons: list[Lesson] = []
    with only_run_in(folder):
        for name, model in zip(names, models, strict=True):
            journal = JsonLines(folder / f"journal-{name}.jsonl")
            try:
                own = replace(config, model=model, avg_bits=_UNLIMITED)
                lessons += _studied(own, above, taught, journal, progress)
            finally:
                journal.close()
        policy = learn(lessons, seed=config.seed)
        policy.save(folder)
    return policy


def _weights_of(config: SearchConfig, weightings: Sequence[str]) -> list[Weights]:
    """Return weightings as a session reads them.

    Raises:
        InputError: If one makes no sense, or is given twice.
    """
    from dmpq.session import Session

    found = [Session(replace(config, weights=text)).weights for text in weightings]
    if not found or len(set(found)) < len(found):
        raise InputError(f"--weightings {' '.join(weightings)} gives one twice; give each once.")
    return found


def _studied(
    config: SearchConfig,
    above: Sequence[float],
    taught: Sequence[Weights],
    journal: JsonLines,
    progress: Progress | None,
) -> list[Lesson]:
    """Search one model at every budget and weighting."""
    from dmpq.agents.lessons import Lesson
    from dmpq.agents.ppo import PPOAgent
    from dmpq.session import Session

    name = Path(config.model).name

    def shown(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: {stage}", done, total)

    session = Session(config, journal, shown)
    session.check()
    profile, found = session.profile(), list[Lesson]()
    for bits, weights in product(above, taught):
        free = session.problem(
            profile, evaluator=session.evaluator("search"), further=session.further()
        )
        narrowest = np.full((1, free.num_decisions), free.menu.narrowest)
        limit = float(free.effective_bits(narrowest)[0]) + bits
        problem = replace(free, constraints=Constraints(avg_bits=limit), weights=weights)
        several = f", {weights.spelled()}" if len(taught) > 1 else ""
        stage = f"searching, {limit:.2f} bits{several}"

        def told(one: Candidate, stage: str = stage) -> None:
            shown(stage, int(one.spent), config.evaluations)

        result = PPOAgent().search(
            problem, evaluations=config.evaluations, seed=config.seed, on_candidate=told
        )
        found.append(Lesson.of(problem, result))
    return found


if __name__ == "__main__":
    sys.exit(main())
