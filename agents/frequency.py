"""More bits to experts that the router selects more often: the most common published signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.allocation import high_resolution
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class FrequencyAgent(AdditiveAgent):
    """Ranks by activation frequency alone and spends the budget exactly: one evaluation.

    The "Freq" heuristic of QuantMoE-Bench (arXiv 2406.08155), which gives the most frequently
    routed experts the wider of two widths, for any menu and any budget: an expert's error at
    width b is taken to be ``frequency * 4^-b``, the high-resolution law of uniform quantization,
    and the exact knapsack minimises the sum. No sensitivity and no hardware price takes part.
    Where decisions are layers, every layer is used alike, and so is given alike.
    """

    name: ClassVar[str] = "frequency"
    signal: ClassVar[str] = "selections by the router"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that frequencies stand for, (D, B)."""
        return high_resolution(problem, problem.profile.frequency)
