"""PMQ, the bit allocation of MC-MoE (arXiv 2410.06270, section 3.2): one program per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import by_decision, solve_by_layer, solve_layer, wanted
from dmpq.problem import Problem

Floats = NDArray[np.float64]


def paper_values(
    frequency: Floats,
    weight: Floats,
    error: Floats,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
) -> Floats:
    """Return ``phi^alpha w^beta eps^gamma`` of a layer, (E, B): the paper's equation.

    Args:
        frequency: (E,), phi: how often each expert is selected.
        weight: (E,), w: routing weight given to each expert.
        error: (E, B), eps: Frobenius norm of what each width changes in the layer's output.
        alpha: Exponent of the frequency.
        beta: Exponent of the routing weight.
        gamma: Exponent of the error.
    """
    values: Floats = (frequency**alpha * weight**beta)[:, None] * error**gamma
    return values


def code_values(
    frequency: Floats, weight: Floats, error: Floats, *, alpha: float = 1.0, beta: float = 1.5
) -> Floats:
    """Return the values that the released solver minimises, (E, B).

    Frequency and routing weight are normalised to a sum of 1 within the layer, and the error is
    raised to ``alpha``: ``gamma`` is read but never used. A common factor of 1000 in the code
    changes no optimum. Arguments are those of :func:`paper_values`.
    """
    phi, w = (part / (part.sum() or 1.0) for part in (frequency, weight))
    return paper_values(phi, w, error, alpha=alpha, beta=beta, gamma=alpha)


@dataclass(frozen=True, kw_only=True)
class PmqPaperAgent(AdditiveAgent):
    """PMQ as published: ``gamma = 2``, all bits spent; one evaluation.

    Per layer, minimise ``sum phi_i^alpha w_i^beta eps_ib^gamma`` so that the bits sum to the
    layer's budget, with at least one 3-bit and one 2-bit expert.

    ``eps`` is a norm over all calibration tokens; the profile's ``output_error`` is the same
    norm's square over the number of tokens, so that ``eps^gamma`` is ``output_error^(gamma / 2)``
    up to a factor that all experts share.

    Differences: budgets are effective bits, scales included, so that "equal" means the largest
    sum of sizes that can be reached. Where a layer cannot pay for the floors they are dropped, the
    2-bit one first, and widths that are not on the menu are not asked for. The authors add up
    un-renormalised routing probabilities; the profile has those that the model multiplies by.
    Their error is that of the layer's output without shared experts, as the profile's.

    Attributes:
        alpha: Exponent of the frequency.
        beta: Exponent of the routing weight.
        gamma: Exponent of the error norm.
        at_least: Widths that every layer has at least once.
    """

    name: ClassVar[str] = "pmq-paper"
    signal: ClassVar[str] = "use x squared error"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2410.06270"
    reads: ClassVar[str] = "gradients"

    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    at_least: tuple[int, ...] = (3, 2)

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the values that the layers' programs minimise, (D, B)."""
        profile = problem.profile
        rows = paper_values(
            profile.frequency,
            profile.routing_weight,
            np.sqrt(profile.output_error),
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
        )
        return by_decision(problem, rows)

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,), layer by layer."""
        return _solved(problem, values, at_least=self.at_least, spend_all=True)


@dataclass(frozen=True, kw_only=True)
class PmqCodeAgent(AdditiveAgent):
    """PMQ as its released solver computes it: the error un-squared, bits at most the budget.

    See :func:`code_values` for what differs from the paper, and :class:`PmqPaperAgent` for what
    differs from the authors in both. The code adds up un-squared norms of calibration batches;
    the profile knows the norm over all tokens, ``sqrt(output_error)`` up to a common factor.
    With these values and exponents its shipped maps of Mixtral-8x7B are optimal.

    Attributes:
        alpha: Exponent of the frequency and of the error norm.
        beta: Exponent of the routing weight.
        at_least: Widths that every layer has at least once.
    """

    name: ClassVar[str] = "pmq-code"
    signal: ClassVar[str] = "use x output error"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2410.06270"
    reads: ClassVar[str] = "gradients"

    alpha: float = 1.0
    beta: float = 1.5
    at_least: tuple[int, ...] = (3, 2)

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the values that the layers' programs minimise, (D, B)."""
        profile = problem.profile
        rows = np.zeros(profile.output_error.shape)
        for layer in np.unique(problem.spec.layer_of_expert):
            own = problem.spec.layer_of_expert == layer
            rows[own] = code_values(
                profile.frequency[own],
                profile.routing_weight[own],
                np.sqrt(profile.output_error[own]),
                alpha=self.alpha,
                beta=self.beta,
            )
        return by_decision(problem, rows)

    def solve(self, problem: Problem, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the map, (D,), layer by layer."""
        return _solved(problem, values, at_least=self.at_least, spend_all=False)


def _solved(
    problem: Problem, values: Floats, *, at_least: tuple[int, ...], spend_all: bool
) -> NDArray[np.int64]:
    floors = wanted(problem, at_least)

    def solve(members: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
        return solve_layer(
            values[members],
            problem.sizes[members],
            budget,
            at_least=floors,
            spend_all=spend_all,
        )

    return solve_by_layer(problem, solve)
