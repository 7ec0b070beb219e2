"""A2C over single decisions: the plainest actor-critic.

Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML 2016 (arXiv 1602.01783),
in stable-baselines3's synchronous form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dmpq.agents.episodes import Begin, EpisodeAgent, check_training, memoryless
from dmpq.envs.sequential import ExpertBitsEnv

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback


@dataclass(frozen=True, kw_only=True)
class A2CAgent(EpisodeAgent):
    """Searches with stable-baselines3's A2C on ``dmpq/ExpertBits-v0``.

    Trained and evaluated as MaskablePPO is (:mod:`dmpq.agents.episodes`). A2C knows no masks: the
    environment takes the nearest allowed format below one that is not, and the policy is credited
    for what it asked for. One environment, not 16 at once, and no discount.

    Attributes:
        episodes: Episodes of training.
        steps: Decisions per update; the paper's 5.
        entropy: Weight of the policy's entropy; the paper's 0.01.
        learning_rate: RMSProp's step.
        fresh: Samples of the learned policy, at least.
    """

    name: ClassVar[str] = "a2c"
    signal: ClassVar[str] = "learned policy, masked"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 1602.01783"

    episodes: int = 256
    steps: int = 5
    entropy: float = 0.01
    learning_rate: float = 7e-4
    fresh: int = 16

    def __post_init__(self) -> None:
        check_training(self, "episodes", "steps", "fresh")

    def _learn(self, env: ExpertBitsEnv, collect: BaseCallback, *, seed: int) -> Begin:
        from stable_baselines3 import A2C

        model = A2C(
            "MlpPolicy",
            env,
            learning_rate=self.learning_rate,
            n_steps=self.steps,
            gamma=1.0,
            ent_coef=self.entropy,
            seed=seed,
            device="cpu",
        )
        model.learn(self.episodes * env.horizon, callback=collect)
        return memoryless(model)
