"""GEMQ's program (arXiv 2605.23078): gradient-weighted output errors on one global budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import by_decision, solve_model, wanted
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class GemqAgent(AdditiveAgent):
    """Minimises the profile's ``proxy`` over the whole model; one evaluation.

    The cost of expert e at width b is ``sum_t sum_d g_td^2 err_td^2``: the squared gradient of the
    loss at the layer's output times the squared change of that output when only this expert has
    this width, token by token and channel by channel (a diagonal Fisher at the output). Squares
    of loss gradients make layers comparable, so that one budget serves all.

    Differences: the authors take the gradient at the decoder layer's output, the profile at the
    experts' own; the residual sum makes them equal, except where a family norms or scales what
    its experts return. Budgets are effective bits, and shared experts are not counted in them.
    Floors that the limits cannot pay for are dropped, the 2-bit ones first. Router fine-tuning is
    no allocation and is left out. Progressive re-scoring, which measures the costs again on the
    model quantized with the last map, is ``rescore``: by true losses of single steps instead of
    new gradients, a profile being that of the full-precision model, and at one budget.

    Attributes:
        at_least: Widths that every layer has at least once; empty for none. The authors' menu is
            1, 2 and 3 bits, and they ask for the two widest.
    """

    name: ClassVar[str] = "gemq"
    signal: ClassVar[str] = "gradient x output error"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2605.23078"
    reads: ClassVar[str] = "gradients"

    at_least: tuple[int, ...] = (3, 2)

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the profile's proxy, (D, B)."""
        return by_decision(problem, problem.profile.proxy)

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,), with the floors."""
        return solve_model(problem, values, at_least=wanted(problem, self.at_least))
