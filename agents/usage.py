"""Rules on how much the router uses an expert, beside plain frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.allocation import high_resolution, layer_of_decision, top_of_each_layer
from dmpq.agents.base import OneMapAgent
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class InverseFrequencyAgent(AdditiveAgent):
    """Gives more bits to experts that the router selects less often: one evaluation.

    The direction of Chowdhury et al. (arXiv 2604.06515, ICLR 2026), whose theory has rare features
    learned by rarely and weakly activated experts; their own signal is the router's norm
    (:mod:`dmpq.agents.router_norm`). It is also what lowers latency at equal size: wide experts
    are read seldom. The signal is ``1 / (hits + 1)``, so that an expert never hit counts most;
    the rule says so, although nothing is known of it.
    """

    name: ClassVar[str] = "inverse-frequency"
    signal: ClassVar[str] = "1 / selections"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2604.06515"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that inverse frequencies stand for, (D, B)."""
        return high_resolution(problem, 1 / (problem.profile.hits + 1.0))


@dataclass(frozen=True, kw_only=True)
class RoutingWeightAgent(AdditiveAgent):
    """Gives more bits to experts of more summed routing weight: one evaluation.

    The "soft count" of SEER-MoE (arXiv 2404.05089), there a score for pruning, and the "score"
    baseline of MC (arXiv 2410.06270, metric ablation). SEER-MoE sums the softmax over all experts,
    MC that of the selected ones before it is renormalised; the profile holds the weight that the
    model really gives to the experts it selects, renormalised where the model does that.
    """

    name: ClassVar[str] = "routing-weight"
    signal: ClassVar[str] = "routing weight, summed"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2404.05089"
    reads: ClassVar[str] = "gradients"

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages that soft counts stand for, (D, B)."""
        return high_resolution(problem, problem.profile.routing_weight)


@dataclass(frozen=True, kw_only=True)
class LayerFrequencyAgent(OneMapAgent):
    """Gives the wider of two widths to each layer's most frequent experts: one evaluation.

    The per-layer form of "Freq" in QuantMoE-Bench (arXiv 2406.08155), whose model-wide form is
    :class:`dmpq.agents.frequency.FrequencyAgent`. The paper takes the top n of each layer, widths
    of 4 and 2 (or 8 and 4) bits, and lets the average follow; here the widths are the two that
    enclose the budget, and n is as large as it allows.
    """

    name: ClassVar[str] = "frequency-layer"
    signal: ClassVar[str] = "selections, in layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the per-layer frequency map, (D,).

        Raises:
            InputError: If no uniform map meets the limits.
        """
        frequency = problem.per_decision(problem.profile.frequency)
        layers = layer_of_decision(problem)
        rank = np.empty(problem.num_decisions, np.int64)
        for layer in np.unique(layers):
            members = np.flatnonzero(layers == layer)
            rank[members[np.argsort(-frequency[members], kind="stable")]] = range(len(members))
        return top_of_each_layer(problem, rank)
