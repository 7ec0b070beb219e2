"""The true trace of the loss's Hessian times squared weight changes (HAWQ-V2, MoPEQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import (
    by_decision,
    model_evaluator,
    solve_by_layer,
    solve_layer,
    solve_model,
)
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class _HessianAgent(AdditiveAgent):
    """What both have in common.

    The cost of expert e at width b is ``tr(H_e) / n_e * ||dW_eb||^2`` (HAWQ-V2, arXiv 1911.03852),
    ``H_e`` the Hessian of the language-model loss with respect to the expert's
    ``n_e`` weights, its trace by Hutchinson's method; see :func:`dmpq.curvature.hessian_trace`.

    MoPEQ (arXiv 2509.02512) describes such a trace as its sensitivity, layer-wise or model-wise.
    Its released code differentiates the weights' own norm instead, which gives the inverse norm
    and knows neither data nor loss; and it clusters experts without a budget. Here the Hessian is
    the loss's, and the exact program spends a budget. A trace below 0, which sampling or a model
    that is not at a minimum can give, counts as 0.

    Attributes:
        probes: Random vectors.
        probe_seed: Of the random vectors.
    """

    probes: int = 16
    probe_seed: int = 0

    @property
    def forwards(self) -> float:
        """What the traces cost, in forwards of the search's text."""
        from dmpq.curvature import hessian_cost

        return hessian_cost(self.probes)

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the mean trace times the squared weight change, (D, B).

        Raises:
            InputError: If the problem's evaluator runs no model.
        """
        evaluator = model_evaluator(problem, self.name)
        from dmpq.curvature import hessian_trace, squared_perturbation

        trace = hessian_trace(evaluator, probes=self.probes, seed=self.probe_seed)
        weights = [
            layer.expert_parameters / layer.num_experts for layer in problem.spec.moe_layers
        ]
        mean = np.maximum(trace, 0.0) / np.array(weights)[problem.spec.layer_of_expert]
        return by_decision(problem, mean[:, None] * squared_perturbation(evaluator.bank))


@dataclass(frozen=True, kw_only=True)
class HessianLayerAgent(_HessianAgent):
    """One program per layer, each on its own budget; one evaluation, and Hessian products."""

    name: ClassVar[str] = "hessian-layer"
    signal: ClassVar[str] = "Hessian trace, in layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 1911.03852"
    reads: ClassVar[str] = "nothing"

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,), layer by layer."""
        sizes = problem.sizes
        return solve_by_layer(problem, lambda m, budget: solve_layer(values[m], sizes[m], budget))


@dataclass(frozen=True, kw_only=True)
class HessianModelAgent(_HessianAgent):
    """One program for the whole model; one evaluation, and Hessian products."""

    name: ClassVar[str] = "hessian-model"
    signal: ClassVar[str] = "Hessian trace"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 1911.03852"
    reads: ClassVar[str] = "nothing"

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,)."""
        return solve_model(problem, values)
