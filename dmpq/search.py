"""``python -m dmpq.search``: find a bit map for a model on a device, and say what it is worth."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dmpq.config import SearchConfig, add_options, from_arguments
from dmpq.console import (
    INTERRUPTED,
    CommandParser,
    plain_console,
    progress_bars,
    quiet_libraries,
    refuse,
)
from dmpq.embedded import differs_from_card
from dmpq.engines.rules import engine_named
from dmpq.errors import InputError, first_line, is_out_of_memory
from dmpq.evaluation import FAILURE_NATS
from dmpq.files import JsonLines, replace_atomically
from dmpq.formats import Menu
from dmpq.front import front
from dmpq.guard import BASELINES, UNIFORM, label_of, make_agent, run_agent
from dmpq.hw_models import explainable
from dmpq.provenance import bitmap_of, versions
from dmpq.run_folder import only_run_in, run_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from dmpq.agents import Agent, Candidate, SearchResult
    from dmpq.hardware.loop import HardwareLoop, LoopReport
    from dmpq.hw_models import Explanation
    from dmpq.model_evaluator import ModelEvaluator
    from dmpq.problem import Problem
    from dmpq.profile import Profile
    from dmpq.report import Row
    from dmpq.session import Session
    from dmpq.tasks.evaluator import TaskEvaluator

_EXAMPLES: Final = """examples:
  python -m dmpq.search --hw a100
  python -m dmpq.search --hw rtx4090 --avg-bits 2.5 --weights acc=1
  python -m dmpq.search --model path/to/checkpoint --dataset notes.txt --memory-gb 12
  python -m dmpq.search --model path/to/classifier --task classification --dataset path/to/sst2
