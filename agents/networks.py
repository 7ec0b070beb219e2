"""The importance network, and the stable-baselines3 policy around it.

One small network is applied to every decision's feature row, so that it knows no model by name
and serves any number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn


@dataclass(frozen=True)
class NetworkShape:
    """Everything that is needed to build an :class:`ImportanceNetwork` again.

    Attributes:
        features: F, entries of a decision's feature row.
        context: C, entries of the problem's context.
        decisions: D, for which an embedding is learned; unused where ``embedding`` is 0.
        hidden: Width of the two hidden layers.
        embedding: Size of the embedding that each decision learns; 0 for none.
    """

    features: int
    context: int
    decisions: int
    hidden: int = 64
    embedding: int = 8


class ImportanceNetwork(nn.Module):
    """Maps feature rows and a pooled context to one log-importance per decision.

    The output layer starts at zero: the first proposal is the exact knapsack's.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * shape.features + shape.context + shape.embedding
        head = nn.Linear(shape.hidden, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.body = nn.Sequential(
            nn.Linear(width, shape.hidden),
            nn.Tanh(),
            nn.Linear(shape.hidden, shape.hidden),
            nn.Tanh(),
            head,
        )
        self.embedding = nn.Parameter(th.randn(shape.decisions, shape.embedding))

    def forward(self, rows: th.Tensor, context: th.Tensor) -> th.Tensor:
        """Return log-importances, (n, D).

        Args:
            rows: (n, D, F) feature rows. Where D is not the number the embedding was learned
                for, the embedding is left out (zeros).
            context: (n, C).
        """
        count, decisions, _ = rows.shape
        embedding: th.Tensor = self.embedding
        if decisions != len(embedding):
            embedding = embedding.new_zeros(decisions, embedding.shape[1])
        pooled = th.cat([rows.mean(1), context], dim=1)
        inputs = [
            rows,
            pooled[:, None].expand(-1, decisions, -1),
            embedding.expand(count, -1, -1),
        ]
        result: th.Tensor = self.body(th.cat(inputs, dim=2)).squeeze(2)
        return result


class AntitheticGaussian(DiagGaussianDistribution):
    """A diagonal Gaussian whose samples come in mirrored pairs around the mean."""

    def __init__(self, action_dim: int) -> None:
        super().__init__(action_dim)
        self._mirror: th.Tensor | None = None

    def sample(self) -> th.Tensor:
        """Return a fresh sample, or the mirror image of the one before."""
        mean, std = self.distribution.mean, self.distribution.stddev
        noise = -self._mirror if self._mirror is not None else th.randn_like(mean)
        self._mirror = noise if self._mirror is None else None
        return mean + noise * std


class _ActorCritic(nn.Module):
    """The importance network as actor, a linear function of the pooled rows as critic."""

    def __init__(self, shape: NetworkShape, log_scale: float) -> None:
        super().__init__()
        self.network = ImportanceNetwork(shape)
        self.critic = nn.Linear(shape.features + shape.context, 1)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        self._log_scale = log_scale

    def _split(self, observation: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        shape = self.network.shape
        size = shape.decisions * shape.features
        rows = observation[:, :size].reshape(-1, shape.decisions, shape.features)
        return rows, observation[:, size:]

    def forward(self, observation: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Return the mean action (n, D) and the value (n, 1)."""
        return self.forward_actor(observation), self.forward_critic(observation)

    def forward_actor(self, observation: th.Tensor) -> th.Tensor:
        """Return the mean action, (n, D)."""
        log_importance: th.Tensor = self.network(*self._split(observation))
        return log_importance / self._log_scale

    def forward_critic(self, observation: th.Tensor) -> th.Tensor:
        """Return the value, (n, 1)."""
        rows, context = self._split(observation)
        value: th.Tensor = self.critic(th.cat([rows.mean(1), context], dim=1))
        return value


class ImportancePolicy(ActorCriticPolicy):
    """PPO's policy for ``dmpq/ExpertBitsImportance-v0``: shared network, antithetic noise.

    Args:
        observation_space: The environment's flat box.
        action_space: The environment's box, (D,).
        lr_schedule: Learning rate over the remaining progress.
        shape: Sizes of the network.
        log_scale: Log-importance that an action of 1 stands for.
        std: Standard deviation of the exploration, in log-importance.
        imitation_rate: Learning rate of :meth:`imitate`.
        kwargs: Everything that :class:`ActorCriticPolicy` takes.
    """

    mlp_extractor: _ActorCritic  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        shape: NetworkShape,
        log_scale: float,
        std: float,
        imitation_rate: float = 3e-3,
        **kwargs: Any,
    ) -> None:
        self._shape = shape
        self._log_scale = log_scale
        self._std = std
        self._imitation_rate = imitation_rate
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = AntitheticGaussian(self._shape.decisions)
        self.mlp_extractor = _ActorCritic(self._shape, self._log_scale)
        self.action_net = nn.Identity()
        self.value_net = nn.Identity()  # type: ignore[assignment]
        self.log_std = nn.Parameter(th.zeros(1), requires_grad=False)
        self.set_std(self._std)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self.imitation_optimizer = self.optimizer_class(
            self.mlp_extractor.network.parameters(),
            lr=self._imitation_rate,  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def imitate(self, observation: th.Tensor, action: th.Tensor, *, steps: int) -> None:
        """Move the mean towards a target action, by least squares.

        Args:
            observation: (1, size).
            action: (1, D).
            steps: Steps of an optimizer of its own, so that PPO's keeps its moments.
        """
        for _ in range(steps):
            loss = (self.mlp_extractor.forward_actor(observation) - action).square().sum()
            self.imitation_optimizer.zero_grad()
            th.autograd.backward(loss)
            self.imitation_optimizer.step()

    def set_std(self, std: float) -> None:
        """Set the exploration's standard deviation, in log-importance."""
        self.log_std.fill_(std / self._log_scale).log_()

    @property
    def network(self) -> ImportanceNetwork:
        """The part that proposes: what a saved policy keeps."""
        return self.mlp_extractor.network
