"""Proof that limits cannot be met: a lower bound on a cost over all maps within other limits.

Limits are priced (a Lagrangian bound: any prices give one), and what then remains to be minimised
falls apart into layers. Of a layer and a set of formats, the power means of
:class:`~dmpq.hw_models.bounds.StepBound` are convex, and the Frank-Wolfe method, on shares of
experts instead of whole ones, gives a lower bound at every step (Jaggi, ICML 2013, section 2): any
vector of dual norm 1 turns the mean into a sum over experts, each of which then chooses by itself.
The least bound over all sets of formats, with their launches, is the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, pairwise, product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.decisions import Decisions, Floats, Ints
from dmpq.hw_models.bounds import Line, StepBound

_STEPS: Final = 32
"""Of the Frank-Wolfe method, where that is little work."""
_WORK: Final = 1e8
"""Products of numbers in one bound, above which fewer steps are made; at least :data:`_LEAST`."""
_LEAST: Final = 8
_PRICES: Final = np.logspace(-3, 3, 7)
"""At which a limit is priced first, relative to the target's own scale."""
_REFINED: Final = 4
"""Times that the best price is searched between its neighbours."""
_ROUNDS: Final = 2
_MAX_FORMATS: Final = 6
"""Menus of more formats are bounded over all formats at once, with the launch of one."""
_ROUNDING: Final = 1e-9
"""Share by which a bound is lowered, so that no rounding of sums disproves a map."""


