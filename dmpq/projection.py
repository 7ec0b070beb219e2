"""Projecting what an agent wants onto the limits: the map of least value that meets them all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.knapsack import Mckp, solve_mckp_multi

if TYPE_CHECKING:
    from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PRICE_STEP: Final = 8.0
_PRICE_STEPS: Final = 12
_BISECTIONS: Final = 10
_SPENT_AT_ONCE: Final = 64
"""Single changes that are priced in one call, and how many are made, when a budget is left."""

_MAX_SUBSETS: Final = 7
"""Menus up to this size are searched for the cheapest map over all subsets, others over pairs."""


class Projection:
    """The limits of a problem, as something to project onto.

    Exact for limits on bits and memory. Latency and energy do not add up (a launch per width):
    one multiplier prices their linearised shares, each relative to its limit, and is bisected
    until the full cost model agrees; what is left of a limit is spent greedily.

    Args:
        problem: Whose limits.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def project(self, values: Floats) -> Ints:
        """Return the map of least value within every limit, (D,).

        Exact for limits on bits and memory. Latency and energy do not add up: one multiplier
        prices their linearised shares, each relative to its limit, and is bisected until the full
        cost model agrees; what is left of a limit is spent greedily.

        Args:
            values: (D, B), what each format costs in the objective; smaller is better.
        """
        choice = self.solve(values)
        if self.priced and not self._problem.feasible(choice[None])[0]:
            choice = self._spend(values, self._priced_choice(values))
        return self._widen_unhit(values, choice)

    @property
    def priced(self) -> dict[str, Floats]:
        """Linearised shares of the limits that do not add up, relative to them: name → (D, B)."""
        linear = {
            "latency_s": self._problem.linear_latency,
            "energy_j": self._problem.linear_energy,
        }
        given = self._problem.constraints.given()
        return {name: linear[name] / given[name] for name in linear if name in given}

    @cached_property
    def _knapsack(self) -> Mckp:
        sizes, limits = self._problem.linear_limits
        if not len(limits):
            return Mckp(self._problem.sizes, int(self._problem.sizes.max(1).sum()))
        return Mckp(sizes[0], int(limits[0]))

    def solve(self, values: Floats) -> Ints:
        """Solve within the linear limits."""
        sizes, limits = self._problem.linear_limits
        if len(limits) > 1:
            return solve_mckp_multi(values, sizes, limits)
        return self._knapsack.solve(values)

    def _priced_choice(self, values: Floats) -> Ints:
        """Return the best map found within the limits that do not add up."""
        shares = sum(self.priced.values(), np.zeros(values.shape))
        found = list(self.cheapest)

        def fits(price: float) -> bool:
            choice = self.solve(values + price * shares)
            feasible = bool(self._problem.feasible(choice[None])[0])
            if feasible:
                found.append(choice)
            return feasible

        price = float(np.ptp(values, axis=1).sum() / np.ptp(shares, axis=1).sum())
        price = price / _PRICE_STEP ** (_PRICE_STEPS // 2) or 1.0
        for _ in range(_PRICE_STEPS):
            if fits(price):
                break
            price *= _PRICE_STEP
        low = price / _PRICE_STEP
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * price)
            low, price = (low, middle) if fits(middle) else (middle, price)
        maps = np.array(found)
        best: Ints = maps[
            np.take_along_axis(values[None], maps[:, :, None], 2).sum((1, 2)).argmin()
        ]
        return best

    def _spend(self, values: Floats, choice: Ints) -> Ints:
        """Make the single changes that lower the value most, as long as every limit is met."""
        choice, rows = choice.copy(), np.arange(len(choice))
        for _ in range(_SPENT_AT_ONCE):
            gain = values - values[rows, choice][:, None]
            order = np.argsort(gain, axis=None, kind="stable")[:_SPENT_AT_ONCE]
            order = order[gain.ravel()[order] < 0]
            maps = np.repeat(choice[None], len(order), axis=0)
            decisions, formats = np.unravel_index(order, gain.shape)
            maps[np.arange(len(order)), decisions] = formats
            possible = np.flatnonzero(self._problem.feasible(maps)) if len(maps) else order
            if not possible.size:
                break
            choice = maps[possible[0]]
        return choice

    def _widen_unhit(self, values: Floats, choice: Ints) -> Ints:
        """Widen experts that calibration never hit, in turn, by what nothing else can use."""
        sizes, limits = self._problem.linear_limits
        rows, order = (
            np.arange(len(choice)),
            np.argsort(self._problem.sizes, axis=1, kind="stable"),
        )
        waiting = self._problem.unhit.tolist()
        choice = choice.copy()
        spare = limits - sizes[:, rows, choice].sum(1)
        while waiting:
            still = []
            for row in waiting:
                here = choice[row]
                wider = order[row][int(np.flatnonzero(order[row] == here)[0]) + 1 :]
                if not wider.size or values[row, wider[0]] > values[row, here]:
                    continue
                taken = sizes[:, row, wider[0]] - sizes[:, row, here]
                moved = choice.copy()
                moved[row] = wider[0]
                if (taken > spare).any() or (
                    self.priced and not self._problem.feasible(moved[None])[0]
                ):
                    continue
                choice, spare = moved, spare - taken
                still.append(row)
            waiting = still
        return choice

    @cached_property
    def cheapest(self) -> Ints:
        """Feasible maps among the cheapest of every set of formats, (K, D); K may be 0."""
        maps = self.cheap_maps
        return maps[self._problem.feasible(maps)]

    @cached_property
    def cheap_maps(self) -> Ints:
        """The cheapest map of every set of formats, by linearised latency and energy, (K, D)."""
        sizes, limits = self._problem.linear_limits
        found = []
        for columns in _subsets(len(self._problem.menu)):
            part = sizes[:, :, columns]
            if (part.min(2).sum(1) > limits).any():
                continue
            for shares in self.priced.values():
                priced = shares[:, columns]
                try:
                    choice = (
                        solve_mckp_multi(priced, part, limits)
                        if len(limits)
                        else (priced.argmin(1))
                    )
                except InputError:
                    continue
                found.append(np.array(columns)[choice])
        return np.unique(np.array(found), axis=0)


def _subsets(formats: int) -> Iterable[list[int]]:
    """Yield every set of formats, or up to two at a time of long menus."""
    largest = formats if formats <= _MAX_SUBSETS else 2
    for count in range(1, largest + 1):
        for columns in combinations(range(formats), count):
            yield list(columns)
