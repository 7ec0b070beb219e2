"""What searches on some models teach a policy that is asked on another.

Each search leaves importances that its evaluations speak for
(:mod:`dmpq.agents.importance_regression`); one network learns all of them from feature rows alone,
without an embedding, so that it knows no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import SearchResult
from dmpq.agents.importance_regression import ImportanceRegression
from dmpq.agents.policy import Policy, PolicyConfig
from dmpq.agents.seeding import generators_left_alone
from dmpq.errors import InputError
from dmpq.features import format_names
from dmpq.problem import Problem

if TYPE_CHECKING:
    import torch as th

    from dmpq.agents.networks import ImportanceNetwork

_LOG_SCALE: Final = 3.0


@dataclass(frozen=True, eq=False)
class Lesson:
    """A problem with what a search has found out of it.

    Attributes:
        problem: What was searched.
        log_importance: (D,), what the evaluations speak for.
        weight: (D,), share of the damage at the narrowest width: how much it matters that an
            importance is right.
    """

    problem: Problem
    log_importance: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def of(cls, problem: Problem, result: SearchResult) -> Lesson:
        """Return what a search's history teaches."""
        importance = ImportanceRegression(problem).believed_after(result.history)
        damage = problem.sensitivity[:, problem.menu.narrowest].clip(0)
        total = damage.sum()
        weight = damage / total if total > 0 else np.full(len(damage), 1 / len(damage))
        floor = np.exp(-_LOG_SCALE)
        return cls(problem, np.log(importance.clip(floor, 1 / floor)), weight)


def learn(
    lessons: Sequence[Lesson],
    *,
    seed: int,
    hidden: int = 32,
    steps: int = 600,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.03,
) -> Policy:
    """Return a policy that has learned some lessons, for other models too.

    Weighted least squares in log-importance, each lesson alike, by AdamW. What it proposes is then
    shrunk towards the knapsack's own importances by as much as it must be on models left out: each
    in turn is predicted from the others, and the factor is the one that fits best
    (:func:`shrinkage`).

    Args:
        lessons: On models whose menus have the same widths.
        seed: Of the network.
        hidden: Width of its two hidden layers.
        steps: Of the optimizer.
        learning_rate: Its step.
        weight_decay: Its pull towards zero.

    Raises:
        InputError: If there is no lesson, or the lessons' formats differ.
    """
    import torch as th

    if not lessons:
        raise InputError("There are no lessons to learn from; give at least one.")
    first = lessons[0].problem
    for lesson in lessons:
        if format_names(lesson.problem.menu) != format_names(first.menu):
            raise InputError(
                f"The lessons are on formats {','.join(first.menu.keys)} and "
                f"{','.join(lesson.problem.menu.keys)}; give models of the same widths."
            )

    def fit(chosen: Sequence[Lesson]) -> ImportanceNetwork:
        return _fitted(
            chosen,
            seed=seed,
            hidden=hidden,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )

    with generators_left_alone():
        factor = shrinkage(lessons, fit)
        network = fit(lessons)
        with th.inference_mode():
            for parameter in network.body[-1].parameters():
                parameter.mul_(factor)
    names = sorted({Path(lesson.problem.spec.name).name for lesson in lessons})
    return Policy(
        config=PolicyConfig(
            menu=first.menu.keys,
            feature_names=tuple(first.feature_names),
            context_size=len(first.context),
            fingerprint="",
            decisions=0,
            hidden=hidden,
            embedding=0,
            log_scale=_LOG_SCALE,
        ),
        weights={name: value.numpy().copy() for name, value in network.state_dict().items()},
        training={
            "lessons": str(len(lessons)),
            "models": ", ".join(names),
            "seed": str(seed),
            "shrinkage": f"{factor:.3f}",
        },
    )


def shrinkage(
    lessons: Sequence[Lesson], fit: Callable[[Sequence[Lesson]], ImportanceNetwork]
) -> float:
    """Return by what factor predictions for a model left out fit its lessons best, 0 to 1.

    Args:
        lessons: On one model or more; for one, which nothing is told about others, it is 1.
        fit: Trains a network on some lessons.
    """
    models = [lesson.problem.profile.fingerprint for lesson in lessons]
    if len(set(models)) < 2:
        return 1.0
    along = squared = 0.0
    for model in dict.fromkeys(models):
        network = fit([one for one, own in zip(lessons, models, strict=True) if own != model])
        for lesson in (one for one, own in zip(lessons, models, strict=True) if own == model):
            predicted = _predicted(network, lesson)
            along += float(lesson.weight @ (predicted * lesson.log_importance))
            squared += float(lesson.weight @ predicted**2)
    return min(max(along / squared, 0.0), 1.0) if squared > 0 else 1.0


def _predicted(network: ImportanceNetwork, lesson: Lesson) -> NDArray[np.float64]:
    """Return a network's log-importances for a lesson's problem, (D,)."""
    import torch as th

    rows, context = _observed(lesson)
    with th.inference_mode():
        predicted: NDArray[np.float64] = network(rows, context)[0].numpy().astype(np.float64)
    return predicted


def _observed(lesson: Lesson) -> tuple[th.Tensor, th.Tensor]:
    """Return what a network sees of a lesson's problem: rows (1, D, F) and context (1, C)."""
    import torch as th

    problem = lesson.problem
    return th.tensor(problem.features)[None], th.tensor(problem.context)[None]


def _fitted(
    lessons: Sequence[Lesson],
    *,
    seed: int,
    hidden: int,
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> ImportanceNetwork:
    """Return a network trained on lessons; see :func:`learn`."""
    import torch as th

    from dmpq.agents.networks import ImportanceNetwork, NetworkShape

    first = lessons[0].problem
    th.manual_seed(seed)
    network = ImportanceNetwork(
        NetworkShape(
            features=first.features.shape[1],
            context=len(first.context),
            decisions=0,
            hidden=hidden,
            embedding=0,
        )
    )
    optimizer = th.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    told = [
        (
            *_observed(one),
            th.from_numpy(one.log_importance.astype(np.float32)),
            th.from_numpy(one.weight.astype(np.float32)),
        )
        for one in lessons
    ]
    for _ in range(steps):
        parts = [
            (weight * (network(rows, context)[0] - target).square()).sum()
            for rows, context, target, weight in told
        ]
        optimizer.zero_grad()
        th.autograd.backward(th.stack(parts).mean())
        optimizer.step()
    return network
