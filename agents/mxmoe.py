"""MxMoE's program (arXiv 2505.05799, section 4): loss against time, ``L^r T^(1-r)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.programs import solve_by_layer, within_limits
from dmpq.errors import InputError, unknown
from dmpq.problem import Problem
from dmpq.solvers.knapsack import solve_mckp

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scope = Literal["layer", "model"]

_TINY: Final = 1e-9
"""Weight of the second objective where the first decides."""

_NO_LOSS: Final = 1e-12
"""Loss, as a share of the largest, below which maps count as lossless."""

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, eq=False)
class _Point:
    """A map and what it is worth."""

    choice: Ints
    loss: float
    time: float


@dataclass(frozen=True, eq=False)
class _Segment:
    """Two maps on the hull, and the weights (of loss, of time) that each of them minimises."""

    left: _Point
    right: _Point
    left_weights: tuple[float, float]
    right_weights: tuple[float, float]

    def corner(self) -> tuple[float, float]:
        """Return loss and time where the two supporting lines meet: no map is beyond."""
        (a, b), (c, d) = self.left_weights, self.right_weights
        first = a * self.left.loss + b * self.left.time
        second = c * self.right.loss + d * self.right.time
        determinant = a * d - b * c
        if determinant <= 0:
            return self.left.loss, self.right.time
        return (d * first - b * second) / determinant, (a * second - c * first) / determinant


def least_product(loss: Floats, time: Floats, solve: Callable[[Floats], Ints], r: float) -> Ints:
    """Return the map of least ``L^r T^(1-r)``, int64 (D,), L and T sums over decisions.

    Exact. ``r log L + (1-r) log T`` is concave, so that its minimum over maps lies at a corner of
    the convex hull of their points (L, T), and every corner is the optimum of a knapsack on a
    weighted sum of both. The hull is walked by dichotomy (Aneja and Nair, "Bicriteria
    transportation problem", 1979); a part whose supporting lines meet at a point no better than
    the best map is left out.

    Args:
        loss: (D, B), not negative.
        time: (D, B), positive.
        solve: Returns the map of least value, (D,), of values (D, B), among those allowed.
        r: Weight of the loss, in [0, 1].
    """
    loss_unit, time_unit = loss.max(1).sum() or 1.0, time.max(1).sum() or 1.0
    loss, time = loss / loss_unit, time / time_unit
    rows = np.arange(len(loss))

    def point(of_loss: float, of_time: float) -> _Point:
        choice = solve(of_loss * loss + of_time * time)
        return _Point(choice, float(loss[rows, choice].sum()), float(time[rows, choice].sum()))

    def score(of_loss: float, of_time: float) -> float:
        parts = ((r, of_loss), (1 - r, of_time))
        return sum(w * math.log(max(value, _NO_LOSS)) for w, value in parts if w)

    ends = point(1.0, _TINY), point(_TINY, 1.0)
    best = min(ends, key=lambda p: score(p.loss, p.time))
    open_ = [_Segment(*ends, (1.0, 0.0), (0.0, 1.0))]
    while open_:
        part = open_.pop()
        if score(*part.corner()) >= score(best.loss, best.time) - _ROUNDING:
            continue
        weights = (part.left.time - part.right.time, part.right.loss - part.left.loss)
        if min(weights) < 0 or max(weights) <= 0:
            continue
        weights = (weights[0] / max(weights), weights[1] / max(weights))
        found = point(*weights)
        least, known = (
            weights[0] * one.loss + weights[1] * one.time for one in (found, part.left)
        )
        best = min(best, found, key=lambda p: score(p.loss, p.time))
        if least < known - _ROUNDING * abs(known):
            open_.append(_Segment(part.left, found, part.left_weights, weights))
            open_.append(_Segment(found, part.right, weights, part.right_weights))
    return best.choice


@dataclass(frozen=True, kw_only=True)
class MxMoEAgent(AdditiveAgent):
    """Minimises ``L^r T^(1-r)`` within the budget; one evaluation.

    L is the summed loss of blocks and T the summed time; a block is a decision, so that
    ``serve="projection"`` gives the paper's granularity (gate and up share a format in its code,
    as they do here) and ``serve="expert"`` works on an expert's sums.

    Differences: the paper's loss of a block is the *norm* of the change in the decoder layer's
    output, which a profile does not have per projection; L is the sum of measured sensitivities,
    the KL when only this block is in a format, and T the problem's linearised time of each block,
    launches left out, at the workload's token counts. Weight-activation schemes and tile shapes
    are no choices here. The authors leave the program to a commercial solver.

    Attributes:
        r: Weight of the loss; the authors take 1, which ignores time, for low-bit weight-only
            schemes and 0.75 for others.
        scope: One program per layer on its share of the budget, as the released code has it, or
            one for the whole model.

    Raises:
        InputError: If ``r`` is outside [0, 1] or the scope is none.
    """

    name: ClassVar[str] = "mxmoe"
    signal: ClassVar[str] = "loss^r x time^(1-r)"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2505.05799"

    r: float = 0.75
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.r <= 1.0:
            raise InputError(f"MxMoE's r is {self.r}; it weighs loss against time, in [0, 1].")
        if self.scope not in get_args(Scope):
            raise unknown("scope", self.scope, get_args(Scope))

    def values(self, problem: Problem) -> Floats:
        """Return the measured sensitivities, nats per token, (D, B)."""
        return problem.sensitivity

    def solve(self, problem: Problem, values: Floats) -> Ints:
        """Return the map, (D,); losses below 0 count as none."""
        loss, time = np.maximum(values, 0.0), problem.linear_latency
        if self.scope == "model":
            found = least_product(loss, time, problem.projection.solve, self.r)
            return within_limits(problem, found)

        def solve(members: Ints, budget: int) -> Ints:
            sizes = problem.sizes[members]
            return least_product(
                loss[members],
                time[members],
                lambda values: solve_mckp(values, sizes, budget),
                self.r,
            )

        return solve_by_layer(problem, solve)
