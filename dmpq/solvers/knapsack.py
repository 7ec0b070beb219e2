"""The exact multiple-choice knapsack: one format per decision, least damage within a budget.

Minimise ``sum_d values[d, x_d]`` subject to ``sum_d sizes[d, x_d] <= capacity``. The method is
the classical one (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995,
sections 2 to 4): drop dominated choices, bound by the Lagrangian dual, and solve by dynamic
programming over the few choices whose reduced cost the bound does not rule out. Where the table
would be too large, HiGHS solves what is left. Where more than a thousand choices stay in doubt, as
happens with thousands of decisions of unequal sizes, a proven gap of 1e-6 is enough;
:meth:`Mckp.solve_proven` says how much is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FIRST_CORE: Final = 64
"""Choices beyond the dual's own with which the first table is built."""

_LARGE_CORE: Final = 1024
"""Choices beyond the dual's own from which on a proven gap of ``_CLOSE`` is enough."""

_CLOSE: Final = 1e-6
"""Share of the value by which a very large knapsack may miss the optimum."""

_MAX_TABLE: Final = 1 << 28
"""Largest table of choices, entries of one byte."""

_ROUNDING: Final = 1e-12
"""Differences below this share of the values' scale are rounding."""

_MIP_SCALE: Final = 1e4
"""Largest cost handed to HiGHS, whose absolute gap is 1e-6."""


def solve_mckp(values: Floats, sizes: Ints, capacity: int) -> Ints:
    """Return the best choice of each decision, int64 (D,).

    Args:
        values: (D, B), what each choice costs in the objective; smaller is better.
        sizes: (D, B), what each choice takes of the capacity, integers.
        capacity: Upper limit on the sum of the chosen sizes.

    Raises:
        InputError: If a value is not finite, or even the smallest choices do not fit.
    """
    return Mckp(sizes, capacity).solve(values)


def solve_mckp_multi(values: Floats, sizes: Ints, capacities: Sequence[int] | Ints) -> Ints:
    """Return the best choice of each decision under several linear limits at once, int64 (D,).

    Args:
        values: (D, B), what each choice costs in the objective.
        sizes: (C, D, B), what each choice takes of each limit.
        capacities: (C,), the limits.

    Raises:
        InputError: If a value is not finite, or no choice meets every limit.
    """
    rows = np.arange(len(values))
    for size, capacity in zip(sizes, capacities, strict=True):
        # A relaxation's optimum that meets the other limits too is the optimum.
        choice = solve_mckp(values, size, int(capacity))
        if (sizes[:, rows, choice].sum(1) <= capacities).all():
            return choice
    return solve_mip(values, sizes, capacities)


