"""The empirical Fisher information of the loss times squared weight changes, on one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import by_decision, model_evaluator, solve_model
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class FisherAgent(AdditiveAgent):
    """Minimises ``sum_i g_i^2 dW_i^2`` over the whole model; one evaluation, and gradients.

    ``g`` is the loss's gradient with respect to a weight of an expert, ``dW`` what the format
    changes of it: LLM-MQ's and SqueezeLLM's second-order cost with the diagonal of the empirical
    Fisher for the Hessian; see :func:`dmpq.curvature.empirical_fisher`. Measured on the search's
    own text, at the cost of three forwards of it.
    """

    name: ClassVar[str] = "fisher"
    signal: ClassVar[str] = "squared gradients"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2306.07629"
    reads: ClassVar[str] = "nothing"

    @property
    def forwards(self) -> float:
        """What the gradients cost, in forwards of the search's text."""
        from dmpq.curvature import FISHER_COST

        return FISHER_COST

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the weighted squared weight changes, (D, B).

        Raises:
            InputError: If the problem's evaluator runs no model.
        """
        evaluator = model_evaluator(problem, self.name)
        from dmpq.curvature import empirical_fisher

        return by_decision(problem, empirical_fisher(evaluator))

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,)."""
        return solve_model(problem, values)
