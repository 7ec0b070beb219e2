"""Rules that need no data at all: norm, outliers and tails of an expert's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.allocation import high_resolution
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class WeightNormAgent(AdditiveAgent):
    """Gives more bits to experts of larger weights: one evaluation.

    The high-resolution law itself: the squared error of quantized weights is proportional to
    their variance (Gray and Neuhoff, 1998), so that the signal is the mean squared weight. The
    map is the least squared weight error, summed over the model, if all experts had weights of
    one shape of distribution. MoPEQ as released ranks the other way round
    (:mod:`dmpq.agents.mopeq`).
    """

    name: ClassVar[str] = "weight-norm"
    signal: ClassVar[str] = "mean squared weight"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "Gray, Neuhoff 1998"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that squared norms stand for, (D, B)."""
        sizes = np.array(
            [layer.expert_parameters / layer.num_experts for layer in problem.spec.moe_layers]
        )
        return high_resolution(
            problem, problem.profile.weight_norm**2 / sizes[problem.spec.layer_of_expert]
        )


@dataclass(frozen=True, kw_only=True)
class OutlierRatioAgent(AdditiveAgent):
    """Gives more bits to experts with an outlier among their weights: one evaluation.

    The "outlier linear scorer" of QuantMoE-Bench (arXiv 2406.08155), ``max |w| / mean |w|``. The
    paper takes the ratio per input column of a linear layer and the largest of them, and gives 4
    bits to the top n linear layers; the profile holds it over a whole matrix, the larger of the
    expert's two (gate and up count as one), and an expert is one decision unless projections are
    served apart, which then share its score.
    """

    name: ClassVar[str] = "outlier-ratio"
    signal: ClassVar[str] = "max |w| / mean |w|"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that outliers stand for, (D, B)."""
        return high_resolution(problem, problem.profile.outlier_ratio)


@dataclass(frozen=True, kw_only=True)
class KurtosisAgent(AdditiveAgent):
    """Gives more bits to experts whose weights have heavier tails: one evaluation.

    MiLo (arXiv 2504.02658, its rank policy by kurtosis) hands out the rank of low-rank
    compensators so; here it is bits. The signal is the kurtosis, not the excess over a normal
    distribution's 3, since that may be negative and no damage is.
    """

    name: ClassVar[str] = "kurtosis"
    signal: ClassVar[str] = "kurtosis of the weights"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2504.02658"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that kurtoses stand for, (D, B)."""
        # No distribution has a kurtosis below 1.
        return high_resolution(problem, np.maximum(problem.profile.kurtosis + 3, 1.0))