@dataclass(frozen=True, eq=False)
class Mckp:
    """One knapsack to be solved for many values; everything but the values is prepared once.

    Ties go to fewer bits.

    Attributes:
        sizes: (D, B), what each choice takes of the capacity, integers.
        capacity: Upper limit on the sum of the chosen sizes.
    """

    sizes: Ints
    capacity: int

    def __post_init__(self) -> None:
        smallest = int(self.sizes.min(1).sum())
        if smallest > self.capacity:
            raise InputError(
                f"A capacity of {self.capacity} is below {smallest}, the least that the "
                f"{len(self.sizes)} decisions can take; raise the limit or offer smaller formats."
            )

    @cached_property
    def _order(self) -> Ints:
        """Choices of each decision by size, (D, B)."""
        return np.argsort(self.sizes, axis=1, kind="stable")

    @cached_property
    def _sorted(self) -> Ints:
        """Sizes in increasing order, (D, B)."""
        return np.take_along_axis(self.sizes, self._order, axis=1)

    @cached_property
    def _reach(self) -> int:
        """The capacity, less what no sum of sizes can use."""
        least = int(self._sorted[:, 0].sum())
        unit = int(np.gcd.reduce(self._sorted - self._sorted[:, :1], axis=None)) or 1
        return least + (self.capacity - least) // unit * unit

    @cached_property
    def _pairs(self) -> tuple[Ints, Ints, Floats]:
        """Every pair of choices (smaller, larger), and the inverse of their size difference."""
        left, right = np.triu_indices(self.sizes.shape[1], k=1)
        steps = (self._sorted[:, right] - self._sorted[:, left]).astype(np.float64)
        with np.errstate(divide="ignore"):
            return left, right, np.where(steps > 0, 1 / steps, 0.0)

    def solve(self, values: Floats) -> Ints:
        """Return the best choice of each decision, int64 (D,).

        Args:
            values: (D, B), what each choice costs in the objective; smaller is better.

        Raises:
            InputError: If a value is not finite.
        """
        return self.solve_proven(values)[0]

    def solve_proven(self, values: Floats) -> tuple[Ints, float]:
        """Return the best choices, int64 (D,), and by how much they may miss the optimum.

        The second is the share of the value that the proof leaves open: 0, up to rounding, or up
        to 1e-6 where thousands of choices are so close that a table of them all would take long.
        Where HiGHS had to solve the core, its own gap of 1e-9 comes on top. Arguments and errors
        are those of :meth:`solve`.
        """
        by_size = self._by_size(values)
        choice, open_ = self._solve_sorted(by_size)
        rows = np.arange(len(values))
        value = abs(float(by_size[rows, choice].sum()))
        return self._order[rows, choice], max(open_, 0.0) / (value or 1.0)

    def bound(self, values: Floats) -> float:
        """Return what no map within the capacity is worth less than: the Lagrangian dual.

        The optimum is above it by the duality gap, which falls with the number of decisions and
        is none where the dual's own choices use the capacity up.

        Args:
            values: (D, B), what each choice costs in the objective; smaller is better.

        Raises:
            InputError: If a value is not finite.
        """
        by_size = self._by_size(values)
        if self._sorted[np.arange(len(values)), by_size.argmin(1)].sum() <= self.capacity:
            return float(by_size.min(1).sum())
        price = self._price(by_size, _undominated(by_size))
        return float((by_size + price * self._sorted).min(1).sum() - price * self._reach)

    def _by_size(self, values: Floats) -> Floats:
        """Return checked values in the order of their sizes, (D, B)."""
        if values.shape != self.sizes.shape:
            raise InputError(
                f"Values of shape {values.shape} do not match sizes of shape {self.sizes.shape}."
            )
        if not np.isfinite(values).all():
            raise InputError("The knapsack's values must be finite numbers; some are not.")
        return np.take_along_axis(np.asarray(values, np.float64), self._order, axis=1)

    def _solve_sorted(self, values: Floats) -> tuple[Ints, float]:
        """Return the best choices, and what the proof leaves open, in the values' unit."""
        sizes, rows = self._sorted, np.arange(len(values))
        kept = _undominated(values)
        lowest: Ints = values.argmin(1)
        if sizes[rows, lowest].sum() <= self.capacity:
            return lowest, 0.0
        price = self._price(values, kept)
        priced = np.where(kept, values + price * sizes, np.inf)
        least = priced.min(1)
        reduced = priced - least[:, None]
        bound = float(least.sum() - price * self._reach)
        scale = np.abs(least) + price * sizes[:, -1]
        slack = _ROUNDING * float(scale.sum())
        tied = reduced <= _ROUNDING * scale[:, None]
        reduced[rows, self._filled(tied)] = -1.0
        order = np.argsort(reduced, axis=None, kind="stable")
        count = len(values) + _FIRST_CORE
        while True:
            core = np.zeros(values.shape, bool)
            core.flat[order[:count]] = True
            core &= kept
            left_out = float(reduced.flat[order[count]]) if count < order.size else np.inf
            choice = _solve_core(values, core, sizes, self._reach)
            gap = float(values[rows, choice].sum()) - bound
            # A map with a choice outside the core is worse than the bound by what the cheapest
            # of them adds or more, so that a smaller gap proves this one optimal.
            if gap <= slack or gap < left_out - slack or np.isinf(left_out):
                return choice, min(gap, gap - left_out)
            # A better map has no choice that adds the gap or more. If the others must leave so
            # much of the capacity unused that this costs the gap, there is none.
            unused = price * self._unused_by(kept & (reduced < gap + slack))
            if gap <= unused + slack:
                return choice, gap - unused
            # It has a choice outside the core as well, since the core's own maps are no better.
            close = _CLOSE * abs(float(values[rows, choice].sum()))
            open_ = gap - unused - left_out
            if count - len(values) >= _LARGE_CORE and open_ <= close:
                return choice, open_
            count += 3 * (count - len(values))

    def _unused_by(self, allowed: NDArray[np.bool_]) -> int:
        """Return what sums of allowed choices' sizes, (D, B), must leave of the capacity."""
        smallest = np.take_along_axis(self._sorted, allowed.argmax(1)[:, None], axis=1)
        steps = np.where(allowed, self._sorted - smallest, 0)
        unit = int(np.gcd.reduce(steps, axis=None))
        spare = self._reach - int(smallest.sum())
        return spare % unit if unit else spare

    def _filled(self, tied: NDArray[np.bool_]) -> Ints:
        """Return choices, (D,), that use the capacity up among those that cost the same.

        Without ties these are the dual's own. Of experts that are all alike, half may be narrow
        and half wide at one price: any few of them, exchanged, then reach what is left.

        Args:
            tied: (D, B), the cheapest choices of each decision at the dual's price.
        """
        choice: Ints = tied.argmax(1)
        rows = np.arange(len(choice))
        spare = self._reach - int(self._sorted[rows, choice].sum())
        steps = np.where(tied, self._sorted - self._sorted[rows, choice][:, None], 0)
        most = steps.max(1)
        for row in np.argsort(-most, kind="stable")[: np.count_nonzero(most)].tolist():
            choice[row] = np.where(tied[row] & (steps[row] <= spare), steps[row], -1).argmax()
            spare -= int(steps[row, choice[row]])
        return choice

    def _price(self, values: Floats, kept: NDArray[np.bool_]) -> float:
        """Return the smallest price per unit of size at which the cheapest choices fit.

        The dual's breakpoints are slopes between two choices, so that a binary search over all
        slopes finds its maximum exactly.
        """
        left, right, inverse = self._pairs
        slopes = (values[:, left] - values[:, right]) * inverse
        slopes = np.sort(slopes[(slopes > 0) & kept[:, left] & kept[:, right]])
        sizes, rows = self._sorted, np.arange(len(values))
        masked = np.where(kept, values, np.inf)
        low, high = 0, len(slopes)
        while low < high:
            middle = (low + high) // 2
            choice = (masked + slopes[middle] * sizes).argmin(1)
            if sizes[rows, choice].sum() <= self._reach:
                high = middle
            else:
                low = middle + 1
        # Above the steepest slope every smallest choice wins.
        return float(slopes[low]) if low < len(slopes) else 2 * float(slopes[-1])