"""


@dataclass
class _Run:
    """One search: its folder, what it shows, and the best map so far."""

    session: Session
    agent: Agent
    folder: Path
    console: Console
    started: float = field(default_factory=time.monotonic)
    best: Candidate | None = None
    seen: int = 0
    loop: HardwareLoop | None = None
    measured: LoopReport | None = None

    @property
    def config(self) -> SearchConfig:
        return self.session.config

    def path(self, name: str) -> Path:
        return self.folder / name


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(
        prog="python -m dmpq.search",
        description="Find a bit map for a model on a device, and say what it is worth.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print summary.json, not a table")
    parser.add_argument(
        "--front", action="store_true", help="maps of --policy for many budgets, and no search"
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    console = plain_console(stderr=arguments.json)
    try:
        quiet_libraries()
        config, summary = from_arguments(arguments), ""
        if arguments.front:
            front(config, console)
        else:
            summary = search(config, console)
    except InputError as error:
        return refuse(error)
    except OSError as error:
        path = error.filename2 or error.filename
        where = "" if path is None else f" ({path})"
        reason = error.strerror or first_line(error)
        return refuse(
            f"{reason}{where}; what was measured is kept: mend this, and the same command goes on."
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return refuse(
            f"There is not enough memory ({first_line(error)}); ask for fewer tokens "
            "(--search-tokens and the like), a shorter --sequence-length or a smaller "
            "--bank-memory-gb."
        )
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
        return INTERRUPTED
    if arguments.json:
        sys.stdout.write(summary)
    return 0


def search(config: SearchConfig, console: Console) -> str:
    """Search, write everything into the run's folder, and return ``summary.json``'s text.

    Args:
        config: What to search.
        console: Where progress and the table are shown.

    Raises:
        InputError: If the configuration asks for what cannot be; nothing is written then.
    """
    from dmpq.checks import prepare
    from dmpq.session import Session

    prepare(config)
    if config.engine is not None:
        engine_named(config.engine)
    agent = make_agent(config.agent, policy=config.policy)
    with ExitStack() as alone:
        with progress_bars(console) as show:
            session = Session(config, progress=show)
            if config.explain:
                explainable(session.hardware)
            session.check()
            if config.engine is not None:
                from dmpq.engines.preflight import refuse_compensators

                refuse_compensators(session.menu, config.engine)
            run = _Run(session, agent, run_folder(config), console)
            alone.enter_context(only_run_in(run.folder))
            _introduce(run)
            problem, result, rows = _measured_on_text(run)
        return _finish(run, problem, result, rows)


def _measured_on_text(run: _Run) -> tuple[Problem, SearchResult, list[Row]]:
    """Profile, search and report: all that evaluates or times maps, with every answer kept."""
    from dmpq.hardware.loop import HardwareLoop

    session = run.session
    session.journal = JsonLines(run.path("journal.jsonl"))
    try:
        profile = session.profile()
        profile.save(run.path("profile.safetensors"))
        run.console.print(_head_room(profile))
        run.loop = HardwareLoop.of(session, profile)
        if run.loop is not None:
            run.loop.start()
        problem = session.problem(
            profile,
            evaluator=session.evaluator("search"),
            selector=session.evaluator("selection"),
            further=session.further(),
        )
        for note in problem.notes:
            run.console.print(f"  note      {note}")
        try:
            result = _searched(run, problem)
            if run.loop is not None:
                run.measured = run.loop.report(problem, result.assignment)
            return problem, result, _rows(run, problem, result)
        except (KeyboardInterrupt, InputError):
            _keep_best(run, problem)
            raise
    finally:
        session.journal.close()


def _head_room(profile: Profile) -> str:
    room = profile.head_room()
    return (
        f"  head-room AM/GM of what experts lose: {room['within_layers']:.2f} within layers, "
        f"{room['whole_model']:.2f} over all;\n            at 1.00 a uniform map is the best"
    )


def _searched(run: _Run, problem: Problem) -> SearchResult:
    """Run the agent, and write every candidate into the history."""
    config, partial = run.config, run.path("history.partial.jsonl")
    evaluations = config.evaluations - config.kept_evaluations
    with partial.open("w", encoding="utf-8") as history:

        def on_candidate(candidate: Candidate) -> None:
            history.write(_history_line(candidate, problem))
            history.flush()
            run.seen = candidate.evaluation
            may_be_chosen = candidate.text is None and candidate.feasible
            if may_be_chosen and (run.best is None or candidate.reward > run.best.reward):
                run.best = candidate
            best = math.nan if run.best is None else run.best.kl
            spent = int(candidate.spent or candidate.evaluation)
            run.session.progress(f"searching, best {_lost(config, best)}", spent, evaluations)
            if run.loop is not None:
                run.loop.after(candidate, problem)

        result = run_agent(
            run.agent,
            config.agent,
            problem,
            evaluations=evaluations,
            seed=config.seed,
            on_candidate=on_candidate,
            trace=run.path("agent_error.txt"),
        )
    # From the result, since an agent of a user's need not report what it evaluates.
    lines = "".join(_history_line(candidate, problem) for candidate in result.history)
    replace_atomically(run.path("history.jsonl"), lines.encode())
    partial.unlink()
    return result


def _history_line(candidate: Candidate, problem: Problem) -> str:
    facts = vars(candidate) | {"assignment": [problem.menu.keys[i] for i in candidate.assignment]}
    names = ("evaluation", "reward", "kl", "nll", "router_shift", "effective_bits", "assignment")
    text = {} if candidate.text is None else {"text": candidate.text}
    return json.dumps({name: facts[name] for name in names} | text) + "\n"


def _keep_best(run: _Run, problem: Problem) -> None:
    """Write the best map of an interrupted run, unless an earlier one got further."""
    if run.best is None:
        return
    path = run.path("bitmap.partial.json")
    if _evaluations_in(path) <= run.seen:
        tokens = problem.profile.cost_tokens + problem.evaluator.tokens_spent
        bitmap = bitmap_of(
            run.session, problem, run.best.assignment, evaluations=run.seen, tokens=tokens
        )
        bitmap.write(path)
    lost = _lost(run.config, run.best.kl)
    run.console.print(f"The best map so far ({lost}) is in {path}.", soft_wrap=True)


def _lost(config: SearchConfig, loss: float) -> str:
    """Return a map's loss as progress shows it: the KL, or the drop of the metric, of 1."""
    return f"{'drop' if config.signal == 'task' else 'KL'} {loss:.5f}"


def _evaluations_in(path: Path) -> int:
    """Return how many evaluations a partial map stands for; -1 where none can be read."""
    from dmpq.bitmap import BitMap

    try:
        return int(BitMap.read(path).search["evaluations"])
    except InputError:
        return -1


