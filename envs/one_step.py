"""Environments whose episode is one decision about the whole map."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Unpack

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.envs.base import ActType, BitMapEnv, EnvOptions, Step
from dmpq.envs.observation import Observation, box
from dmpq.problem import Scores


class OneStepEnv(BitMapEnv[ActType]):
    """Base: observe all rows and the context, act once, receive R."""

    def __init__(self, **options: Unpack[EnvOptions]) -> None:
        super().__init__(**options)
        problem = self.problem
        self._flat = np.concatenate([problem.features.ravel(), problem.context], dtype=np.float32)
        space: spaces.Space[Any] = (
            box(self._flat.size) if self._parts is None else self._parts.space()
        )
        self.observation_space = space

    @abstractmethod
    def _decide(self, action: NDArray[Any]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Return the map that the action stands for, and what ``info`` says of the way there."""

    @property
    def horizon(self) -> int:
        """Steps in an episode: one."""
        return 1

    def _begin(self, options: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        del options  # none are known
        return self._observe(None), {}

    def _step(self, action: NDArray[Any]) -> Step:
        self._map, details = self._decide(action)
        self._position = 1
        scores, reward, info = self._evaluate(self._map)
        info |= details | {"is_success": self._is_success(reward, info)}
        return self._observe(scores), reward, True, False, info

    def _observe(self, scores: Scores | None) -> Observation:
        if self._parts is None:
            return self._flat.copy()
        if scores is None:
            return self._parts.observe(self._map, np.array([0, 0, 0, 0, 1], dtype=np.float32))
        return self._named(scores)

    def _decided(self, position: int) -> int:
        return position * self.problem.num_decisions

    def _totals(self) -> tuple[float, ...]:
        return ()

    def _restore(self, totals: tuple[float, ...]) -> Observation:
        del totals
        known = self._parts is not None and self._position == 1
        return self._observe(self.score(self._map[None]) if known else None)
