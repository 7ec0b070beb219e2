"""Maps for limits under which launches count: each group chooses among maps of its own.

Decisions that share launches form a group, such as a layer, and each format that a group uses
costs a launch, however few of its decisions take it. Prices on single decisions cannot see that.
At given prices of the limits, though, what is to be minimised falls apart into groups, and within
a group and a set of formats into decisions: each set's best is a column of the group. One column
per group is then chosen (the decomposition of Dantzig and Wolfe, Operations Research 1960, with
columns at many prices instead of generated ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_PRICES: Final = 64
"""Of one limit; of limits of both kinds, so many pairs of prices."""
_WORK: Final = 1e7
"""Numbers looked at, of columns and of the beam, above which either is made smaller."""
_LEAST_PRICES: Final = 3
_BEAM: Final = 4096
_LEAST_BEAM: Final = 64
"""Choices that are followed while columns are chosen."""


def launches_of(usage: Callable[[Ints], Floats], shares: Floats, groups: Ints) -> Floats:
    """Return what each format takes by being present in each group, (P, G, B), at least 0.

    What a decision of the group takes in a format that no other has, beyond its own share.

    Args:
        usage: Takes maps, (K, D), to what they take, (K, P).
        shares: What each format of a decision takes by itself, (P, D, B).
        groups: The group of each decision, (D,).
    """
    formats = np.arange(shares.shape[2])
    others = np.roll(formats, -1)
    uniform = np.repeat(others[:, None], shares.shape[1], axis=1)
    without = usage(uniform).T
    found = []
    for row in np.unique(groups, return_index=True)[1].tolist():
        maps = uniform.copy()
        maps[:, row] = formats
        found.append(usage(maps).T - without + shares[:, row, others] - shares[:, row])
    launches: Floats = np.maximum(np.stack(found, axis=1), 0.0)
    return launches


@dataclass(frozen=True, eq=False)
class Columns:
    """What a group of E decisions may hold, K columns.

    Attributes:
        contents: Formats, (K, E).
        worth: In the objective, (K,).
        uses: Of each limit, (P + C, K).
    """

    contents: Ints
    worth: Floats
    uses: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupMenus:
    """Limits as groups of decisions see them; all of them as shares of the limit.

    Attributes:
        shares: What each format takes of each limit that does not add up, (P, D, B).
        launches: What a format takes of these by being present in a group, (P, G, B).
        worth: What it costs in the objective by that, (G, B).
        taken: What each format takes of each limit that adds up, (C, D, B).
        groups: The group of each decision, numbered from 0, (D,).
        sets: Sets of formats that a group may use, (S, B).
    """

    shares: Floats
    launches: Floats
    worth: Floats
    taken: Floats
    groups: Ints
    sets: Flags

    def columns(self, values: Floats) -> list[Columns]:
        """Return what each group may hold: the best of each set of formats at many prices.

        Args:
            values: (D, B), what each format costs in the objective; smaller is better.
        """
        return [self._columns(values, group) for group in range(len(self._members))]

    def best(self, columns: Sequence[Columns], room: Floats) -> Ints | None:
        """Return the map of least value found that is made of columns, (D,); ``None`` for none.

        Args:
            columns: Of each group.
            room: (P,), how much of each limit that does not add up may be taken by shares and
                launches.
        """
        limits = np.concatenate([room, np.ones(len(self.taken))])
        chosen = _cheapest(columns, limits)
        if chosen is None:
            return None
        choice = np.empty(len(self.groups), np.int64)
        for members, one, column in zip(self._members, columns, chosen.tolist(), strict=True):
            choice[members] = one.contents[column]
        return choice

    @cached_property
    def _members(self) -> list[Ints]:
        return [np.flatnonzero(self.groups == group) for group in range(len(self.worth))]

    def _columns(self, values: Floats, group: int) -> Columns:
        """Return what a group may hold: the best of each set of formats at many prices."""
        members = self._members[group]
        own, shares = values[members], self.shares[:, members].sum(0)
        taken = self.taken[:, members].sum(0)
        grid = min(_WORK / (len(self.sets) * values.size), _PRICES)
        both = len(self.shares) > 0 and len(self.taken) > 0
        count = max(int(grid**0.5 if both else grid), _LEAST_PRICES)
        barred = np.where(self.sets, 0.0, np.inf)[:, None, :] + own
        found = [
            (barred + price * shares + other * taken).argmin(2)
            for price in self._prices(own, shares, count)
            for other in (self._prices(own, taken, count) if len(self.taken) else (0.0,))
        ]
        contents = np.unique(np.concatenate(found), axis=0)
        rows = members[None].repeat(len(contents), 0)
        present = (contents[:, :, None] == np.arange(values.shape[1])).any(1)
        priced = self.shares[:, rows, contents].sum(2) + self.launches[:, group] @ present.T
        uses = np.concatenate([priced, self.taken[:, rows, contents].sum(2)])
        worth = values[rows, contents].sum(1) + present @ self.worth[group]
        kept = _undominated(np.concatenate([worth[None], uses]))
        return Columns(contents[kept], worth[kept], uses[:, kept])

    def _prices(self, values: Floats, taken: Floats, count: int) -> Iterator[float]:
        """Yield prices at which decisions weigh what they take against their values.

        Between those at which a decision would exchange one format for another: there the best
        maps change, and nowhere else.

        Args:
            values: (E, B).
            taken: (E, B), of one limit.
            count: Prices at most, beside 0.
        """
        first, second = np.triu_indices(values.shape[1], 1)
        saved = taken[:, first] - taken[:, second]
        lost = values[:, second] - values[:, first]
        changes = np.unique((lost[saved != 0] / saved[saved != 0]).clip(0.0))
        yield 0.0
        between = np.append((changes[:-1] + changes[1:]) / 2, 2 * changes[-1:])
        chosen = np.linspace(0, len(between) - 1, min(count, len(between)))
        yield from between[chosen.round().astype(np.int64)].tolist()


def _cheapest(columns: Sequence[Columns], limits: Floats) -> Ints | None:
    """Return one column per group, (G,), of small total worth within limits (M,); or ``None``.

    A beam search over groups in turn, ranked by worth and uses at the prices of the program's
    linear relaxation, which also says whether there is a solution at all.
    """
    prices = _prices_of_relaxation(columns, limits)
    if prices is None:
        return None
    beam = int(np.clip(_WORK / sum(len(one.worth) for one in columns), _LEAST_BEAM, _BEAM))
    least = np.array([one.uses.min(1) for one in columns])
    after = np.cumsum(least[::-1], axis=0)[::-1] - least  # what later groups take at least
    worth, used, taken = np.zeros(1), np.zeros((1, len(limits))), np.zeros((1, 0), np.int64)
    for one, rest in zip(columns, after, strict=True):
        cost = (worth[:, None] + one.worth[None]).ravel()
        total = (used[:, None] + one.uses.T[None]).reshape(len(cost), len(limits))
        fits = np.flatnonzero((total + rest <= limits).all(1))
        rank = cost[fits] + total[fits] @ prices
        kept = fits[np.argsort(rank, kind="stable")[:beam]]
        state, column = np.divmod(kept, len(one.worth))
        worth, used = cost[kept], total[kept]
        taken = np.concatenate([taken[state], column[:, None]], axis=1)
    if not len(worth):
        return None
    best: Ints = taken[worth.argmin()]
    return best


def _prices_of_relaxation(columns: Sequence[Columns], limits: Floats) -> Floats | None:
    """Return the limits' prices, (M,), where columns may be mixed; ``None`` where none meet."""
    from scipy.optimize import linprog
    from scipy.sparse import block_diag

    if not len(limits):
        return np.zeros(0)
    found = linprog(
        np.concatenate([one.worth for one in columns]),
        A_ub=np.concatenate([one.uses for one in columns], axis=1),
        b_ub=limits,
        A_eq=block_diag([np.ones((1, len(one.worth))) for one in columns], format="csr"),
        b_eq=np.ones(len(columns)),
    )
    return None if found.x is None else -np.asarray(found.ineqlin.marginals, np.float64)


def _undominated(costs: Floats) -> Ints:
    """Return those of K columns to which no other is equal or better in everything, of (M, K)."""
    order = np.lexsort(costs[::-1])
    kept: list[int] = []
    for one in order.tolist():
        if not (costs[:, kept] <= costs[:, one : one + 1]).all(0).any():
            kept.append(one)
    return np.array(kept, np.int64)
