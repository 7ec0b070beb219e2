"""MaskablePPO over single decisions: what the field calls RL for mixed precision.

The policy learns on the additive surrogate, where experience costs nothing; the evaluations go
to the most promising maps it has met (:mod:`dmpq.agents.episodes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dmpq.agents.episodes import Act, Begin, EpisodeAgent, check_training
from dmpq.envs.sequential import ExpertBitsEnv

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback


@dataclass(frozen=True, kw_only=True)
class MaskablePPOAgent(EpisodeAgent):
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
    signal: ClassVar[str] = "learned policy, masked"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 2006.14171"

    episodes: int = 256
    episodes_per_update: int = 16
    epochs: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_training(self, "episodes", "episodes_per_update", "epochs")

    @property
    def fresh(self) -> int:
        """Samples of the policy after the training: those of one more update."""
        return self.episodes_per_update

    def _learn(self, env: ExpertBitsEnv, collect: BaseCallback, *, seed: int) -> Begin:
        from sb3_contrib import MaskablePPO

        steps = self.episodes_per_update * env.horizon
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
        model.learn(self.episodes * env.horizon, callback=collect)

        def begin(deterministic: bool) -> Act:
            return lambda seen: int(
                model.predict(seen, deterministic=deterministic, action_masks=env.action_masks())[
                    0
                ]
            )

        return begin
