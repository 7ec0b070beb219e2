"""The exact multiple-choice knapsack on measured sensitivities: the floor of every search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OneMapAgent
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class MckpAgent(OneMapAgent):
    """Evaluates the exact optimum of the linearised objective: one evaluation."""

    name: ClassVar[str] = "mckp"
    signal: ClassVar[str] = "sensitivity, exactly"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "Pisinger 1995"

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the knapsack's map, (D,)."""
        return problem.mckp()
