"""Greedy widening: the step of most gain per stored bit first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent, objective
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GreedyAgent(AdditiveAgent):
    """Widens, from the smallest map on, where the surrogate gains most per stored bit.

    A step may skip formats, so that the steps follow the lower convex hull of each decision's
    curve of value against size (the greedy algorithm for the knapsack's linear relaxation, Zemel
    1980) and non-convex curves do no harm; it ends when no step that gains still fits. One
    evaluation.
    """

    name: ClassVar[str] = "greedy"
    signal: ClassVar[str] = "sensitivity, greedily"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "Zemel 1980"

    def values(self, problem: Problem) -> Floats:
        """Return the measured sensitivities, nats per token, (D, B)."""
        return problem.sensitivity

    def solve(self, problem: Problem, values: Floats) -> Ints:
        """Return the greedy map, (D,)."""
        choice = problem.project(problem.sizes.astype(np.float64))
        # The objective itself, and not to within rounding, unless something was measured again.
        own = None if values is problem.sensitivity else objective(problem, values)
        for widened in widenings(problem, choice, values=own):
            choice = widened
        return choice


def widenings(problem: Problem, choice: Ints, *, values: Floats | None = None) -> Iterator[Ints]:
    """Yield the maps (D,) of the greedy algorithm, step by step, from a map on.

    Args:
        problem: What is searched.
        choice: (D,), the map.
        values: (D, B), what each format costs; ``None`` for the linearised objective.
    """
    sizes = problem.sizes.astype(np.float64)
    values = problem.linear_values() if values is None else values
    rate = _rates(sizes, values, choice)
    while rate.any():
        row, fmt = np.unravel_index(int(rate.argmax()), rate.shape)
        moved = choice.copy()
        moved[row] = fmt
        if not problem.feasible(moved[None])[0]:
            # Steps only take room, so what does not fit now never will.
            rate[row, fmt] = 0.0
            continue
        choice = moved
        here = slice(row, row + 1)
        fits = rate[here] > 0
        rate[here] = np.where(fits, _rates(sizes[here], values[here], choice[here]), 0.0)
        yield choice


def gains_per_bit(problem: Problem, choice: Ints) -> Floats:
    """Return what the surrogate gains per stored bit by each format that is wider, (D, B).

    Zero for formats that are no wider, or that gain nothing.
    """
    return _rates(problem.sizes.astype(np.float64), problem.linear_values(), choice)


def _rates(sizes: Floats, values: Floats, choice: Ints) -> Floats:
    rows = np.arange(len(choice))
    extra = sizes - sizes[rows, choice][:, None]
    gain = values[rows, choice][:, None] - values
    rate: Floats = np.divide(gain, extra, out=np.zeros_like(gain), where=(extra > 0) & (gain > 0))
    return rate
