"""Improving a map step by step where its true cost does not add up: changes, and exchanges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Score = Callable[[Ints], Floats]
"""Takes maps, (K, D), to what is to be lowered, (K,); infinite for maps that may not be."""

_CHANGES: Final = 64
"""Changes that are tried in one call, and how many are made."""
_EXCHANGED: Final = 16
"""Changes of either kind whose pairs are tried in one call."""


@dataclass(frozen=True, eq=False)
class _Change:
    """Some decisions that get one format.

    Attributes:
        value: What the objective, which adds up, changes by.
        decisions: Which ones.
        index: The format's place on the menu.
    """

    value: float
    decisions: Ints
    index: int


def improved(choice: Ints, values: Floats, groups: Ints, allowed: Score) -> Ints:
    """Return a map of lower value that is still allowed, (D,).

    The changes that lower the value most are tried first, each by itself and then, where none is
    allowed, together with one that raises it by less.

    Args:
        choice: An allowed map, (D,).
        values: What each format adds to the value, (D, B).
        groups: Decisions of one number share launches, (D,).
        allowed: 0 for the maps that are.
    """
    for _ in range(_CHANGES):
        lower, raising = _split(_changes(choice, values, groups))
        better = _first(choice, [(one,) for one in lower[:_CHANGES]], allowed)
        if better is None:
            better = _first(choice, list(_exchanges(lower, raising)), allowed)
        if better is None:
            break
        choice = better
    return choice


def descended(choice: Ints, values: Floats, groups: Ints, score: Score) -> Ints:
    """Return a map of a lower score than the given one's, or that one, (D,).

    Steepest descent; which changes are tried is decided by values that add up.

    Args:
        choice: A map, (D,).
        values: What each format adds to the score, roughly, (D, B).
        groups: Decisions of one number share launches, (D,).
        score: What is to be lowered.
    """
    at = float(score(choice[None])[0])
    for _ in range(_CHANGES):
        changes = sorted(_changes(choice, values, groups), key=lambda one: one.value)
        lower, raising = _split(changes)
        pairs = list(_exchanges(lower, raising))
        maps = _maps(choice, [*((one,) for one in changes[: 4 * _CHANGES]), *pairs])
        if not len(maps):
            break
        scores = score(maps)
        best = int(scores.argmin())
        if not scores[best] < at:
            break
        choice, at = maps[best], float(scores[best])
    return choice


def _changes(choice: Ints, values: Floats, groups: Ints) -> Iterator[_Change]:
    """Yield changes of one decision, of a whole group, and of what of a group is in one format."""
    rows, formats = np.arange(len(choice)), range(values.shape[1])
    gain = values - values[rows, choice][:, None]
    order = np.argsort(gain, axis=None, kind="stable")
    decisions, indices = np.unravel_index(order, gain.shape)
    moving = np.flatnonzero(choice[decisions] != indices)
    lower = int((gain.ravel()[order[moving]] < 0).sum())
    for at in moving[
        [*range(min(lower, 4 * _CHANGES)), *range(lower, len(moving))][: 8 * _CHANGES]
    ]:
        row, index = int(decisions[at]), int(indices[at])
        yield _Change(float(gain[row, index]), decisions[at : at + 1], index)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) == 1:
            continue
        present = np.unique(choice[members])
        for index in formats:
            if len(present) > 1 or present[0] != index:
                yield _Change(float(gain[members, index].sum()), members, index)
            for here in present if len(present) > 1 else ():
                part = members[choice[members] == here]
                if here != index and len(part) > 1:
                    yield _Change(float(gain[part, index].sum()), part, index)


def _split(changes: Iterator[_Change] | list[_Change]) -> tuple[list[_Change], list[_Change]]:
    """Return the changes that lower the value, the best first, and the others, likewise."""
    ranked = sorted(changes, key=lambda one: one.value)
    return [c for c in ranked if c.value < 0], [c for c in ranked if c.value >= 0]


def _exchanges(lower: list[_Change], raising: list[_Change]) -> Iterator[tuple[_Change, _Change]]:
    """Yield pairs that lower the value together, the best first."""
    pairs = product(lower[:_EXCHANGED], raising[:_EXCHANGED])
    better = [pair for pair in pairs if pair[0].value + pair[1].value < 0]
    for one, other in sorted(better, key=lambda pair: pair[0].value + pair[1].value):
        if not np.isin(one.decisions, other.decisions).any():
            yield one, other


def _maps(choice: Ints, moves: list[tuple[_Change, ...]]) -> Ints:
    maps = np.repeat(choice[None], len(moves), axis=0)
    for one, move in zip(maps, moves, strict=True):
        for change in move:
            one[change.decisions] = change.index
    return maps


def _first(choice: Ints, moves: list[tuple[_Change, ...]], allowed: Score) -> Ints | None:
    if not moves:
        return None
    maps = _maps(choice, moves)
    possible = np.flatnonzero(allowed(maps) == 0)
    return maps[possible[0]] if possible.size else None
