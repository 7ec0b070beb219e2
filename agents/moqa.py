"""MoQa, later DynaMo: experts are clustered by how much they carry, a width per cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent, refuse_rescoring
from dmpq.agents.allocation import high_resolution, within_limits
from dmpq.problem import Problem
from dmpq.profile import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ITERATIONS: Final = 1000
_SETTLED: Final = 1e-9
"""The clustering ends where no centre moves by more, relative to the range of the values."""


@dataclass(frozen=True, kw_only=True)
class MoqaAgent(AdditiveAgent):
    """Fuzzy c-means on the experts' significance, low precision first: one evaluation.

    "MoQa" / "DynaMo" (arXiv 2503.21135, DATE 2026): an expert's significance is its share of the
    channel significance summed over the tokens routed to it; fuzzy c-means puts experts into as
    many clusters as widths (4, for 2, 4, 6 and 8 bits), the widest for the largest centre, and an
    expert between two clusters takes the lower precision.

    The paper leaves two things open, which are decided so here. The channel significance has no
    formula, only "activations": the profile holds none, so that the loss gradient at the expert's
    output, mean absolute, times the tokens that select it stands in. "Between two" is a
    membership of at least 1/c, the share that an expert equally near to all clusters would have:
    the narrowest cluster of those counts.

    Left out: significance on several data sets and the joint distribution fitted to it (a profile
    is measured on one text), the 1% of channels kept at 16 bits, and the new clustering when the
    data set changes.

    The paper has no budget. To keep one, every expert's significance is taken to be its cluster's
    centre, and is its damage under the high-resolution law.

    Attributes:
        budget_free: Take the clusters' own widths, one per format on the menu; limits must allow
            the map.

    Raises:
        InputError: If the map is to be free of a budget and re-scored.
    """

    name: ClassVar[str] = "moqa"
    signal: ClassVar[str] = "clusters of gradients"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2503.21135"
    reads: ClassVar[str] = "gradients"

    budget_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rescoring(self, where=self.budget_free, option="budget_free")

    def values(self, problem: Problem) -> Floats:
        """Return the damages that the centres of the experts' clusters stand for, (D, B)."""
        labels, centres = clusters(significance(problem.profile), len(problem.menu))
        return high_resolution(problem, centres[labels], spread_ties=True)

    def propose(self, problem: Problem) -> Ints:
        """Return MoQa's map, (D,).

        Raises:
            InputError: If it is to be free of a budget and is beyond the limits.
        """
        if not self.budget_free:
            return super().propose(problem)
        value = problem.per_decision(significance(problem.profile))
        return within_limits(problem, clusters(value, len(problem.menu))[0], "MoQa's clustering")


def significance(profile: Profile) -> Floats:
    """Return each expert's share of its layer's summed output gradient, (N,)."""
    carried = profile.contribution * profile.frequency
    layers = profile.spec.layer_of_expert
    total = np.bincount(layers, carried)[layers]
    return np.divide(carried, total, out=np.zeros_like(carried), where=total > 0)


def clusters(values: Floats, count: int) -> tuple[Ints, Floats]:
    """Return each value's cluster, low precision first, and the centres in increasing order.

    Fuzzy c-means with exponent 2 (Bezdek, "Pattern Recognition with Fuzzy Objective Function
    Algorithms", 1981): memberships are proportional to the inverse squared distance, centres are
    means weighted by squared membership. Centres start spread over the distinct values, of which
    there may be fewer than ``count``.

    Args:
        values: (D,).
        count: Number of clusters.

    Returns:
        Labels, (D,), and centres, at most (count,).
    """
    distinct = np.unique(values)
    places = np.linspace(0, len(distinct) - 1, min(count, len(distinct)))
    centres = distinct[places.round().astype(int)]
    scale = float(np.ptp(values)) or 1.0
    for _ in range(_ITERATIONS):
        weight = _membership(values, centres) ** 2
        moved = (weight * values[:, None]).sum(0) / weight.sum(0)
        settled = np.abs(moved - centres).max() <= _SETTLED * scale
        centres = np.sort(moved)
        if settled:
            break
    # The rounding of 1/c may not keep an expert out of all clusters.
    enough = _membership(values, centres) >= (1 - 1e-9) / len(centres)
    return enough.argmax(1), centres


def _membership(values: Floats, centres: Floats) -> Floats:
    """Return how much each value belongs to each centre, (D, c), rows of sum 1."""
    squared = (values[:, None] - centres) ** 2
    nearest = squared.min(1, keepdims=True)
    # Relative to the nearest, so that a value on a centre belongs to it alone.
    closeness = np.divide(nearest, squared, out=np.ones_like(squared), where=squared > 0)
    member: Floats = closeness / closeness.sum(1, keepdims=True)
    return member
