"""Chowdhury et al.: experts whose router row has grown little get more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.allocation import layer_of_decision, top_of_each_layer
from dmpq.agents.base import OneMapAgent
from dmpq.errors import InputError
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RouterNormChangeAgent(OneMapAgent):
    """Gives more bits to experts whose router row grew least in training: one evaluation.

    "Efficient Quantization of MoE with Theoretical Generalization Guarantees" (arXiv 2604.06515,
    ICLR 2026). Each layer's experts are ranked by ``||w(T)|| - ||w(0)||`` of their router row,
    ascending. Then an expert whose largest row variance is more than ``zeta`` times that of one
    ranked above it moves up before the first such (:func:`moved_up`). The first of the ranking
    take the wider of two widths.

    As in the released code (nowazrabbani/moe_quantization), every layer has the same share of
    wide experts; there it is rounded to a whole number per layer, here the budget is spent to the
    end. Its other form, three equally spaced widths, is left out.

    Attributes:
        zeta: Ratio of variances at which an expert moves up; ``None`` for the norms alone.
        largest_first: The opposite sign.
    """

    name: ClassVar[str] = "router-norm-change"
    signal: ClassVar[str] = "least grown router rows"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2604.06515"
    reads: ClassVar[str] = "gradients"

    zeta: float | None = 3.0
    largest_first: bool = False

    def propose(self, problem: Problem) -> Ints:
        """Return the map by change of router norm, (D,).

        Raises:
            InputError: If the change is not known, or no uniform map meets the limits.
        """
        change = _known_change(problem)
        return _ranked(problem, change, largest_first=self.largest_first, zeta=self.zeta)


@dataclass(frozen=True, kw_only=True)
class RouterNormAgent(OneMapAgent):
    """Gives more bits to experts whose router row is short: one evaluation.

    What the same paper does for models of which no initial router is known, Mixtral among them:
    see :class:`RouterNormChangeAgent`. For Mixtral the released code takes the variance of the row
    of largest norm, for Switch the largest variance of any row, as the paper says and the profile
    holds.

    Attributes:
        zeta: See :class:`RouterNormChangeAgent`.
        largest_first: The opposite sign.
    """

    name: ClassVar[str] = "router-norm"
    signal: ClassVar[str] = "short router rows"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2604.06515"
    reads: ClassVar[str] = "gradients"

    zeta: float | None = 3.0
    largest_first: bool = False

    def propose(self, problem: Problem) -> Ints:
        """Return the map by router norm, (D,).

        Raises:
            InputError: If a router is not known, or no uniform map meets the limits.
        """
        norm = problem.profile.router_norm
        if not (norm > 0).all():
            raise InputError(
                f"The profile of {problem.spec.name} has no router rows for some experts "
                "(router_norm is 0 there); take another agent, such as routing-weight."
            )
        return _ranked(problem, norm, largest_first=self.largest_first, zeta=self.zeta)


@dataclass(frozen=True, kw_only=True)
class RouterNormPruningAgent(OneMapAgent):
    """Gives more bits to experts whose router row grew most in training: one evaluation.

    The opposite sign, from the same authors: "A Provably Effective Method for Pruning Experts in
    Fine-tuned Sparse MoE" (arXiv 2405.16646, ICML 2024) prunes the experts of smallest change, and
    so takes them for the least important. Widths stand in for pruning; variances take no part.
    """

    name: ClassVar[str] = "router-norm-pruning"
    signal: ClassVar[str] = "most grown router rows"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2405.16646"
    reads: ClassVar[str] = "gradients"

    def propose(self, problem: Problem) -> Ints:
        """Return the map by change of router norm, largest first, (D,).

        Raises:
            InputError: If the change is not known, or no uniform map meets the limits.
        """
        return _ranked(problem, _known_change(problem), largest_first=True, zeta=None)


def moved_up(ranking: Ints, variance: Floats, zeta: float) -> Ints:
    """Return a ranking in which experts of large row variance have moved up.

    A single pass from the bottom: each expert, if ``zeta`` times the variance of any expert above
    it is smaller than its own, is put before the first such. Experts that moved earlier in the
    pass count where they are by then, as in the released code.

    Args:
        ranking: (E,), experts, those to be given most bits first.
        variance: Of each expert, indexed by the numbers in ``ranking``.
        zeta: The ratio.
    """
    now = ranking.tolist()
    for expert in reversed(ranking.tolist()):
        place = now.index(expert)
        above = np.flatnonzero(zeta * variance[now[:place]] < variance[expert])
        if above.size:
            now.insert(int(above[0]), now.pop(place))
    return np.array(now)


def _known_change(problem: Problem) -> Floats:
    change = problem.profile.router_norm_change
    if np.isnan(change).any():
        raise InputError(
            f"The profile of {problem.spec.name} does not know how router rows changed since "
            "initialisation (router_norm_change); take router-norm, which needs no initial ones, "
            "or a checkpoint whose config has router_init_norms."
        )
    return change


def _ranked(problem: Problem, norm: Floats, *, largest_first: bool, zeta: float | None) -> Ints:
    if zeta is not None and not zeta >= 1:
        raise InputError(f"zeta is {zeta}; give a ratio of 1 or more, or None.")
    key = problem.per_decision(-norm if largest_first else norm)
    variance = problem.per_decision(problem.profile.max_row_variance)
    layers = layer_of_decision(problem)
    rank = np.empty(problem.num_decisions, np.int64)
    for layer in np.unique(layers):
        members = np.flatnonzero(layers == layer)
        ranking = members[np.argsort(key[members], kind="stable")]
        if zeta is not None:
            ranking = moved_up(ranking, variance, zeta)
        rank[ranking] = range(len(ranking))
    return top_of_each_layer(problem, rank)
