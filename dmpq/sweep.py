"""``python -m dmpq.sweep``: the front that the reward's weights trace, an agent's or a policy's.

The weights are part of what a problem is: an agent searches anew at each, a policy reads them in
its context and answers for all. The exact knapsack's maps at the same weights stand beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from dmpq.guard import make_agent, run_agent
from dmpq.objective import Constraints, Weights
from dmpq.provenance import bitmap_of
from dmpq.report import Row, save_figure
from dmpq.run_folder import claim, only_run_in
from dmpq.sweep_report import (
    COSTS,
    UNIFORM,
    WORDS,
    Point,
    flat,
    hypervolume,
    label_of,
    marked,
    objectives,
    require_pymoo,
    sweep_figure,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.agents import Candidate
    from dmpq.evaluation import Evaluator
    from dmpq.problem import Problem
    from dmpq.session import Session

_EXAMPLES: Final = """examples:
  python -m dmpq.sweep --hw rtx4090 --sweep lat=0,0.03,0.1,0.3,1,3
  python -m dmpq.sweep --policy runs/policy --sweep lat=0.1,1 mem=0,0.1
  python -m dmpq.sweep --agent mckp --weights acc=1,mem=0.1 --sweep lat+eng=0.1,1,10
"""
_DEFAULT: Final = "lat=0,0.03,0.1,0.3,1,3"
_MOST: Final = 100
_UNLIMITED: Final = 16.0
_LIMITS: Final = ("avg_bits", "memory_gb", "latency_ms", "energy_j")
_LEFT_OUT: Final = (*TASK_OPTIONS, "policy", "engine", "explain", "measure_every")
_WRITTEN: Final = frozenset({"journal.jsonl", "profile.safetensors", "sweep.csv", "sweep.png"})

_KNAPSACK: Final = "mckp"
_POLICY: Final = "policy"


@dataclass(frozen=True, eq=False)
class Answer:
    """What an allocator says to one problem.

    Attributes:
        assignment: The map, (D,).
        evaluations: True evaluations that it took.
        tokens: What these cost, in forwarded tokens.
    """

    assignment: NDArray[np.int64]
    evaluations: int = 0
    tokens: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """Weightings of the reward's terms.

    Attributes:
        terms: Names of the weights that vary.
        weightings: Every one of them.
    """

    terms: tuple[str, ...]
    weightings: tuple[Weights, ...]

    @classmethod
    def parse(cls, parts: Sequence[str], *, base: Weights) -> Sweep:
        """Return every combination of what the parts say.

        Args:
            parts: Each as ``"lat=0,0.1,1"``, or ``"lat+eng=0,0.1"`` for terms that share a weight.
            base: Weights of the terms that no part names.

        Raises:
            InputError: If a term is unknown, varied by two parts or by none, a weight is no number
                or given twice, or no cost is weighed at all.
        """
        read = [_part(part) for part in parts]
        terms = [term for names, _ in read for term in names]
        for term in terms:
            if terms.count(term) > 1:
                raise InputError(f"--sweep varies {term} twice; name each term once.")
        values = [numbers for _, numbers in read]
        count = int(np.prod([len(numbers) for numbers in values], dtype=np.int64))
        if count > _MOST:
            raise InputError(f"--sweep asks for {count} weightings; give at most {_MOST}.")
        weightings = []
        for chosen in itertools.product(*values):
            varied = {
                term: value
                for (names, _), value in zip(read, chosen, strict=True)
                for term in names
            }
            weightings.append(replace(base, **varied))
        found = cls(tuple(terms), tuple(weightings))
        if not found.costs:
            raise InputError(
                "--sweep varies no weight but accuracy's, and no other is above 0, so that all "
                f"weightings want one map; vary one of {', '.join(COSTS)}, as in {_DEFAULT}."
            )
        return found

    @property
    def costs(self) -> tuple[str, ...]:
        """What is compared beside the loss: the costs varied, or where none is, those weighed."""
        varied = tuple(name for name in COSTS if name in self.terms)
        weighed = (n for n in COSTS if any(getattr(w, n) > 0 for w in self.weightings))
        return varied or tuple(weighed)


def _part(part: str) -> tuple[list[str], list[float]]:
    """Return the terms that a part of ``--sweep`` varies, and their weights."""
    names, _, numbers = part.partition("=")
    terms = [name.strip() for name in names.split("+")]
    values = []
    for number in numbers.split(","):
        weights = Weights.parse(",".join(f"{term}={number}" for term in terms))
        values.append(float(getattr(weights, terms[0])))
    if len(set(values)) < len(values):
        raise InputError(f"--sweep {part} gives one weight twice; give each once.")
    return terms, values


def trace(
    problem: Problem,
    wanted: Sweep,
    ask: Callable[[Problem], Answer],
    *,
    name: str,
    judge: Evaluator | None = None,
    found: Callable[[Problem, Answer, Row], None] | None = None,
) -> list[Point]:
    """Return the maps that an allocator gives at every weighting, each after the knapsack's.

    The uniform maps come last. Where the allocator is the knapsack itself, there is only one.

    Args:
        problem: What to search; its weights are not read.
        wanted: The weightings.
        ask: The allocator.
        name: What the table calls it.
        judge: Measures what is shown; ``None`` for the problem's own evaluator.
        found: Called with each problem, the allocator's answer, and what it is worth.
    """
    points = []
    for weights in wanted.weightings:
        own = replace(problem, weights=weights)
        if name != _KNAPSACK:
            points.append(_point(own, Answer(own.mckp()), judge, name=_KNAPSACK))
        answer = ask(own)
        points.append(_point(own, answer, judge, name=name))
        if found is not None:
            found(own, answer, points[-1].row)
    for key in problem.menu.keys:
        one = _point(problem, Answer(problem.uniform(key)), judge, name=UNIFORM + key)
        points.append(replace(one, weights=None, reward=None))
    return marked(points, wanted.costs)


def _point(problem: Problem, answer: Answer, judge: Evaluator | None, *, name: str) -> Point:
    scores = problem.evaluate(answer.assignment[None], judge)
    row = Row.of(
        name,
        bits=scores.effective_bits[0],
        kl=scores.kl[0],
        nll=scores.nll[0],
        cost=scores.cost,
        workload=problem.workload,
        evaluations=answer.evaluations,
    )
    return Point(row, problem.weights, float(scores.reward[0]))


def hypervolumes(points: Sequence[Point], costs: Sequence[str]) -> dict[str, float]:
    """Return the hypervolume of every allocator's front, and of the uniform maps', in their box.

    Args:
        points: As :func:`trace` returns them.
        costs: What is compared beside the held-out KL.
    """
    values = objectives(points, costs)
    names = np.array([one.row.name for one in points])
    uniform = np.array([one.weights is None for one in points])
    fronts = {str(name): names == name for name in dict.fromkeys(names[~uniform].tolist())}
    fronts[UNIFORM.strip()] = uniform
    return {name: hypervolume(values[own], values[uniform]) for name, own in fronts.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(
        lambda: _swept(arguments),
        memory="ask for fewer tokens",
        interrupted="Interrupted; the same command goes on from here.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m dmpq.sweep",
        description="Trace the front of loss against costs by varying the reward's weights; "
        "without a limit, unless one is given.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[_DEFAULT],
        metavar="TERM=WEIGHTS",
        help="weights to try, the others as --weights says; several are combined, and terms "
        f"joined by + share a weight (default: {_DEFAULT})",
    )
    parser.add_argument(
        "--policy", help="folder of one policy that is asked at every weighting, and no search"
    )
    add_options(parser, left_out=_LEFT_OUT)
    parser.set_defaults(weights="acc=1")
    return parser


def _swept(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    config: SearchConfig = from_arguments(arguments)
    sweep(config, arguments.sweep, plain_console())
    return 0


def sweep(config: SearchConfig, parts: Sequence[str], console: Console) -> list[Point]:
    """Search at every weighting, write what was found, and show it; returns the maps.

    Args:
        config: What to search; where it names a policy, that is asked instead.
        parts: The weightings; see :meth:`Sweep.parse`.
        console: Where progress and the table are shown.

    Raises:
        InputError: If the configuration asks for what cannot be; nothing is written then.
    """
    from dmpq.checks import prepare
    from dmpq.session import Session

    require_pymoo()
    prepare(config)
    wanted = Sweep.parse(parts, base=Weights.parse(config.weights))
    for weights in wanted.weightings:
        _ = Session(
            replace(config, weights=weights.spelled())
        ).weights  # refuses what says nothing
    unlimited = all(getattr(config, name) is None for name in _LIMITS)
    agent = make_agent(config.agent, policy=config.policy)
    name = agent.name if config.policy is None else _POLICY
    with progress_bars(console) as show:
        avg_bits = _UNLIMITED if unlimited else config.avg_bits
        session = Session(replace(config, avg_bits=avg_bits), progress=show)
        session.check()
        folder = _folder(config, wanted)
        with only_run_in(folder):
            session.journal = JsonLines(folder / "journal.jsonl")
            try:
                profile = session.profile()
                profile.save(folder / "profile.safetensors")
                problem = session.problem(
                    profile,
                    evaluator=session.evaluator("search"),
                    selector=session.evaluator("selection"),
                    further=session.further(),
                )
                if unlimited:
                    problem = replace(problem, constraints=Constraints())
                points = _traced(session, problem, wanted, folder, name=name)
            finally:
                session.journal.close()
            replace_atomically(folder / "sweep.csv", flat(points).to_csv(index=False).encode())
            save_figure(sweep_figure(points), folder / "sweep.png")
    _show(points, wanted, config, name, console)
    console.print(f"  wrote {folder}/ sweep.csv sweep.png maps/", soft_wrap=True)
    return points


def _folder(config: SearchConfig, wanted: Sweep) -> Path:
    """Return the sweep's folder, made if need be; it belongs to one configuration and sweep."""
    asked = {
        "sweep": list(wanted.terms),
        "weightings": [weights.spelled() for weights in wanted.weightings],
    }
    digest = hashlib.sha256(f"{config.digest()} {asked}".encode()).hexdigest()[:12]
    name = f"sweep-{Path(config.model).name}-{Path(config.hw).stem}-{digest}"
    if config.out is not None and not config.out.strip():
        raise InputError("--out is empty; give a folder, or leave it out.")
    folder = Path("runs") / name if config.out is None else Path(config.out)
    claim(folder, digest, asdict(config) | asked, written=_WRITTEN | {"maps"})
    return folder


