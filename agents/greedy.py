"""Greedy widening: the step of most gain per stored bit first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OneMapAgent
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class GreedyAgent(OneMapAgent):
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

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the greedy map, (D,)."""
        sizes, values = problem.sizes.astype(np.float64), problem.linear_values()
        choice = problem.project(sizes)
        rows = np.arange(len(choice))
        extra = sizes - sizes[rows, choice][:, None]
        gain = values[rows, choice][:, None] - values
        open_ = (extra > 0) & (gain > 0)
        rate = np.divide(gain, extra, out=np.zeros_like(gain), where=open_)
        while rate.any():
            row, fmt = np.unravel_index(int(rate.argmax()), rate.shape)
            moved = choice.copy()
            moved[row] = fmt
            if not problem.feasible(moved[None])[0]:
                # Steps only take room, so what does not fit now never will.
                rate[row, fmt] = 0.0
                continue
            fits = rate[row] > 0
            choice = moved
            extra = sizes[row] - sizes[row, fmt]
            gain = values[row, fmt] - values[row]
            wider = fits & (extra > 0) & (gain > 0)
            rate[row] = np.divide(gain, extra, out=np.zeros_like(gain), where=wider)
        return choice