def _introduce(run: _Run) -> None:
    """Say what is searched, on what, and for what the costs are computed."""
    from rich.table import Table

    session = run.session
    spec, hardware = session.moe.spec, session.hardware
    lines = {
        "model": f"{spec.name} ({spec.model_type}, {spec.num_experts} experts in "
        f"{len(spec.moe_layers)} layers, {spec.expert_parameters / 1e6:.2f} M expert weights)",
        "hardware": f"{hardware.device} (stack {hardware.stack}, "
        f"{'calibrated' if hardware.calibrated else 'not calibrated'})",
        "costs": _cost_caption(session),
        "text": session.splits.source,
        "output": str(run.folder),
    }
    facts = Table.grid(padding=(0, 2), pad_edge=True)
    facts.add_column(style="dim")
    for name, value in lines.items():
        facts.add_row(name, value)
    for note in (*hardware.unsupported(session.menu), *hardware.notes(), *session.notes()):
        facts.add_row("note", note)
    if session.config.dataset == "embedded":
        changed, modules = differs_from_card()
        if changed:
            text = f"{changed} of {modules} held-out modules differ from the reference card's"
            facts.add_row("note", text)
    run.console.print(facts)


def _cost_caption(session: Session) -> str:
    spec, workload = session.cost_spec(session.moe.spec), session.workload
    return (
        f"computed for {spec.name}: {workload.phase}, batch {workload.batch}, "
        f"context {workload.context}"
    )


def _rows(run: _Run, problem: Problem, result: SearchResult) -> list[Row]:
    """Measure every allocation of the final table on held-out text; the agent's comes last."""
    from dmpq import agents
    from dmpq.report import Row, TaskRow

    session, config = run.session, run.config
    heldout = session.evaluator("heldout")
    own = label_of(run.agent, config.agent)
    maps: dict[str, tuple[NDArray[np.int64], int]] = {}
    for name, key in UNIFORM.items():
        if key in problem.menu.keys:
            maps[name] = (problem.uniform(key), 0)
    for name in BASELINES:
        if name != own:
            found = agents.make(name).search(problem, evaluations=1, seed=config.seed)
            maps[name] = (found.assignment, found.evaluations)
    maps[own] = (result.assignment, result.evaluations)
    rows = [] if UNIFORM["bf16"] in problem.menu.keys else [_full_row(session, problem, heldout)]
    total = len(rows) + len(maps)
    for name, (assignment, evaluations) in maps.items():
        measured = heldout.evaluate(problem.expand(assignment[None]))
        cost = problem.costs(assignment[None])
        row = Row.of(
            name,
            bits=problem.effective_bits(assignment[None])[0],
            kl=measured.kl[0],
            nll=measured.nll[0],
            cost=cost,
            workload=problem.workload,
            evaluations=evaluations,
        )
        if config.task is not None:
            (metrics,) = _of_task(heldout).metrics(problem.expand(assignment[None]))
            row = TaskRow.judged(row, metrics)
        rows.append(row)
        session.progress("held-out text", len(rows), total)
    if config.engine is not None:
        rows[-1:-1] = _engine_rows(run, config.engine, problem, result)
    return rows


def _engine_rows(run: _Run, engine: str, problem: Problem, result: SearchResult) -> list[Row]:
    """Return the row of the nearest map that an engine loads, and write it; or say why not."""
    from dmpq.engines.preflight import NothingLoadable
    from dmpq.engines.row import engine_row

    try:
        row, nearest = engine_row(engine, run.session, problem, result.assignment)
    except NothingLoadable as error:
        run.console.print(f"  note      {error}")
        return []
    nearest.write(run.path(f"bitmap.{engine}.json"))
    return [row]


def _full_row(session: Session, problem: Problem, heldout: ModelEvaluator) -> Row:
    """Return the row of full precision where the menu has none."""
    from dmpq.report import Row, TaskRow

    full = Menu.parse(UNIFORM["bf16"])
    cost = problem.hardware.cost(
        problem.cost_spec,
        full,
        np.zeros((1, problem.spec.num_experts), np.int64),
        problem.workload,
        inclusion=problem.profile.frequency,
    )
    row = Row.of(
        "bf16",
        bits=full.formats[0].bits,
        kl=0.0,
        nll=heldout.full_nll(),
        cost=cost,
        workload=session.workload,
        evaluations=0,
    )
    if session.config.task is None:
        return row
    return TaskRow.judged(row, _of_task(heldout).full_metrics())


def _of_task(heldout: ModelEvaluator) -> TaskEvaluator:
    """Return the evaluator of a task as what it is."""
    from dmpq.tasks.evaluator import TaskEvaluator

    assert isinstance(heldout, TaskEvaluator)
    return heldout