def _traced(
    session: Session, problem: Problem, wanted: Sweep, folder: Path, *, name: str
) -> list[Point]:
    """Ask the agent, or the policy, at every weighting; write each map as soon as it is known.

    All read the same texts, so that a map which an earlier one has met costs no tokens again.
    """
    from dmpq.agents.policy import Policy

    config = session.config
    (folder / "maps").mkdir(exist_ok=True)

    def searched(own: Problem) -> Answer:
        stage = f"searching, {own.weights.spelled()}"

        def told(one: Candidate) -> None:
            session.progress(stage, int(one.spent or one.evaluation), config.evaluations)

        result = run_agent(
            make_agent(config.agent),
            config.agent,
            own,
            evaluations=config.evaluations,
            seed=config.seed,
            on_candidate=told,
            trace=folder / "agent_error.txt",
        )
        return Answer(result.assignment, result.evaluations, result.tokens)

    policy = None if config.policy is None else Policy.load(config.policy)

    def write(own: Problem, answer: Answer, row: Row) -> None:
        bitmap = bitmap_of(
            session,
            own,
            answer.assignment,
            evaluations=answer.evaluations,
            tokens=own.profile.cost_tokens + answer.tokens,
            heldout=row,
        )
        label = label_of(own.weights, wanted.terms).replace("\n", "_").replace("=", "-")
        bitmap.write(folder / "maps" / f"{label}.json")

    return trace(
        problem,
        wanted,
        searched if policy is None else lambda own: Answer(policy.propose(own)),
        name=name,
        judge=session.evaluator("heldout"),
        found=write,
    )


def _show(
    points: Sequence[Point], wanted: Sweep, config: SearchConfig, name: str, console: Console
) -> None:
    compared = " and ".join(["KL", *(WORDS[cost] for cost in wanted.costs)])
    caption = (
        f"KL (nats/token), perplexity and reward on {config.heldout_tokens:,} held-out tokens\n"
        f"* no map shown is better in {compared} together"
    )
    console.print(table(points, terms=wanted.terms, best=name, caption=caption))
    volumes = hypervolumes(points, wanted.costs)
    said = ", ".join(f"{one} {volume:.5f}" for one, volume in volumes.items())
    console.print(
        f"  hypervolume of {compared}, share of the uniform maps' box: {said}", soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
