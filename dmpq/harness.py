"""Multiple choice by lm-evaluation-harness: a model under a bit map as the harness asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmpq.errors import InputError, first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dmpq.bank import Bank

_BATCH: Final = 8


def harness_scores(
    bank: Bank,
    tokenizer: Any,
    assignment: NDArray[np.integer] | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = _BATCH,
) -> dict[str, float]:
    """Return the scores of a causal model under a bit map, by ``"task metric"``.

    Args:
        bank: The model's variants.
        tokenizer: The model's.
        assignment: (N,) menu indices of whole experts, or (2N,) of gate+up and down in turn;
            ``None`` for the model's own precision.
        tasks: Names that lm-evaluation-harness knows, or files of tasks.
        limit: Examples per task; ``None`` for all.
        batch: Examples per forward.

    Raises:
        InputError: If the harness is not installed, or cannot run a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"Tasks of lm-evaluation-harness ({', '.join(tasks)}) need it installed, and it is "
            f"not ({first_line(error)}); install lm-eval, or leave --harness out."
        ) from error
    model: Any = bank.moe.model
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    options = {"model": asked, "tasks": list(tasks), "limit": limit, "bootstrap_iters": 0}
    try:
        if assignment is None:
            found = simple_evaluate(**options)
        else:
            bank.choose(_formats(assignment, bank.moe.spec.num_experts))
            with bank.attached():
                found = simple_evaluate(**options)
    except Exception as error:  # a task raises whatever its reader raises
        raise InputError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)} ({first_line(error)}); name "
            "tasks that `lm-eval ls tasks` lists, with a network at hand or their data cached."
        ) from error
    return _scores(found["results"])


def _formats(assignment: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """Return a map as menu indices of both projections, (1, N, 2)."""
    both = assignment if assignment.size == 2 * experts else np.repeat(assignment, 2)
    return np.ascontiguousarray(both, dtype=np.int64).reshape(1, experts, 2)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the harness's numbers without its standard errors and its names of filters."""
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, scores in results.items()
        for metric, value in scores.items()
        if isinstance(value, int | float)
        and metric != "sample_len"
        and not metric.partition(",")[0].endswith("_stderr")
    }