@dataclass(frozen=True, eq=False)
class _Unit:
    """Decisions that share launches, at one or both projections.

    Attributes:
        decisions: (E,), which ones.
        times: (B, E, P, M), as in :class:`~dmpq.hw_models.bounds.StepBound`.
    """

    decisions: Ints
    times: Floats


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A problem's costs and limits, relaxed.

    Attributes:
        bound: What a step costs at least.
        decisions: What shares a format.
        exact: Limits that add up: name → what each format takes, (D, B), and the limit.
        priced: The others: ``latency_s`` and ``energy_j``, in their units.
        met: Maps that were met on the way, (D,) each: those that prices make best.
    """

    bound: StepBound
    decisions: Decisions
    exact: Mapping[str, tuple[Ints, int]]
    priced: Mapping[str, float]
    met: list[Ints] = field(default_factory=list)
    _known: dict[str, float] = field(default_factory=dict)

    def least(self, name: str) -> float:
        """Return what any map takes of a limit at least if it meets the others.

        In bits for limits that add up, in its unit for the others; infinite, or beyond all maps,
        where the others cannot be met together.
        """
        if name not in self._known:
            others = [other for other in (*self.exact, *self.priced) if other != name]
            cases = product(self._lines(name), *map(self._lines, others))
            self._known[name] = min(self._dual(target, rest, others) for target, *rest in cases)
        return self._known[name]

    @property
    def impossible(self) -> bool:
        """Whether it is proven that no map meets all limits."""
        names = (*self.exact, *self.priced)
        return any(self.least(name) > self._limit(name) for name in names)

    def without(self, name: str) -> Relaxation:
        """Return the relaxation of the other limits; maps met go on being kept together."""
        return replace(
            self,
            exact={other: limit for other, limit in self.exact.items() if other != name},
            priced={other: limit for other, limit in self.priced.items() if other != name},
            _known={},
        )

    def _lines(self, name: str) -> tuple[Line, ...]:
        """Return a cost's lines, whose linear part is by decision, (D, B)."""
        if name in self.exact:
            return (Line(0.0, self.exact[name][0].astype(np.float64), 0.0),)
        return tuple(
            Line(line.scale, self.decisions.summed(line.linear), line.constant)
            for line in self.bound.lines[name]
        )

    def _limit(self, name: str) -> float:
        return float(self.exact[name][1]) if name in self.exact else self.priced[name]

    def _dual(self, target: Line, rest: list[Line], others: list[str]) -> float:
        """Return the best bound over prices found, by search along one after the other."""
        limits = np.array([self._limit(name) for name in others])
        span = self._span(target)
        scales = np.array([span / max(self._span(line), 1e-300) for line in rest])
        prices = np.zeros(len(rest))

        def at(prices: Floats) -> float:
            scale, constant, linear = target.scale, target.constant, target.linear
            for price, line, limit in zip(prices.tolist(), rest, limits.tolist(), strict=True):
                scale += price * line.scale
                constant += price * (line.constant - limit)
                linear = linear + price * line.linear
            least = self._minimum(scale, linear)
            return least + constant - _ROUNDING * (abs(least) + abs(constant))

        best = at(prices)
        for _ in range(_ROUNDS if len(rest) > 1 else 1):
            for i in range(len(rest)):
                best, prices = self._along(i, at, prices, best, scales[i])
        return best

    def _along(
        self,
        i: int,
        at: Callable[[Floats], float],
        prices: Floats,
        best: float,
        scale: float,
    ) -> tuple[float, Floats]:
        """Return the best bound, and its prices, with one of the prices changed."""

        def tried(price: float) -> float:
            nonlocal best, prices
            moved = prices.copy()
            moved[i] = price
            value = at(moved)
            if value > best:
                best, prices = value, moved
            return value

        points = [(price, tried(price)) for price in (scale * _PRICES).tolist()]
        for _ in range(_REFINED):
            top = max(range(len(points)), key=lambda k: points[k][1])
            near = [points[k][0] for k in (top - 1, top, top + 1) if 0 <= k < len(points)]
            between = [float(np.sqrt(low * high)) for low, high in pairwise(near)]
            points = sorted([*points, *((price, tried(price)) for price in between)])
        return best, prices

    def _span(self, line: Line) -> float:
        """Return how much of a cost is at stake, roughly."""
        times = line.scale * float(np.ptp(self.bound.times.sum(3), axis=2).sum())
        return times + float(np.ptp(line.linear, axis=1).sum())

    @cached_property
    def _units(self) -> list[_Unit]:
        of, layer_of = self.decisions.of_projection, self.decisions.spec.layer_of_expert
        units = []
        for layer in np.unique(layer_of):
            experts = np.flatnonzero(layer_of == layer)
            together = (of[experts, 0] == of[experts, 1]).all()
            for projections in ([0, 1],) if together else ([0], [1]):
                own = of[experts, projections[0]]
                decisions, place = np.unique(own, return_inverse=True)
                times = np.zeros((len(decisions), len(projections), *self.bound.times.shape[2:]))
                np.add.at(times, place, self.bound.times[experts][:, projections])
                units.append(_Unit(decisions, np.moveaxis(times, 2, 0).copy()))
        return units

    def _minimum(self, scale: float, linear: Floats) -> float:
        """Return a lower bound on ``scale * T + linear`` over all maps; keeps the best map met.

        Args:
            scale: Not negative.
            linear: (D, B).
        """
        total, choice = 0.0, np.zeros(len(linear), np.int64)
        for unit in self._units:
            value, own = self._unit_minimum(unit, scale, linear[unit.decisions])
            total += value
            choice[unit.decisions] = own
        self.met.append(choice)
        return total

    def _unit_minimum(self, unit: _Unit, scale: float, linear: Floats) -> tuple[float, Ints]:
        """Return a lower bound on a unit's part, and the best choice met, (E,)."""
        if not scale or not unit.times.any():
            return float(linear.min(1).sum()), linear.argmin(1)
        alike, sets = self.bound.alike, np.array(list(self._sets()))
        formats, experts, projections, _ = unit.times.shape
        flat = unit.times.reshape(formats, experts, -1)
        launch = self.bound.launch_s
        launches = scale * projections * (sets * launch).sum(1)
        if len(sets) == 1:
            launches = np.array([scale * projections * launch.min()])
        allowed = sets[:, alike].T  # (B, S)
        costs = linear.T[:, None, :]  # (B, 1, E)
        barred = np.where(allowed, 0.0, np.inf)[:, :, None] + costs
        own = np.arange(formats)[:, None, None]
        shared = alike == np.arange(formats)[:, None]  # (B, B), what shares a format's launches

        def summed(shares: Floats) -> Floats:
            """Return the sums that shares (B, S, E) make, (B, S, P, M), alike formats together."""
            sums: Floats = np.tensordot(shared.astype(float), shares @ flat, 1)
            return sums.reshape(formats, len(sets), projections, -1)

        even = (allowed / allowed.sum(0))[:, :, None]
        sums = summed(np.broadcast_to(even, (formats, len(sets), experts)))
        best, met_value, met = np.full(len(sets), -np.inf), np.inf, linear.argmin(1)
        work = len(sets) * flat.size * len(self._units)
        for step in range(int(np.clip(_WORK / work, _LEAST, _STEPS))):
            mean = _power_mean(sums)[..., None]
            dual = np.divide(sums, mean, out=np.zeros_like(sums), where=sums > 0) ** 3
            duals = dual.reshape(formats, len(sets), -1)[alike]
            price = scale * (duals @ flat.transpose(0, 2, 1)) + barred
            best = np.maximum(best, price.min(0).sum(1))
            chosen = price.argmin(0)  # (S, E)
            vertex = (chosen == own).astype(float)
            corner = summed(vertex)
            values = (vertex * costs).sum((0, 2)) + scale * (
                _power_mean(corner).sum((0, 2))
                + ((corner > 0).any(3) * launch[:, None, None]).sum((0, 2))
            )
            if values.min() < met_value:
                met_value, met = float(values.min()), chosen[values.argmin()]
            sums = sums + 2 / (step + 2) * (corner - sums)
        return float((best + launches).min()), met

    def _sets(self) -> Iterator[NDArray[np.bool_]]:
        """Yield sets of formats that do not share launches, (B,) each, or all where many."""
        first = np.unique(self.bound.alike)
        formats = len(self.bound.alike)
        if len(first) > _MAX_FORMATS:
            yield np.isin(np.arange(formats), first)
            return
        for count in range(1, len(first) + 1):
            for chosen in combinations(first.tolist(), count):
                yield np.isin(np.arange(formats), chosen)


def _power_mean(sums: Floats) -> Floats:
    """Return the power mean of fourth powers over the last axis."""
    mean: Floats = np.sqrt(np.sqrt(np.square(np.square(sums)).sum(-1)))
    return mean
