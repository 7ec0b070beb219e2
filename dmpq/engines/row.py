"""The table's row of an engine: the nearest map that it loads, measured like every other row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmpq.engines.preflight import Layout, nearest_loadable
from dmpq.engines.rules import engine_named
from dmpq.provenance import bitmap_of
from dmpq.report import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dmpq.bitmap import BitMap
    from dmpq.model_evaluator import ModelEvaluator
    from dmpq.problem import Problem
    from dmpq.session import Session


def engine_row(
    name: str, session: Session, problem: Problem, assignment: NDArray[np.int64]
) -> tuple[Row, BitMap]:
    """Return the row of the nearest map that an engine loads, and the map.

    Args:
        name: The engine.
        session: What the map was searched with.
        problem: What was searched; its profile tells experts apart.
        assignment: (D,), the map.

    Raises:
        NothingLoadable: If no map within the engine's rules takes as few bits.
    """
    engine = engine_named(name)
    own = bitmap_of(session, problem, assignment, evaluations=0, tokens=0.0)
    nearest = nearest_loadable(engine, own, profile=problem.profile)
    layout, spec = Layout.of(nearest), problem.spec
    pairs = layout.pairs.reshape(1, 2 * spec.num_experts)
    measured = _heldout(session, nearest).evaluate(pairs)
    cost = problem.hardware.cost(
        problem.cost_spec,
        nearest.menu,
        pairs,
        problem.workload,
        inclusion=problem.profile.frequency,
    )
    row = Row.of(
        f"{name}: nearest",
        bits=layout.bits(engine.stored),
        kl=measured.kl[0],
        nll=measured.nll[0],
        cost=cost,
        workload=problem.workload,
        evaluations=0,
    )
    return row, nearest


def _heldout(session: Session, bitmap: BitMap) -> ModelEvaluator:
    """Return an evaluator of a map's own formats on the session's model and held-out text."""
    if bitmap.menu == session.menu:
        return session.evaluator("heldout")
    from dmpq.bank import Bank
    from dmpq.model_evaluator import ModelEvaluator

    memory = session.config.bank_memory_gb * 1e9
    bank = Bank(session.moe, bitmap.menu, memory_bytes=memory)
    return ModelEvaluator(bank, session.splits.heldout, label="heldout", journal=None)
