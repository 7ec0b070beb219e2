"""Squared output error alone: what the F-norm ablations of MC-MoE and its followers minimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import by_decision, solve_by_layer, solve_layer, solve_model
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class ErrorLayerAgent(AdditiveAgent):
    """Least squared error of each layer's output, every layer on its own budget; one evaluation.

    Within one layer and with routing fixed, squared errors add up exactly for top-1 routing and
    nearly so else; norms, which MC-MoE and MxMoE add up, do not.
    """

    name: ClassVar[str] = "error-layer"
    signal: ClassVar[str] = "output error, in layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2410.06270"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the squared output errors, (D, B)."""
        return by_decision(problem, problem.profile.output_error)

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,), layer by layer."""
        sizes = problem.sizes
        return solve_by_layer(problem, lambda m, budget: solve_layer(values[m], sizes[m], budget))


@dataclass(frozen=True, kw_only=True)
class ErrorModelAgent(AdditiveAgent):
    """Least sum of all layers' squared output errors on one budget; one evaluation.

    The "naive global" program of GEMQ's ablation (arXiv 2605.23078): the residual stream grows
    with depth, and errors with it, so that the last layers take all bits. A control, not a rival.
    """

    name: ClassVar[str] = "error-model"
    signal: ClassVar[str] = "output error"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2410.06270"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the squared output errors, (D, B)."""
        return by_decision(problem, problem.profile.output_error)

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,)."""
        return solve_model(problem, values)
