"""Projecting what an agent wants onto the limits: the map of least value that meets them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.knapsack import Mckp, solve_mckp_multi

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Assignments = NDArray[np.integer]

_PRICE_STEP: Final = 8.0
_PRICE_STEPS: Final = 12
_BISECTIONS: Final = 10
_SPENT_AT_ONCE: Final = 64
"""Single changes that are priced in one call, and how many are made, when a budget is left."""

_MAX_SUBSETS: Final = 7
"""Menus up to this size are searched for the cheapest map over all subsets, others over pairs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Limits, as something to project onto.

    Exact for limits on bits and memory. Latency and energy do not add up (a launch per width):
    one multiplier prices their linearised shares, each relative to its limit, and is bisected
    until the full cost model agrees; what is left of a limit is spent greedily.

    Attributes:
        sizes: Stored bits of each decision in each format, (D, B).
        exact: What each format takes of each limit that adds up, (C, D, B).
        limits: These limits, (C,).
        priced: The limits that do not add up: name → linearised shares of them, (D, B).
        unhit: Decisions that calibration says nothing about.
        feasible: Says of maps, (K, D), whether they meet every limit, (K,).
    """

    sizes: Ints
    exact: Ints
    limits: Ints
    priced: Mapping[str, Floats]
    unhit: Ints
    feasible: Callable[[Assignments], NDArray[np.bool_]]

    def project(self, values: Floats) -> Ints:
        """Return the map of least value within every limit, (D,).

        Exact for limits on bits and memory. Latency and energy do not add up: one multiplier
        prices their linearised shares, each relative to its limit, and is bisected until the full
        cost model agrees; what is left of a limit is spent greedily.

        Args:
            values: (D, B), what each format costs in the objective; smaller is better.
        """
        choice = self.solve(values)
        if self.priced and not self.feasible(choice[None])[0]:
            choice = self._spend(values, self._priced_choice(values))
        return self._widen_unhit(values, choice)

    @cached_property
    def _knapsack(self) -> Mckp:
        if not len(self.limits):
            return Mckp(self.sizes, int(self.sizes.max(1).sum()))
        return Mckp(self.exact[0], int(self.limits[0]))

    def solve(self, values: Floats) -> Ints:
        """Return the map of least value within the limits that add up, (D,)."""
        if len(self.limits) > 1:
            return solve_mckp_multi(values, self.exact, self.limits)
        return self._knapsack.solve(values)

    def _priced_choice(self, values: Floats) -> Ints:
        """Return the best map found within the limits that do not add up."""
        shares = sum(self.priced.values(), np.zeros(values.shape))
        found = list(self.cheapest)

        def fits(price: float) -> bool:
            choice = self.solve(values + price * shares)
            feasible = bool(self.feasible(choice[None])[0])
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
            possible = np.flatnonzero(self.feasible(maps)) if len(maps) else order
            if not possible.size:
                break
            choice = maps[possible[0]]
        return choice

    def _widen_unhit(self, values: Floats, choice: Ints) -> Ints:
        """Widen experts that calibration never hit, in turn, by what nothing else can use."""
        order = np.argsort(self.sizes, axis=1, kind="stable")
        waiting = self.unhit.tolist()
        choice = choice.copy()
        spare = self.limits - self.exact[:, np.arange(len(choice)), choice].sum(1)
        while waiting:
            still = []
            for row in waiting:
                here = choice[row]
                wider = order[row][int(np.flatnonzero(order[row] == here)[0]) + 1 :]
                if not wider.size or values[row, wider[0]] > values[row, here]:
                    continue
                taken = self.exact[:, row, wider[0]] - self.exact[:, row, here]
                moved = choice.copy()
                moved[row] = wider[0]
                if (taken > spare).any() or (self.priced and not self.feasible(moved[None])[0]):
                    continue
                choice, spare = moved, spare - taken
                still.append(row)
            waiting = still
        return choice

    @cached_property
    def cheapest(self) -> Ints:
        """Feasible maps among the cheapest of every set of formats, (K, D); K may be 0."""
        maps = self.cheap_maps
        return maps[self.feasible(maps)]

    @cached_property
    def cheap_maps(self) -> Ints:
        """The cheapest map of every set of formats, by linearised latency and energy, (K, D)."""
        found = []
        for columns in _subsets(self.sizes.shape[1]):
            part = self.exact[:, :, columns]
            if (part.min(2).sum(1) > self.limits).any():
                continue
            for shares in self.priced.values():
                priced = shares[:, columns]
                try:
                    choice = (
                        solve_mckp_multi(priced, part, self.limits)
                        if len(self.limits)
                        else priced.argmin(1)
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
