"""DQN over single decisions: Q-learning with a network.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015, as
stable-baselines3 has it: one network and its target, no double, duelling or prioritised variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from dmpq.agents.episodes import Begin, EpisodeAgent, check_training, memoryless
from dmpq.envs.sequential import ExpertBitsEnv
from dmpq.errors import InputError

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

_TRAIN_EVERY: Final = 4
"""Decisions per step of gradient descent, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class DQNAgent(EpisodeAgent):
    """Searches with stable-baselines3's DQN on ``dmpq/ExpertBits-v0``.

    Trained and evaluated as MaskablePPO is (:mod:`dmpq.agents.episodes`). DQN knows no masks, so
    actions are projected, not restricted: the environment takes the nearest allowed format below
    one that is not, the replay buffer keeps the format asked for, and formats that lead to the
    same map learn the same value. Exploration is epsilon-greedy, and falls to its end over half of
    the training; the fresh samples explore at that end. Returns are not discounted.

    Attributes:
        episodes: Episodes of training.
        warmup: Episodes at random before the first update.
        exploration: Share of random decisions at the end.
        batch: Transitions per update.
        target_every: Episodes between two copies of the network to its target.
        learning_rate: Adam's step.
        fresh: Samples of the learned policy, at least.
    """

    name: ClassVar[str] = "dqn"
    signal: ClassVar[str] = "learned action values"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 1312.5602"

    episodes: int = 256
    warmup: int = 8
    exploration: float = 0.05
    batch: int = 64
    target_every: int = 4
    learning_rate: float = 5e-4
    fresh: int = 16

    def __post_init__(self) -> None:
        check_training(self, "episodes", "warmup", "batch", "target_every", "fresh")
        if not 0 <= self.exploration <= 1:
            raise InputError(f"exploration is {self.exploration}; it is a share, from 0 to 1.")

    def _learn(self, env: ExpertBitsEnv, collect: BaseCallback, *, seed: int) -> Begin:
        from stable_baselines3 import DQN

        steps = self.episodes * env.horizon
        model = DQN(
            "MlpPolicy",
            env,
            learning_rate=self.learning_rate,
            buffer_size=steps,
            learning_starts=self.warmup * env.horizon,
            batch_size=self.batch,
            gamma=1.0,
            train_freq=_TRAIN_EVERY,
            target_update_interval=self.target_every * env.horizon,
            exploration_fraction=0.5,
            exploration_final_eps=self.exploration,
            seed=seed,
            device="cpu",
        )
        model.learn(steps, callback=collect)
        return memoryless(model)
