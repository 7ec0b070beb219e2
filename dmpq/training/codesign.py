"""Co-design: search a map, train under it, search again on what was trained, until it stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.bitmap import BitMap
from dmpq.errors import InputError, first_line
from dmpq.files import JsonLines, replace_atomically
from dmpq.formats import Menu
from dmpq.guard import make_agent, run_agent
from dmpq.moe import MoEModel
from dmpq.provenance import bitmap_of
from dmpq.report import Row
from dmpq.session import Session
from dmpq.training.config import CodesignConfig
from dmpq.training.fake_quant import FakeQuantizedModel, check_trainable
from dmpq.training.judging import Judge, Judgement
from dmpq.training.objective import own_experts
from dmpq.training.qat import check_map, train_under
from dmpq.training.saved import MODEL, save
from dmpq.training.workbench import Progress, Workbench, workbench

_DONE: Final = "round.json"


@dataclass(frozen=True, eq=False)
class Round:
    """One search and the training under its map.

    Attributes:
        number: Counted from 1.
        bitmap: The map, of the weights that the round began with.
        changed: Share of experts with another format than in the map before; 1 in the first.
        rows: What was measured on held-out text, by name.
    """

    number: int
    bitmap: BitMap
    changed: float
    rows: dict[str, Judgement]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, without the map."""
        return {
            "round": self.number,
            "changed": self.changed,
            "rows": {name: row.to_json() for name, row in self.rows.items()},
        }


@dataclass(frozen=True, eq=False)
class Codesigned:
    """What co-design has come to.

    Attributes:
        bench: The model as saved.
        rounds: All of them.
        stable: Whether the last map stayed.
        changed: Share of experts to which the last search gave another format than the one before.
        folder: Of the last round: ``model`` and ``bitmap.json``.
    """

    bench: Workbench
    rounds: Sequence[Round]
    stable: bool
    changed: float
    folder: Path


def codesign(config: CodesignConfig, folder: Path, progress: Progress) -> Codesigned:
    """Alternate searches and trainings; go on with what an interrupted run has left.

    A search measures what maps lose against the weights that the round began with, in full
    precision; what a map is worth on held-out text is told against the model at the very start.

    Args:
        config: How.
        folder: Where to: one folder per round.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If the model cannot be trained, no map keeps the limit, or the loss does not
            stay finite.
    """
    bench = workbench(config)
    moe = bench.moe
    check_trainable(moe)
    teacher = bench.frozen_copy()
    judge = bench.judge(teacher)
    rounds: list[Round] = []
    before: NDArray[np.int64] | None = None
    changed = 1.0
    for number in range(1, config.rounds + 1):
        place = folder / f"round-{number}"
        place.mkdir(parents=True, exist_ok=True)
        name = config.model if number == 1 else str(folder / f"round-{number - 1}" / MODEL)
        if number > 1:
            bench = workbench(replace(config, model=name, revision=None))
        bitmap = _searched(config, bench, place, progress, number)
        formats = check_map(bitmap, bench.moe)
        if before is not None:
            changed = float((formats != before).any(1).mean())
        if before is not None and changed <= config.stable:
            return Codesigned(bench, rounds, True, changed, folder / f"round-{number - 1}")
        rows = _trained(config, bench, place, formats, judge, teacher, progress, number)
        rounds.append(Round(number, bitmap, changed, rows))
        before = formats
    return Codesigned(bench, rounds, False, changed, folder / f"round-{config.rounds}")


def _searched(
    config: CodesignConfig, bench: Workbench, place: Path, progress: Progress, number: int
) -> BitMap:
    """Return the map of a round, searched on the weights that it begins with."""
    known = place / "searched.json"
    if known.exists():
        return BitMap.read(known)
    search = replace(config.search, model=bench.config.model)
    journal = JsonLines(place / "journal.jsonl")
    session = Session(
        search, journal, lambda stage, i, n: progress(f"round {number}: {stage}", i, n)
    )
    try:
        session.take(bench.moe, bench.tokenizer)
        session.check()
        problem = session.problem(
            session.profile(),
            evaluator=session.evaluator("search"),
            selector=session.evaluator("selection"),
        )
        result = run_agent(
            make_agent(config.agent),
            config.agent,
            problem,
            evaluations=config.evaluations,
            seed=config.seed,
            on_candidate=lambda _: None,
            trace=place / "agent_error.txt",
        )
        heldout = session.evaluator("heldout")
        measured = heldout.evaluate(problem.expand(result.assignment[None]))
        row = Row.of(
            config.agent,
            bits=problem.effective_bits(result.assignment[None])[0],
            kl=measured.kl[0],
            nll=measured.nll[0],
            cost=problem.costs(result.assignment[None]),
            workload=problem.workload,
            evaluations=result.evaluations,
        )
        tokens = problem.profile.cost_tokens + result.tokens
        bitmap = bitmap_of(
            session,
            problem,
            result.assignment,
            evaluations=result.evaluations,
            tokens=tokens,
            heldout=row,
        )
    finally:
        journal.close()
    bitmap.write(known)
    return bitmap


def _trained(
    config: CodesignConfig,
    bench: Workbench,
    place: Path,
    formats: NDArray[np.int64],
    judge: Judge,
    teacher: MoEModel,
    progress: Progress,
    number: int,
) -> dict[str, Judgement]:
    """Train under a map, save the weights, and return what was measured."""
    done = place / _DONE
    if done.exists():
        return _read(done)
    moe = bench.moe
    menu = Menu.parse(config.bits, quantizer=config.quantizer, symmetric=config.symmetric)
    learner = FakeQuantizedModel(moe, menu, refresh=config.refresh)
    learner.choose(formats)
    rows = {}
    with moe.experts_forward(learner.forwards):
        rows["before"] = judge(moe)
    train_under(
        bench,
        config,
        place / "training",
        learner,
        formats,
        teacher,
        lambda stage, i, n: progress(f"round {number}: {stage}", i, n),
    )
    learner.forget()
    with moe.experts_forward(learner.forwards):
        rows["after"] = judge(moe)
    with own_experts(moe):
        rows["full precision, after"] = judge(moe)
    save(bench, place / MODEL, torch.float32)  # the next round goes on from the very weights
    text = json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2)
    replace_atomically(done, text.encode())
    return rows


def _read(done: Path) -> dict[str, Judgement]:
    """Return what a round that is done has measured."""
    try:
        found = json.loads(done.read_text("utf-8"))
        return {name: Judgement(**row) for name, row in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{done} is damaged ({first_line(error)}); remove it, and its round is trained again."
        ) from error