def _finish(run: _Run, problem: Problem, result: SearchResult, rows: list[Row]) -> str:
    """Write what the search found, draw it, and print the table."""
    from dmpq import report
    from dmpq.shadow_prices import said, shadow_prices
    from dmpq.solvers.limits import device_memory, usable_bytes

    config, session, row = run.config, run.session, rows[-1]
    bitmap = bitmap_of(
        session,
        problem,
        result.assignment,
        evaluations=result.evaluations,
        tokens=problem.profile.cost_tokens + result.tokens,
        heldout=row,
    )
    bitmap.write(run.path("bitmap.json"))
    run.path("bitmap.partial.json").unlink(missing_ok=True)
    if result.policy is not None:
        result.policy.save(run.path("policy"))
    named = {"mckp": problem.mckp(), row.name: result.assignment}
    lost = session.lost
    plane = report.plane(problem, result.history, named, lost=lost)
    report.save_figure(plane, run.path("plane.png"))
    heat = report.heat_map(
        problem,
        result.assignment,
        title=f"{row.name}: {row.effective_bits:.2f} effective bits, {problem.spec.name}",
    )
    report.save_figure(heat, run.path("bits.png"))
    profile, prices = problem.profile, shadow_prices(problem)
    usable = usable_bytes(problem.hardware.capacity_bytes)
    too_large = [one.name for one in rows if one.memory_bytes > usable]
    failed = sum(candidate.kl >= FAILURE_NATS for candidate in result.history)
    facts = {
        "config": asdict(config),
        "costs": _cost_caption(session),
        "hardware": {
            "name": problem.hardware.name,
            "stack": problem.hardware.stack,
            "calibrated": problem.hardware.calibrated,
            "source": problem.hardware.source,
            "device": problem.hardware.device,
            "notes": list(problem.hardware.notes()),
            "formats": list(problem.hardware.unsupported(problem.menu)),
            "kernels": problem.hardware.kernels(problem.menu),
        },
        "head_room": profile.head_room(),
        "unhit_experts": profile.unhit.tolist(),
        "constraints": asdict(problem.limits),
        "shadow_prices": {name: price.to_json(lost) for name, price in prices.items()},
        "do_not_fit": too_large,
        "failed_maps": failed,
        "tokens": {"profile": profile.cost_tokens, "search": result.tokens},
        "seconds": time.monotonic() - run.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "python": platform.python_version(),
    }
    explanation = _explanation(problem, result.assignment) if config.explain else None
    if explanation is not None:
        facts["explanation"] = explanation.to_json()
    if run.measured is not None:
        facts["measured_maps"] = run.measured.to_json()
    text = report.write_summary(run.path("summary.json"), rows, facts)
    measured = (
        f"KL (nats/token) and perplexity (per token) on {config.heldout_tokens:,} held-out tokens"
        if config.task is None
        else f"KL (nats/answer) and metrics of {config.task} on "
        f"{session.splits.heldout.shape[0]:,} held-out examples"
    )
    caption = f"{measured};\nmemory, latency, energy {_cost_caption(session)}"
    run.console.print(report.table(rows, caption=caption, best=rows[-1].name, marked=too_large))
    if too_large:
        run.console.print(
            f"  * does not fit: {problem.hardware.name} has "
            f"{device_memory(problem.hardware.capacity_bytes)}"
        )
    for price in prices.values():
        run.console.print(f"  {said(price, problem, lost)}")
    if run.measured is not None:
        run.measured.show(row.name, run.console)
    if explanation is not None:
        from dmpq.hardware.explain import print_explanation

        print_explanation(explanation, run.console, routing="measured")
    if failed:
        run.console.print(
            f"  {failed} maps had no finite loss; each counts as {lost.mean(FAILURE_NATS)}"
        )
    if profile.unhit.size:
        run.console.print(f"  calibration never hit experts {profile.unhit.tolist()}")
    run.console.print(
        f"  wrote {run.folder}/ bitmap.json summary.json history.jsonl plane.png bits.png"
        f"{' policy/' if result.policy is not None else ''}",
        soft_wrap=True,
    )
    return text


def _explanation(problem: Problem, assignment: NDArray[np.int64]) -> Explanation:
    return explainable(problem.hardware).explain(
        problem.cost_spec,
        problem.menu,
        problem.expand(assignment[None])[0],
        problem.workload,
        inclusion=problem.profile.frequency,
    )


if __name__ == "__main__":
    sys.exit(main())
