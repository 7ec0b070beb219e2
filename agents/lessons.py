"""What searches on some models teach a policy that is asked on another.

Each search leaves importances that its evaluations speak for
(:mod:`dmpq.agents.importance_regression`); one network learns all of them from feature rows alone,
without an embedding, so that it knows no model by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import SearchResult
from dmpq.agents.importance_regression import ImportanceRegression
from dmpq.agents.policy import Policy, PolicyConfig
from dmpq.agents.seeding import generators_left_alone
from dmpq.errors import InputError
from dmpq.features import format_names
from dmpq.problem import Problem

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
        history = result.history
        importance = ImportanceRegression(problem).posterior(
            np.array([candidate.assignment for candidate in history]),
            np.array([candidate.kl for candidate in history]),
            np.array([-1 if candidate.text is None else candidate.text for candidate in history]),
        )
        damage = problem.sensitivity[:, 0].clip(0)
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

    Weighted least squares in log-importance, each lesson alike, by AdamW.

    Args:
        lessons: On models whose menus have the same widths.
        seed: Of the network.
        hidden: Width of its two hidden layers.
        steps: Of the optimizer.
        learning_rate: Its step.
        weight_decay: Its pull towards the knapsack's own importances.

    Raises:
        InputError: If there is no lesson, or the lessons' formats or features differ.
    """
    import torch as th

    from dmpq.agents.networks import ImportanceNetwork, NetworkShape

    if not lessons:
        raise InputError("There are no lessons to learn from; give at least one.")
    first = lessons[0].problem
    for lesson in lessons:
        if format_names(lesson.problem.menu) != format_names(first.menu):
            raise InputError(
                f"The lessons are on formats {','.join(first.menu.keys)} and "
                f"{','.join(lesson.problem.menu.keys)}; give models of the same widths."
            )
    with generators_left_alone():
        th.manual_seed(seed)
        shape = NetworkShape(
            features=first.features.shape[1],
            context=len(first.context),
            decisions=0,
            hidden=hidden,
            embedding=0,
        )
        network = ImportanceNetwork(shape)
        optimizer = th.optim.AdamW(
            network.parameters(), lr=learning_rate, weight_decay=weight_decay
        )
        told = [
            (
                th.from_numpy(np.array(one.problem.features))[None],
                th.from_numpy(np.array(one.problem.context))[None],
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
    names = sorted({lesson.problem.spec.name for lesson in lessons})
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
        training={"lessons": str(len(lessons)), "models": ", ".join(names), "seed": str(seed)},
    )
