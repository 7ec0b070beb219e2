"""The same format for every expert: the baseline that every other allocation must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OneMapAgent
from dmpq.errors import InputError
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class UniformAgent(OneMapAgent):
    """Evaluates the largest uniform map within the limits: one evaluation."""

    name: ClassVar[str] = "uniform"
    signal: ClassVar[str] = "none"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "baseline"
    reads: ClassVar[str] = "gradients"

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the uniform map of most stored bits, (D,).

        Raises:
            InputError: If no uniform map meets the limits.
        """
        maps = np.stack([problem.uniform(key) for key in problem.menu.keys])
        stored = np.where(problem.feasible(maps), problem.effective_bits(maps), -1.0)
        if stored.max() < 0:
            raise InputError(
                f"None of the uniform maps of {', '.join(problem.menu.keys)} bits meets the "
                "limits; raise one of them, or take an agent that mixes formats."
            )
        widest: NDArray[np.int64] = maps[stored.argmax()]
        return widest
