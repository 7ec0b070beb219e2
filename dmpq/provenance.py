"""The document of a map that a search found: what it is, what it was made for, by what."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import dmpq
from dmpq.config import TASK_OPTIONS
from dmpq.revision import git_revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dmpq.bitmap import BitMap
    from dmpq.problem import Problem
    from dmpq.report import Row
    from dmpq.session import Session

_VERSIONED: Final = ("torch", "transformers", "torchao", "stable-baselines3", "numpy")


def bitmap_of(
    session: Session,
    problem: Problem,
    assignment: NDArray[np.int64],
    *,
    evaluations: int,
    tokens: float,
    heldout: Row | None = None,
) -> BitMap:
    """Return a map's document; nothing in it depends on when or where it was made.

    Args:
        session: What it was searched with.
        problem: What was searched.
        assignment: (D,), menu index of each decision.
        evaluations: Number of distinct maps evaluated.
        tokens: What profiling and search cost, in forwarded tokens.
        heldout: The map's row on held-out text, where it was measured.
    """
    from dmpq.bitmap import BitMap, assignment_from

    config, moe = session.config, session.moe
    cost = problem.costs(assignment[None])
    measured = {} if heldout is None else _measured(heldout)
    return BitMap(
        model={
            "id": config.model,
            "revision": config.revision,
            "architecture": type(moe.model).__name__,
            "fingerprint": moe.fingerprint,
        },
        geometry=moe.spec,
        menu=problem.menu,
        assignment=assignment_from(moe.spec, problem.menu, problem.expand(assignment[None])[0]),
        objective={"weights": asdict(problem.weights), "signal": _signal(session)},
        constraints=asdict(problem.limits),
        hardware={
            "name": problem.hardware.name,
            "stack": problem.hardware.stack,
            "calibrated": problem.hardware.calibrated,
            "source": problem.hardware.source,
            "cost_geometry": config.geometry,
        },
        workload=asdict(problem.workload),
        text={
            "dataset": config.dataset,
            "sequence_length": session.splits.heldout.shape[1],
            "heldout_tokens": config.heldout_tokens,
            **({} if config.task is None else {name: vars(config)[name] for name in TASK_OPTIONS}),
        },
        serve=problem.serve,
        metrics={
            "predicted": {
                "effective_bits": _quantity(problem.effective_bits(assignment[None]), "bits"),
                "memory": _quantity(cost.memory_bytes, "bytes"),
                "latency": _quantity(cost.latency_s, "s"),
                "energy": _quantity(cost.energy_j, "J"),
            },
            "measured": measured,
        },
        search={
            "agent": config.agent,
            "seed": config.seed,
            "evaluations": evaluations,
            "tokens": tokens,
        },
        versions=versions(),
        git_revision=git_revision(),
        calibration=None if session.calibrated_by is None else session.calibrated_by.to_json(),
    )


def _signal(session: Session) -> str:
    """Name what the search made small."""
    config = session.config
    if config.task is None:
        return "kl"
    from dmpq.tasks.splits import TASKS

    metric = TASKS[config.task].metric
    return f"{metric if config.signal == 'task' else 'kl'} of {config.task}"


def _quantity(values: NDArray[np.float64], unit: str) -> dict[str, float | str]:
    return {"value": float(values[0]), "unit": unit}


def _measured(row: Row) -> dict[str, dict[str, float | str]]:
    from dmpq.report import TaskRow

    if isinstance(row, TaskRow):
        found: dict[str, dict[str, float | str]] = {
            "heldout_kl": {"value": row.heldout_kl, "unit": "nats/answer"}
        }
        for name, value in row.metrics.items():
            found[f"heldout_{name}"] = {"value": value, "unit": "%"}
        return found
    return {
        "heldout_kl": {"value": row.heldout_kl, "unit": "nats/token"},
        "heldout_perplexity": {"value": row.heldout_ppl, "unit": "per token"},
    }


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {"dmpq": dmpq.__version__, **{name: version(name) for name in _VERSIONED}}