def _undominated(values: Floats) -> NDArray[np.bool_]:
    """Return which choices are better than all smaller ones, sizes increasing along each row."""
    kept = np.ones(values.shape, bool)
    kept[:, 1:] = values[:, 1:] < np.minimum.accumulate(values, axis=1)[:, :-1]
    return kept


def _solve_core(values: Floats, core: NDArray[np.bool_], sizes: Ints, capacity: int) -> Ints:
    """Solve over the choices of a core, sizes increasing along each row, (D,)."""
    smallest = core.argmax(1)
    rows = np.arange(len(values))
    spare = capacity - int(sizes[rows, smallest].sum())
    extra = np.where(core, sizes - sizes[rows, smallest][:, None], 0)
    open_rows = np.flatnonzero(core.sum(1) > 1)
    unit = int(np.gcd.reduce(extra[open_rows], axis=None)) or 1
    width = min(spare, int(extra.max(1).sum())) // unit + 1
    if width * len(open_rows) > _MAX_TABLE:
        return solve_mip(values, sizes[None], [capacity], allowed=core)
    choice: Ints = smallest
    table = np.empty((len(open_rows), width), np.int8)
    best = np.zeros(1)
    for step, row in zip(table, open_rows, strict=True):
        options = np.flatnonzero(core[row])
        best = _add_decision(best, values[row, options], extra[row, options] // unit, step)
    at = int(best.argmin())
    for i in range(len(open_rows) - 1, -1, -1):
        row = open_rows[i]
        choice[row] = np.flatnonzero(core[row])[table[i, at]]
        at -= int(extra[row, choice[row]]) // unit
    return choice


def _add_decision(best: Floats, values: Floats, units: Ints, chosen: NDArray[np.int8]) -> Floats:
    """Return the least value at every exact size once a decision is added.

    Args:
        best: (W,), least value of the decisions before, by exact size.
        values: (b,), of the decision's options.
        units: (b,), sizes of the options, increasing from 0.
        chosen: (W_max,), written: which option each size takes.
    """
    width = min(len(best) + int(units[-1]), len(chosen))
    totals = np.full((len(values), width), np.inf)
    for total, value, unit in zip(totals, values, units.tolist(), strict=True):
        reach = min(len(best), width - unit)
        if reach > 0:
            np.add(best[:reach], value, out=total[unit : unit + reach])
    choice = totals.argmin(0)
    chosen[:width] = choice
    least: Floats = totals[choice, np.arange(width)]
    return least


def solve_mip(
    values: Floats,
    sizes: Ints,
    capacities: Sequence[int] | Ints,
    *,
    allowed: NDArray[np.bool_] | None = None,
    covers: Sequence[NDArray[np.bool_]] = (),
) -> Ints:
    """Return the best choice of each decision by branch and bound (HiGHS), int64 (D,).

    Slower than :func:`solve_mckp`, and exact only to a gap of 1e-9, but for any limits.

    Args:
        values: (D, B), what each choice costs in the objective.
        sizes: (C, D, B), what each choice takes of each limit.
        capacities: (C,), the limits.
        allowed: (D, B), the choices on offer; ``None`` for all.
        covers: Sets of choices, (D, B) each, of which at least one must be taken.

    Raises:
        InputError: If no choice meets every limit and every cover.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    decisions, choices = values.shape
    if allowed is None:
        allowed = np.ones(values.shape, bool)
    cost = values - np.where(allowed, values, np.inf).min(1, keepdims=True)
    cost = np.where(allowed, cost, 0)
    cost *= _MIP_SCALE / (cost.max() or 1)
    one_each = kron(eye_array(decisions), np.ones((1, choices)))
    units = np.maximum(np.gcd.reduce(sizes.reshape(len(sizes), -1), axis=1), 1)
    result = milp(
        cost.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(
                sizes.reshape(len(sizes), -1) / units[:, None], ub=np.asarray(capacities) // units
            ),
            *(LinearConstraint(cover.reshape(1, -1).astype(float), lb=1) for cover in covers),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    if result.x is None:
        raise InputError(
            "No choice of formats meets all limits together; raise one of them or offer smaller "
            "formats."
        )
    chosen: Ints = result.x.reshape(values.shape).argmax(1)
    return chosen
