"""Shadow prices: what one more unit of each limit would be worth, where losses add up.

Where limits on bits and memory decide alone, a price is the dual of the knapsack's linear
relaxation, exact to first order. Latency and energy come in lumps, a launch per width and layer,
and no slope says what more of them is worth: at the multiplier that meets a limit, whole layers
change at once. Where one of them decides, a price is the gain found when the limit is raised by a
tenth, per unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.evaluation import LossUnit
from dmpq.objective import shown
from dmpq.problem import Problem
from dmpq.solvers.limits import BITS_PER_BYTE, GIGABYTE
from dmpq.solvers.projection import Projection

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_UNITS: Final[Mapping[str, str]] = {
    "avg_bits": "effective_bit",
    "memory_bytes": "GB",
    "latency_s": "ms",
    "energy_j": "J",
}
_IN: Final[Mapping[str, float]] = {
    "avg_bits": 1.0,
    "memory_bytes": GIGABYTE,
    "latency_s": 1e-3,
    "energy_j": 1.0,
}
"""A unit, in that of the limit's name."""

_RAISED: Final = 0.1
"""Share by which a limit is raised where nothing adds up."""

_SAME: Final = 1e-9
"""Gains below this share of the values' range are rounding."""

_RELAXED: Final = 1e-6
"""Share by which a limit is relaxed before its dual is read: at a corner of the relaxation the
price of more is not that of less. It is less than any change of a map takes."""

_SCALE: Final = 1e3
"""Largest value handed to HiGHS, whose tolerances are absolute."""

_BISECTIONS: Final = 100

_KL: Final = LossUnit()


@dataclass(frozen=True)
class ShadowPrice:
    """What one unit more of a limit is worth.

    Attributes:
        limit: Its name, as in :class:`~dmpq.objective.Constraints`.
        unit: What a unit is: effective bit, GB, ms or J.
        active: Whether the reward would rise without the limit.
        loss: By how much the least loss falls, as the evaluator measures it, per unit.
        reward: By how much the reward rises, per unit.
        raised: Share by which the limit was raised to see it; 0 for a slope.
    """

    limit: str
    unit: str
    active: bool
    loss: float
    reward: float
    raised: float

    def to_json(self, lost: LossUnit = _KL) -> dict[str, Any]:
        """Return plain JSON values with the unit in their names.

        Args:
            lost: What the search makes small.
        """
        return {
            "active": self.active,
            f"{lost.unit}_per_{self.unit}": self.loss * lost.shown,
            f"reward_per_{self.unit}": self.reward,
            "raised_by": self.raised,
        }


@dataclass(frozen=True)
class _Worth:
    """Whether a limit binds, and what a unit more of it is worth in one objective."""

    active: bool
    price: float


def shadow_prices(problem: Problem) -> dict[str, ShadowPrice]:
    """Return the price of every limit of a problem, by name; 0 where it is not active."""
    rewards = problem.linear_values()
    projection = problem.projection
    slopes = bool(projection.feasible(projection.solve(rewards)[None])[0])
    price = _slopes if slopes else _gains
    by_reward, by_loss = price(problem, rewards), price(problem, problem.sensitivity)
    return {
        name: ShadowPrice(
            limit=name,
            unit=_UNITS[name],
            active=worth.active,
            loss=by_loss[name].price if worth.active else 0.0,
            reward=worth.price if worth.active else 0.0,
            raised=0.0 if slopes else _RAISED,
        )
        for name, worth in by_reward.items()
    }


def said(price: ShadowPrice, problem: Problem, lost: LossUnit = _KL) -> str:
    """Return one line on a limit: what it is, and what more of it is worth.

    Args:
        price: Of the limit.
        problem: That it limits.
        lost: What the search makes small.
    """
    value = problem.limits.given()[price.limit]
    own = value != problem.constraints.given().get(price.limit)
    flag, amount = shown(price.limit, value)
    name = f"the memory of {problem.hardware.name} ({amount} GB)" if own else f"{flag} {amount}"
    if not price.active:
        return f"{name} is not active"
    unit = price.unit.replace("_", " ")
    worth = f"{lost.amount(price.loss)}, {price.reward:.3g} reward per {unit}"
    if not price.raised:
        return f"{name} is active: {worth}"
    if not price.reward:
        return f"{name} is active, but {price.raised:.0%} more would bring nothing that was found"
    return f"{name} is active: {worth} over the next {price.raised:.0%}"


