"""MoPEQ as released: the inverse norm of an expert's weights, clustered by k-means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent, refuse_rescoring
from dmpq.agents.allocation import high_resolution, layer_of_decision, within_limits
from dmpq.problem import Problem
from dmpq.profile import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SETTLED = 1e-12
"""k-means ends where the mean distance falls by less, relative to the range of the scores."""


@dataclass(frozen=True, kw_only=True)
class MopeqModelAgent(AdditiveAgent):
    """MoPEQ, model-wise: scores of all experts are compared, one evaluation.

    "MoPEQ: Mixture of Mixed Precision Quantized Experts" (arXiv 2509.02512), as its code
    (krishnateja95/MoE-Mixed-Prec, ``outlier_profiling``) has it. The score is called the trace of
    a Hessian, and is one: that of the Frobenius norm of a weight matrix, which stands in for the
    loss, estimated with 100 normal probes of length 1 and summed over gate, up and down. In closed
    form that is ``(1 - 1/D) / ||W||`` for D weights (:func:`scores`): large where weights are
    small. No data, no gradient of the loss. The code clusters scores by k-means, as many clusters
    as widths, the widest for the largest mean; the average width is what comes out.

    Where the budget is to be kept, the score is an expert's damage instead, under the
    high-resolution law.

    Attributes:
        budget_free: Take the paper's own map, by k-means over the menu's formats, as it is; limits
            must allow it.

    Raises:
        InputError: If the map is to be free of a budget and re-scored.
    """

    name: ClassVar[str] = "mopeq-model"
    signal: ClassVar[str] = "1 / weight norm"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2509.02512"
    reads: ClassVar[str] = "gradients"

    budget_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rescoring(self, where=self.budget_free, option="budget_free")

    def values(self, problem: Problem) -> Floats:
        """Return the damages that scores stand for, (D, B)."""
        return high_resolution(problem, scores(problem.profile))

    def propose(self, problem: Problem) -> Ints:
        """Return MoPEQ's map, (D,).

        Raises:
            InputError: If it is to be free of a budget and is beyond the limits.
        """
        if not self.budget_free:
            return super().propose(problem)
        score = problem.per_decision(scores(problem.profile))
        found = clusters(score, len(problem.menu))
        return within_limits(problem, found, "MoPEQ's k-means")


@dataclass(frozen=True, kw_only=True)
class MopeqLayerAgent(AdditiveAgent):
    """MoPEQ, layer-wise: scores are compared within a layer only, one evaluation.

    As :class:`MopeqModelAgent`, but each score is divided by its layer's sum, as the released code
    does; free of a budget, each layer has a k-means of its own. Where layers are the decisions, a
    layer's mean is all that is left, and all layers are alike.

    Attributes:
        budget_free: See :class:`MopeqModelAgent`.
    """

    name: ClassVar[str] = "mopeq-layer"
    signal: ClassVar[str] = "1 / norm, in layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2509.02512"
    reads: ClassVar[str] = "gradients"

    budget_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rescoring(self, where=self.budget_free, option="budget_free")

    def values(self, problem: Problem) -> Floats:
        """Return the damages that scores within layers stand for, (D, B)."""
        return high_resolution(problem, scores_in_layers(problem.profile))

    def propose(self, problem: Problem) -> Ints:
        """Return MoPEQ's map, (D,).

        Raises:
            InputError: If it is to be free of a budget and is beyond the limits.
        """
        if not self.budget_free:
            return super().propose(problem)
        score = problem.per_decision(scores_in_layers(problem.profile))
        layers = layer_of_decision(problem)
        found = np.empty(len(score), np.int64)
        for layer in np.unique(layers):
            found[layers == layer] = clusters(score[layers == layer], len(problem.menu))
        return within_limits(problem, found, "MoPEQ's k-means")


def scores(profile: Profile) -> Floats:
    """Return the sum over an expert's matrices of ``(1 - 1/D) / ||W||``, (N,).

    The Hessian of ``||W||`` is ``(I - w w') / ||W||`` with ``w = W / ||W||``, of trace
    ``(D - 1) / ||W||``; probes of length 1 see a D-th of it.

    The profile holds one norm for all of an expert's weights, not one per matrix: each matrix is
    given its share by size, as if their weights were equally large. An expert whose matrices
    differ in root mean square has a larger score in the paper, by the mean of the inverse norms
    over the inverse of their root mean square. An expert of zeros has score 0, where the released
    code finds NaN.
    """
    norm = profile.weight_norm
    layers = profile.spec.moe_layers
    matrices = np.array([3 if layer.gated else 2 for layer in layers])
    size = np.array([layer.hidden_size * layer.intermediate_size for layer in layers])
    # Each matrix has norm / sqrt(matrices).
    factor = (matrices * np.sqrt(matrices) * (1 - 1 / size))[profile.spec.layer_of_expert]
    score: Floats = np.divide(factor, norm, out=np.zeros_like(norm), where=norm > 0)
    return score


def scores_in_layers(profile: Profile) -> Floats:
    """Return the scores divided by the sum of their layer's, (N,)."""
    score, layers = scores(profile), profile.spec.layer_of_expert
    total = np.bincount(layers, score)[layers]
    return np.divide(score, total, out=np.zeros_like(score), where=total > 0)


def clusters(score: Floats, count: int) -> Ints:
    """Return the cluster of each score by k-means, 0 for that of the smallest mean, (D,).

    The released code starts from random centres; here they are spread over the distinct scores,
    so that the same profile gives the same map. Where fewer than ``count`` scores differ, there
    are as many clusters as scores, and the widest formats are not used.
    """
    from scipy.cluster.vq import kmeans, vq

    distinct = np.unique(score)
    places = np.linspace(0, len(distinct) - 1, min(count, len(distinct)))
    start = distinct[places.round().astype(int)]
    if len(start) == 1:
        return np.zeros(len(score), np.int64)
    scale = np.ptp(score)
    found, _ = kmeans(score[:, None] / scale, start[:, None] / scale, thresh=_SETTLED)
    labels: Ints = vq(score[:, None] / scale, np.sort(found, axis=0))[0].astype(np.int64)
    return labels
