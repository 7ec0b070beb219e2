"""The exact multiple-choice knapsack on measured sensitivities: the floor of every search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent, objective
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class MckpAgent(AdditiveAgent):
    """Evaluates the exact optimum of the linearised objective: one evaluation."""

    name: ClassVar[str] = "mckp"
    signal: ClassVar[str] = "sensitivity, exactly"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "Pisinger 1995"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the measured sensitivities, nats per token, (D, B)."""
        return problem.sensitivity

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the knapsack's map, (D,): the optimum of the linearised objective."""
        return problem.project_rewards(objective(problem, values))
