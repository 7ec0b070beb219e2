"""PPO with a memory over single decisions: an LSTM reads the decisions taken so far.

Schulman et al., arXiv 1707.06347, with the recurrent policy of sb3-contrib.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dmpq.agents.episodes import Begin, EpisodeAgent, check_training
from dmpq.envs.observation import Observation
from dmpq.envs.sequential import ExpertBitsEnv

if TYPE_CHECKING:
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOAgent(EpisodeAgent):
    """Searches with sb3-contrib's RecurrentPPO on ``dmpq/ExpertBits-v0``.

    Trained and evaluated as MaskablePPO is (:mod:`dmpq.agents.episodes`). The recurrent policy
    knows no masks: the environment takes the nearest allowed format below one that is not, and
    the policy is credited for what it asked for.

    Attributes:
        episodes: Episodes of training.
        episodes_per_update: Episodes between two updates.
        epochs: Passes over the experience per update.
        hidden: Width of the LSTMs, the actor's and the critic's.
        learning_rate: Adam's step.
    """

    name: ClassVar[str] = "recurrent-ppo"
    signal: ClassVar[str] = "learned policy, LSTM"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 1707.06347"

    episodes: int = 256
    episodes_per_update: int = 16
    epochs: int = 4
    hidden: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_training(self, "episodes", "episodes_per_update", "epochs", "hidden")

    @property
    def fresh(self) -> int:
        """Samples of the policy after the training: those of one more update."""
        return self.episodes_per_update

    def _learn(self, env: ExpertBitsEnv, collect: BaseCallback, *, seed: int) -> Begin:
        from sb3_contrib import RecurrentPPO

        steps = self.episodes_per_update * env.horizon
        model = RecurrentPPO(
            "MlpLstmPolicy",
            env,
            learning_rate=self.learning_rate,
            n_steps=steps,
            batch_size=steps // 4 if steps % 4 == 0 else steps,
            n_epochs=self.epochs,
            gamma=1.0,
            seed=seed,
            device="cpu",
            policy_kwargs={"lstm_hidden_size": self.hidden},
        )
        model.learn(self.episodes * env.horizon, callback=collect)
        return lambda deterministic: _Remembering(model, deterministic=deterministic)


class _Remembering:
    """Acts through one episode, and keeps the LSTM's state meanwhile."""

    def __init__(self, model: RecurrentPPO, *, deterministic: bool) -> None:
        self._model = model
        self._deterministic = deterministic
        self._state: tuple[np.ndarray, ...] | None = None

    def __call__(self, observation: Observation) -> int:
        first = np.array([self._state is None])
        action, self._state = self._model.predict(
            observation,
            state=self._state,
            episode_start=first,
            deterministic=self._deterministic,
        )
        return int(action)
