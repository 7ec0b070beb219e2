"""MaskablePPO over single decisions: what the field calls RL for mixed precision.

The policy learns on the additive surrogate, where experience costs nothing; the evaluations go
to the most promising maps it has met.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.seeding import generators_left_alone
from dmpq.envs.sequential import ExpertBitsEnv
from dmpq.errors import InputError
from dmpq.evaluation import SurrogateEvaluator
from dmpq.problem import Problem

if TYPE_CHECKING:
    from sb3_contrib import MaskablePPO


@dataclass(frozen=True, kw_only=True)
class MaskablePPOAgent:
    """Searches with sb3-contrib's MaskablePPO on ``dmpq/ExpertBits-v0``.

    Every map that an episode of the training ends with, the policy's deterministic map and fresh
    samples are ranked by the surrogate; the best distinct ones are evaluated. The knapsack's map
    is not among them: this agent is the comparison with it.

    Attributes:
        episodes: Episodes of training.
        episodes_per_update: Episodes between two updates.
        epochs: Passes over the experience per update.
        learning_rate: Adam's step.
    """

    name: ClassVar[str] = "maskable-ppo"

    episodes: int = 256
    episodes_per_update: int = 16
    epochs: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("episodes", "episodes_per_update", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        if not 0 < self.learning_rate < np.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be positive.")

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map among ``evaluations`` distinct ones.

        Args:
            problem: What to search.
            evaluations: Number of distinct maps that may be evaluated.
            seed: Seed of the network and the samples; the same seed gives the same result.
            on_candidate: Called with every map evaluated.
        """
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        ranked = self._explore(problem, samples=evaluations, seed=seed)
        for assignment in ranked[:evaluations]:
            recorder.evaluate(np.array(assignment)[None])
        return recorder.result()

    def _explore(self, problem: Problem, *, samples: int, seed: int) -> list[tuple[int, ...]]:
        """Return the distinct maps met, the best by the surrogate first."""
        from sb3_contrib import MaskablePPO
        from stable_baselines3.common.callbacks import BaseCallback

        found: dict[tuple[int, ...], float] = {}

        class Collect(BaseCallback):
            """Keeps the map that each episode ends with."""

            def _on_step(self) -> bool:
                for info in self.locals["infos"]:
                    if "assignment" in info:
                        found[tuple(info["assignment"].tolist())] = info["objective"]
                return True

        cheap = replace(problem, evaluator=SurrogateEvaluator(problem.profile), selector=None)
        env = ExpertBitsEnv(problem=cheap)
        steps = self.episodes_per_update * env.horizon
        with generators_left_alone():
            model = MaskablePPO(
                "MlpPolicy",
                env,
                learning_rate=self.learning_rate,
                n_steps=steps,
                batch_size=steps // 4 if steps % 4 == 0 else steps,
                n_epochs=self.epochs,
                gamma=1.0,
                seed=seed,
                device="cpu",
            )
            model.learn(self.episodes * env.horizon, callback=Collect())
            fresh = max(self.episodes_per_update, samples - len(found))
            for attempt in range(1 + fresh):
                assignment, objective = _rollout(env, model, deterministic=attempt == 0)
                found[tuple(assignment.tolist())] = objective
        # Ties in the order of discovery: sorting is stable.
        return sorted(found, key=lambda assignment: -found[assignment])


def _rollout(
    env: ExpertBitsEnv, model: MaskablePPO, *, deterministic: bool
) -> tuple[NDArray[np.int64], float]:
    """Return the map of one episode, and its surrogate reward."""
    observation, info = env.reset()
    while "assignment" not in info:
        action, _ = model.predict(
            observation, deterministic=deterministic, action_masks=env.action_masks()
        )
        observation, _, _, _, info = env.step(np.int64(action))
    return info["assignment"], info["objective"]
