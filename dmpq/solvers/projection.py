"""Projecting what an agent wants onto the limits: the map of least value that meets them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.solvers.knapsack import Mckp, solve_mckp_multi
from dmpq.solvers.launches import GroupMenus, launches_of
from dmpq.solvers.local_search import descended, improved
from dmpq.solvers.relaxation import Relaxation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Assignments = NDArray[np.integer]

_PRICE_STEP: Final = 8.0
_PRICE_STEPS: Final = 12
_BISECTIONS: Final = 16
_ROUNDS: Final = 3
"""Times that each multiplier is found anew for the others' last values."""

_ROOMS: Final = 4
"""Times that groups are given another room."""

_ROUNDING: Final = 0.5e-12
"""Share by which a cost may exceed its limit: half of what :mod:`dmpq.solvers.limits` forgives."""

_FACTORS: Final = (0.0, 0.25, 1.0, 4.0)
"""Of the multipliers, at which the best map of every set of formats is tried as well."""

_SOLVED: Final = 1 << 18
"""Decisions in all knapsacks that are solved for sets of formats."""

_STARTS: Final = 4
"""Best maps from which changes are tried."""

_MAX_SUBSETS: Final = 7
"""Menus up to this size are searched for the cheapest map over all subsets, others over pairs."""


@dataclass(frozen=True, eq=False)
class _Multipliers:
    """Prices of the limits that do not add up.

    Attributes:
        prices: Name → price of its whole limit, in the objective's unit; 0 where the limit does
            not bind, infinite where no price was found at which it is met.
        tried: Maps met on the way, (D,) each.
    """

    prices: Mapping[str, float]
    tried: list[Ints]


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Limits, as something to project onto.

    Exact for limits on bits and memory. Latency and energy do not add up (a launch per width):
    each has a multiplier that prices its linearised shares, relative to its limit, and each is
    bisected in turn until the full cost model agrees; maps found so, the best of every set of
    formats at those prices, and those of :mod:`dmpq.solvers.launches`, are then improved by single
    changes and exchanges, all of them checked against the full cost model.

    Attributes:
        sizes: Stored bits of each decision in each format, (D, B).
        names: The limits that add up.
        exact: What each format takes of each of them, (C, D, B).
        limits: These limits, (C,).
        priced: The limits that do not add up: name → linearised shares of them, (D, B).
        unhit: Decisions that calibration says nothing about.
        pruning: Positions of the pruned format and of the narrowest that is stored; ``None``
            where experts cannot be pruned.
        usage: Takes maps, (K, D), to what they take of each of the priced limits by the full cost
            model, as a share, (K, P).
        groups: Decisions of one number share launches, (D,).
        launch_values: What a format costs in the objective by being present in a group, (G, B);
            ``None`` where launches are not weighed.
        relaxation: The same limits, relaxed, where the hardware's costs can be bounded; its maps
            are tried where no other is found.
    """

    sizes: Ints
    names: tuple[str, ...]
    exact: Ints
    limits: Ints
    priced: Mapping[str, Floats]
    unhit: Ints
    usage: Callable[[Assignments], Floats]
    groups: Ints
    launch_values: Floats | None = None
    relaxation: Relaxation | None = None
    pruning: tuple[int, int] | None = None

    def project(self, values: Floats, *, formats: Flags | None = None) -> Ints:
        """Return the map of least value within every limit, (D,).

        Exact for limits on bits and memory; for others see the class.

        Args:
            values: (D, B), what each format costs; smaller is better.
            formats: (D, B), those that are worth their launches, where values are in the
                objective's unit so that launches count beside them: the best map of these alone
                is taken where it is better.
        """
        values = self._sparing_unhit(values)
        choice = self.solve(values)
        menus = self._group_menus if formats is None else self._weighed_menus
        if self.priced and not self.feasible(choice[None])[0]:
            choice = self._improved(values, menus)
        elif formats is not None:
            beyond = values.max() + float(np.ptp(values, axis=1).sum())
            both = np.array([choice, self.solve(np.where(formats, values, beyond))])
            choice = both[int(self._score(values, menus)(both).argmin())]
        return self._widen_unhit(values, choice)

    def worth_launching(self, values: Floats) -> Flags:
        """Return which formats the groups use in the best map found if launches count, (D, B).

        Uniform maps and those of groups' columns save launches, which values do not see; the best
        of these and of the knapsack's is improved by single changes.

        Args:
            values: (D, B), what each format costs in the objective.
        """
        menus, formats = self._weighed_menus, np.arange(values.shape[1])
        uniform = np.repeat(formats[:, None], len(values), axis=1)
        maps = np.array([self.solve(values), *uniform, *self._of_groups(values, menus)])
        score = self._score(values, menus)
        best = descended(maps[int(score(maps).argmin())], values, self.groups, score)
        used = np.array([(best == fmt) @ self._in_group > 0 for fmt in formats])
        worth: Flags = used[:, menus.groups].T
        return worth

    def _score(self, values: Floats, menus: GroupMenus) -> Callable[[Ints], Floats]:
        """Return what takes maps (K, D) to their value, launches included; infinite beyond."""
        rows, formats = np.arange(len(values)), np.arange(values.shape[1])

        def score(maps: Ints) -> Floats:
            total = values[rows, maps].sum(1)
            for group, worth in enumerate(menus.worth):
                inside = maps[:, menus.groups == group]
                total += (inside[:, :, None] == formats).any(1) @ worth
            return np.where(self.feasible(maps), total, np.inf)

        return score

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

    def _multipliers(self, values: Floats) -> _Multipliers:
        """Return the least price of each limit that does not add up, at which all are met.

        Each is bisected with the others fixed, a few times in turn: coordinate descent on the
        Lagrangian dual, with the full cost model as the judge of what is met.

        Args:
            values: (D, B), what each format costs in the objective; smaller is better.
        """
        shares = np.array([*self.priced.values()]).reshape(-1, *values.shape)
        count = len(shares)
        prices, tried = np.zeros(count), [self.solve(values)]
        met: NDArray[np.bool_] = self._met(tried[0])
        for turn in range(_ROUNDS if count > 1 else 1):
            for i in range(count):
                if turn or not met.all():
                    rest = np.where(np.isfinite(prices) & (np.arange(count) != i), prices, 0.0)
                    others = values + np.tensordot(rest, shares, 1)
                    prices[i] = self._least_price([i], others, shares[i], tried)
                    met = self._met(tried[-1])
        return _Multipliers(dict(zip(self.priced, prices.tolist(), strict=True)), tried)

    def _least_price(
        self, which: list[int], values: Floats, shares: Floats, tried: list[Ints]
    ) -> float:
        """Return the least price of some limits at which they are met; infinity for none.

        The maps that were tried are appended, last the one at the price returned.
        """

        def fits(price: float) -> bool:
            tried.append(self.solve(values + price * shares))
            return bool(self._met(tried[-1])[which].all())

        if fits(0.0):
            return 0.0
        span = float(np.ptp(shares, axis=1).sum())
        price = float(np.ptp(values, axis=1).sum()) / span if span else 0.0
        price = price / _PRICE_STEP ** (_PRICE_STEPS // 2) or 1.0
        for _ in range(_PRICE_STEPS):
            if fits(price):
                break
            price *= _PRICE_STEP
        else:
            return math.inf
        low, best = price / _PRICE_STEP, tried[-1]
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * price)
            if fits(middle):
                price, best = middle, tried[-1]
            else:
                low = middle
        tried.append(best)
        return price

    def _improved(self, values: Floats, menus: GroupMenus) -> Ints:
        """Return the best map found within the limits that do not add up."""
        found = self._multipliers(values)
        together: list[Ints] = []
        if len(self.priced) > 1:
            shares = sum(self.priced.values(), np.zeros(values.shape))
            self._least_price([*range(len(self.priced))], values, shares, together)
        subsets = self._of_subsets(values, found)
        by_group = self._of_groups(values, menus)
        maps = np.array([*self.cheapest, *found.tried, *together, *subsets, *by_group])
        maps = np.unique(maps, axis=0)
        maps = maps[self.feasible(maps)]
        score = self._score(values, menus)
        order = np.argsort(score(maps), kind="stable")[:_STARTS]
        starts = (improved(maps[k], values, self.groups, self._excess) for k in order)
        return min(starts, key=lambda choice: float(score(choice[None])[0]))

    def _of_groups(self, values: Floats, menus: GroupMenus) -> Iterable[Ints]:
        """Yield the best maps by groups, with as much room as the full cost model leaves them."""
        columns = menus.columns(values)
        room, fits, met = 1 - self._fixed_shares, None, set[bytes]()
        for _ in range(_ROOMS):
            found = menus.best(columns, room)
            if found is None or found.tobytes() in met:
                return
            yield found
            met.add(found.tobytes())
            left = 1 - self.usage(found[None])[0]
            if (left >= 0).all():
                fits = room
                room = room + left
            else:
                room = room + left if fits is None else (fits + room) / 2

    @cached_property
    def _group_menus(self) -> GroupMenus:
        """The limits as groups see them, launches included."""
        formats = self.sizes.shape[1]
        groups = np.unique(self.groups, return_inverse=True)[1]
        return GroupMenus(
            shares=self._shares,
            launches=launches_of(self.usage, self._shares, groups),
            worth=np.zeros((groups.max() + 1, formats)),
            taken=self.exact / np.maximum(self.limits, 1)[:, None, None],
            groups=groups,
            sets=np.array([np.isin(np.arange(formats), one) for one in _subsets(formats)]),
        )

    @cached_property
    def _weighed_menus(self) -> GroupMenus:
        """The same, with what launches cost in the objective."""
        worth = self.launch_values
        return self._group_menus if worth is None else replace(self._group_menus, worth=worth)

    @cached_property
    def _in_group(self) -> Floats:
        groups = self._group_menus.groups
        return np.eye(groups.max() + 1)[groups]

    @cached_property
    def _shares(self) -> Floats:
        return np.array([*self.priced.values()]).reshape(-1, *self.sizes.shape)

    @cached_property
    def _fixed_shares(self) -> Floats:
        """What is taken of the priced limits beside shares and launches, (P,), at the least."""
        menus, formats = self._group_menus, np.arange(self.sizes.shape[1])
        maps = np.repeat(formats[:, None], len(self.sizes), axis=1)
        known = menus.shares.sum(1) + menus.launches.sum(1)
        fixed: Floats = (self.usage(maps).T - known).min(1)
        return fixed

    def feasible(self, maps: Assignments) -> NDArray[np.bool_]:
        """Return whether maps (K, D) meet every limit, (K,)."""
        met: NDArray[np.bool_] = self._excess(maps) == 0
        return met

    def _excess(self, maps: Assignments) -> Floats:
        """Return by how much maps (K, D) exceed the limits, (K,); infinite for those that add up.

        Summed over the limits, as a share of each.
        """
        taken = self.exact[:, np.arange(maps.shape[1]), maps].sum(2)
        usage = self.usage(maps)
        over: Floats = np.where(usage > 1 + _ROUNDING, usage - 1, 0.0).sum(1)
        over[(taken > self.limits[:, None]).any(0)] = np.inf
        return over

    def _met(self, choice: Ints) -> NDArray[np.bool_]:
        """Return which of the limits that do not add up a map (D,) meets, (P,)."""
        met: NDArray[np.bool_] = self.usage(choice[None])[0] <= 1 + _ROUNDING
        return met

    def _of_subsets(self, values: Floats, found: _Multipliers) -> Iterable[Ints]:
        """Yield the best map of sets of formats at multiples of the multipliers, small sets first.

        A set without a width saves its launches, which no multiplier sees.
        """
        known = [p if math.isfinite(p) else 0.0 for p in found.prices.values()]
        shares = np.array([*self.priced.values()])
        left = _SOLVED // len(values)
        for columns in _subsets(values.shape[1]):
            part = self.exact[:, :, columns]
            if (part.min(2).sum(1) > self.limits).any():
                continue
            for factor in _FACTORS if any(known) else (0.0,):
                left -= 1
                if left < 0:
                    return
                priced = values + factor * np.tensordot(known, shares, 1)
                try:
                    yield np.array(columns)[self._solve_within(priced[:, columns], part)]
                except InputError:
                    break

    def _solve_within(self, values: Floats, exact: Ints) -> Ints:
        if not len(self.limits):
            lowest: Ints = values.argmin(1)
            return lowest
        return solve_mckp_multi(values, exact, self.limits)

    def _sparing_unhit(self, values: Floats) -> Floats:
        """Return values by which experts that calibration never hit are not pruned lightly.

        A width that is too narrow costs a text that hits them some accuracy, pruning all of it.
        So they lose by it what the median of the other decisions loses.
        """
        hit = np.setdiff1d(np.arange(len(values)), self.unhit)
        if self.pruning is None or not len(self.unhit) or not len(hit):
            return values
        pruned, narrowest = self.pruning
        lost = np.median(values[hit, pruned] - values[hit, narrowest])
        spared = values.copy()
        least = values[self.unhit, narrowest] + lost
        spared[self.unhit, pruned] = np.maximum(values[self.unhit, pruned], least)
        return spared

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
    def possible(self) -> bool:
        """Whether a map is known that meets every limit; exact for those that add up."""
        if self.priced:
            return len(self.cheapest) > 0
        try:
            self.solve(np.zeros(self.sizes.shape))
        except InputError:
            return False
        return True

    def without(self, name: str) -> Projection:
        """Return the projection onto the other limits."""
        relaxation = None if self.relaxation is None else self.relaxation.without(name)
        if name in self.names:
            at = self.names.index(name)
            return replace(
                self,
                relaxation=relaxation,
                names=tuple(other for other in self.names if other != name),
                exact=np.delete(self.exact, at, axis=0),
                limits=np.delete(self.limits, at),
            )
        at = [*self.priced].index(name)
        return replace(
            self,
            relaxation=relaxation,
            priced={other: shares for other, shares in self.priced.items() if other != name},
            usage=lambda maps: np.delete(self.usage(maps), at, axis=1),
        )

    def relaxed(self, name: str, share: float, *, bits: int = 0) -> Projection:
        """Return the projection with one limit raised.

        Args:
            name: Which.
            share: By how much, relative to it, where it does not add up.
            bits: By how much where it does.
        """
        if name in self.names:
            limits = self.limits.copy()
            limits[self.names.index(name)] += bits
            return replace(self, limits=limits, relaxation=None)
        factors = np.array([1 + share * (other == name) for other in self.priced])
        priced = zip(self.priced.items(), factors, strict=True)
        return replace(
            self,
            relaxation=None,
            priced={other: shares / factor for (other, shares), factor in priced},
            usage=lambda maps: self.usage(maps) / factors,
        )

    def least(self, name: str) -> Ints | None:
        """Return the map that takes least of one limit and meets the others, (D,).

        The least of all where none of the limits is priced, else the least that was found;
        ``None`` where no map is known that meets the others.
        """
        rest = self.without(name)
        if name in self.names:
            values = self.exact[self.names.index(name)].astype(np.float64)
            return rest.project(values) if rest.possible else None
        at, shares = [*self.priced].index(name), self.priced[name]

        def taken(maps: Ints) -> Floats:
            return np.where(rest.feasible(maps), self.usage(maps)[:, at], np.inf)

        maps = self.cheap_maps
        if rest.possible:
            maps = np.array([*maps, rest.project(shares)])
        if not len(maps):
            return None
        starts = maps[np.argsort(taken(maps), kind="stable")[:_STARTS]]
        starts = starts[np.isfinite(taken(starts))]
        found = [descended(one, shares, self.groups, taken) for one in starts]
        return min(found, key=lambda one: float(taken(one[None])[0]), default=None)

    @cached_property
    def cheapest(self) -> Ints:
        """Feasible maps among the cheapest of every set of formats, (K, D); K may be 0.

        Where none is and the relaxation does not disprove the limits, the one that takes least of
        one limit and meets the others may be, and the ones that exceed the limits least are made
        to exceed them less, those that the relaxation met last.
        """
        maps = self.cheap_maps
        if not len(maps):
            return maps
        feasible = maps[self.feasible(maps)]
        if len(feasible):
            return feasible
        if self.relaxation is not None and self.relaxation.impossible:
            return feasible
        shares = sum(self.priced.values(), np.zeros(self.sizes.shape))
        met = [] if self.relaxation is None else self.relaxation.met
        found = [one for one in map(self.least, self.priced) if one is not None]
        for starts in (maps, np.array(met, np.int64).reshape(-1, maps.shape[1])):
            nearest = np.unique(starts, axis=0)
            if len(nearest):
                order = np.argsort(self._excess(nearest), kind="stable")[:_STARTS]
                nearest = nearest[order]
            found += [descended(one, shares, self.groups, self._excess) for one in nearest]
            if not found:
                continue
            tried = np.unique(np.array(found), axis=0)
            feasible = tried[self.feasible(tried)]
            if len(feasible):
                break
        return feasible

    @cached_property
    def cheap_maps(self) -> Ints:
        """The cheapest map of every set of formats, by linearised latency and energy, (K, D)."""
        found = []
        for columns in _subsets(self.sizes.shape[1]):
            part = self.exact[:, :, columns]
            if (part.min(2).sum(1) > self.limits).any():
                continue
            for shares in self.priced.values():
                try:
                    choice = self._solve_within(shares[:, columns], part)
                except InputError:
                    continue
                found.append(np.array(columns)[choice])
        return np.unique(np.array(found, np.int64).reshape(-1, len(self.sizes)), axis=0)


def _subsets(formats: int) -> Iterable[list[int]]:
    """Yield every set of formats, or up to two at a time of long menus."""
    largest = formats if formats <= _MAX_SUBSETS else 2
    for count in range(1, largest + 1):
        for columns in combinations(range(formats), count):
            yield list(columns)
