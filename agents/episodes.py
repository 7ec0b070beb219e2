"""Learning where experience is free: episodes on the surrogate first, evaluations afterwards.

What the agents share that learn on ``dmpq/ExpertBits-v0`` with a library's algorithm. The additive
surrogate rewards the training, which spends no evaluation; the evaluations go to the most
promising maps that its episodes ended with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.seeding import generators_left_alone
from dmpq.envs.observation import Observation
from dmpq.envs.sequential import ExpertBitsEnv
from dmpq.errors import InputError
from dmpq.evaluation import SurrogateEvaluator
from dmpq.problem import Problem

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback

Act = Callable[[Observation], int]
"""Chooses a menu index for an observation, within one episode."""

Begin = Callable[[bool], Act]
"""Begins an episode of a learned policy, deterministic or not."""

Learn = Callable[[ExpertBitsEnv, "BaseCallback"], Begin]
"""Trains on the environment, with the callback, and returns the policy."""


class EpisodeAgent(ABC):
    """Base of the agents that learn in episodes on the surrogate, each by its own algorithm."""

    @property
    @abstractmethod
    def fresh(self) -> int:
        """Samples of the policy after the training, at least."""

    @abstractmethod
    def _learn(self, env: ExpertBitsEnv, collect: BaseCallback, *, seed: int) -> Begin:
        """Train on the environment, with the callback, and return the policy."""

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map among ``evaluations`` distinct ones.

        Every map that an episode of the training ends with, the policy's deterministic map and
        fresh samples are ranked by the surrogate; the best distinct ones are evaluated.

        Args:
            problem: What to search.
            evaluations: Number of distinct maps that may be evaluated.
            seed: Seed of the network and the samples; the same seed gives the same result.
            on_candidate: Called with every map evaluated.
        """
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        cheap = replace(problem, evaluator=SurrogateEvaluator(problem.profile), selector=None)
        learn = partial(self._learn, seed=seed)
        env = ExpertBitsEnv(problem=cheap)
        for assignment in _explored(env, learn, fresh=self.fresh, wanted=evaluations)[
            :evaluations
        ]:
            if recorder.remaining:
                recorder.evaluate(np.array(assignment)[None])
        return recorder.result()


def check_training(agent: object, *counts: str) -> None:
    """Refuse counts below 1 and a learning rate that is not positive.

    Raises:
        InputError: With the field, its value and what is allowed.
    """
    for name in counts:
        value: object = getattr(agent, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{name} is {value}; it must be a whole number, 1 or more.")
    rate: float = vars(agent)["learning_rate"]
    if not 0 < rate < np.inf:
        raise InputError(f"learning_rate is {rate}; it must be positive.")


def memoryless(model: BaseAlgorithm) -> Begin:
    """Return the policy of a model that needs nothing but the observation."""

    def begin(deterministic: bool) -> Act:
        return lambda seen: int(model.predict(seen, deterministic=deterministic)[0])

    return begin


def _explored(
    env: ExpertBitsEnv, learn: Learn, *, fresh: int, wanted: int
) -> list[tuple[int, ...]]:
    """Return the distinct maps met, the best by the surrogate first."""
    from stable_baselines3.common.callbacks import BaseCallback

    found: dict[tuple[int, ...], float] = {}

    class Collect(BaseCallback):
        """Keeps the map that each episode ends with."""

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "assignment" in info:
                    found[tuple(info["assignment"].tolist())] = info["objective"]
            return True

    with generators_left_alone():
        begin = learn(env, Collect())
        for attempt in range(1 + max(fresh, wanted - len(found))):
            assignment, objective = _rollout(env, begin(attempt == 0))
            found[tuple(assignment.tolist())] = objective
    # Ties in the order of discovery: sorting is stable.
    return sorted(found, key=lambda assignment: -found[assignment])


def _rollout(env: ExpertBitsEnv, act: Act) -> tuple[NDArray[np.int64], float]:
    """Return the map of one episode, and its surrogate reward."""
    observation, info = env.reset()
    while "assignment" not in info:
        observation, _, _, _, info = env.step(np.int64(act(observation)))
    return info["assignment"], info["objective"]