def _slopes(problem: Problem, values: Floats) -> dict[str, _Worth]:
    """Return the duals of the relaxation; limits that do not add up are met without a price."""
    projection = problem.projection
    duals = relaxation_prices(values, projection.exact, projection.limits)
    per_bit = dict(zip(projection.names, duals.tolist(), strict=True))
    return {
        name: _Worth(per_bit.get(name, 0.0) > 0, per_bit.get(name, 0.0) * _unit(problem, name))
        for name in problem.limits.given()
    }


def _gains(problem: Problem, values: Floats) -> dict[str, _Worth]:
    """Return what the best map found gains where a limit is raised, and whether without it."""
    projection, rows = problem.projection, np.arange(len(values))

    def least(onto: Projection) -> float:
        if not onto.possible:
            return math.inf
        return float(values[rows, onto.project(values)].sum())

    now, found = least(projection), {}
    rounding = _SAME * float(np.ptp(values, axis=1).sum())
    for name, limit in problem.limits.given().items():
        step = _RAISED * limit
        bits = round(step * _unit(problem, name) / _IN[name])
        gain = now - least(projection.relaxed(name, _RAISED, bits=bits))
        price = gain / step * _IN[name] if gain > rounding else 0.0
        active = price > 0 or now - least(projection.without(name)) > rounding
        found[name] = _Worth(active, price)
    return found


def _unit(problem: Problem, name: str) -> float:
    """Return how many stored bits a unit of a limit is."""
    return {"avg_bits": float(problem.num_weights)}.get(name, BITS_PER_BYTE * GIGABYTE)


def relaxation_prices(values: Floats, sizes: Ints, capacities: Ints) -> Floats:
    """Return by how much the relaxed knapsack's least value falls per unit of each limit, (C,).

    The dual variables of the linear relaxation, each where its limit is relaxed a little.

    Args:
        values: (D, B), what each choice costs in the objective.
        sizes: (C, D, B), what each choice takes of each limit.
        capacities: (C,), the limits; they can be met.
    """
    prices = np.zeros(len(sizes))
    rows, lowest = np.arange(len(values)), values.argmin(1)
    if (sizes[:, rows, lowest].sum(1) <= capacities).all():
        return prices
    if len(sizes) == 1:
        prices[0] = _dual_of_one(values, sizes[0], int(capacities[0]))
        return prices
    units = sizes.reshape(len(sizes), -1).max(1).astype(np.float64)
    cost = values - values.min(1, keepdims=True)
    scale = float(cost.max()) / _SCALE
    for i, unit in enumerate(units):
        limits = capacities / units
        limits[i] *= 1 + _RELAXED
        price = _dual(cost / scale, sizes / units[:, None, None], limits)[i]
        prices[i] = price * scale / unit if price > _SAME * _SCALE else 0.0
    return prices


def _dual_of_one(values: Floats, sizes: Ints, capacity: int) -> float:
    """Return the least price at which the cheapest choices fit: the slope towards more."""
    by_size = np.argsort(sizes, axis=1, kind="stable")
    ordered, rows = np.take_along_axis(values, by_size, 1), np.arange(len(values))
    taken = np.take_along_axis(sizes, by_size, 1)

    def fits(price: float) -> bool:
        choice = (ordered + price * taken).argmin(1)
        return bool(taken[rows, choice].sum() <= capacity)

    low, high = 0.0, float(np.ptp(values)) or 1.0
    while not fits(high):
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _dual(values: Floats, sizes: Floats, limits: Floats) -> Floats:
    """Return the dual variables of the relaxation, (C,)."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron

    decisions, choices = values.shape
    solved = linprog(
        values.ravel(),
        A_ub=csr_array(sizes.reshape(len(sizes), -1)),
        b_ub=limits,
        A_eq=kron(eye_array(decisions), np.ones((1, choices)), format="csr"),
        b_eq=np.ones(decisions),
        method="highs",
    )
    prices: Floats = -solved.ineqlin.marginals
    return prices
