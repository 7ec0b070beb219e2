"""A fractional average without any signal: an evenly spaced mix of two neighbouring widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.allocation import two_widths
from dmpq.agents.base import OneMapAgent
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class UniformFractionalAgent(OneMapAgent):
    """Spends what a uniform map leaves over on evenly spaced decisions: one evaluation.

    The fair baseline of every mixed map: where 3.0 bits are allowed and a uniform 2 takes 2.25,
    mixed maps have 0.75 bits more to spend, which is no merit of theirs. Of D decisions in the
    model's order, n are raised to the next format at even distances (Bresenham's line): decision
    i where ``floor((i + 1) n / D)`` exceeds ``floor(i n / D)``. No statistic takes part.
    """

    name: ClassVar[str] = "uniform-fractional"
    signal: ClassVar[str] = "none: evenly spaced mix"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "baseline"
    reads: ClassVar[str] = "gradients"

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the evenly spaced mix, (D,).

        Raises:
            InputError: If no uniform map meets the limits.
        """
        steps = np.arange(problem.num_decisions + 1)
        return two_widths(problem, lambda count: np.diff(steps * count // steps[-1]) > 0)
