"""How the scores of a published rule become a map that spends the budget: two forms.

Most papers rank experts and stop there; what the ranks are worth is left to two or three widths
picked by hand. Here a score either is a damage that falls by 4 per bit, for any menu, or ranks
the experts for the wider of two neighbouring widths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.uniform import UniformAgent
from dmpq.errors import InputError
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_GOLDEN: Final = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, fill the unit interval evenly at any count (three-distance theorem)."""

_TIE: Final = 1e-6
"""How much equal signals are told apart, relative."""


def high_resolution(problem: Problem, signal: Floats, *, spread_ties: bool = False) -> Floats:
    """Return damages, (D, B), where a weight's at width b is ``signal * 4^-b``; 1 at most.

    The high-resolution law of uniform quantization (Gray and Neuhoff, "Quantization", IEEE
    Transactions on Information Theory, 1998, section II): a bit more halves the error. Four times
    the signal is so worth one bit; the exact knapsack does the sum.

    Args:
        problem: What is searched.
        signal: (N,), one number of 0 or more per expert, for each of its weights.
        spread_ties: Whether equal experts are many, so that what is left of the budget shall go
            to evenly spread ones of them.
    """
    if spread_ties:
        signal = signal * (1 + _TIE * _even(len(signal)))
    per_decision = problem.per_decision(signal) * problem.decision_weights
    values = per_decision[:, None] * 4.0 ** -problem.menu.bits.astype(float)
    damages: Floats = values / (values.max() or 1.0)
    return damages


def with_more_bits(
    problem: Problem, signal: Floats, chosen: NDArray[np.bool_], bits: float
) -> Floats:
    """Return a signal's damages, (D, B), where chosen experts deserve so many more bits.

    Args:
        problem: What is searched.
        signal: (N,), as in :func:`high_resolution`.
        chosen: (N,), which experts are protected.
        bits: How many more, as near as menu and budget allow.

    Raises:
        InputError: If ``bits`` is not a number from 0 to 16.
    """
    if not 0 <= bits <= 16:
        raise InputError(f"extra_bits is {bits!r}; give a number from 0 to 16.")
    raised = signal * np.where(chosen, 4.0**bits, 1.0)
    return high_resolution(problem, raised, spread_ties=True)


def two_widths(problem: Problem, wider: Callable[[int], NDArray[np.bool_]]) -> Ints:
    """Return a mix of the widest uniform map within the limits and the next format, (D,).

    As many decisions as the limits allow take the next format, by stored bits.

    Args:
        problem: What is searched.
        wider: Takes a number from 0 to D to the decisions, that many of (D,), which are raised.

    Raises:
        InputError: If no uniform map meets the limits.
    """
    stored = problem.effective_bits(np.array([problem.uniform(key) for key in problem.menu.keys]))
    narrow = UniformAgent().propose(problem)[0]
    above = np.flatnonzero(stored > stored[narrow])
    wide = above[stored[above].argmin()] if above.size else narrow

    def mixed(count: int) -> Ints:
        found: Ints = np.where(wider(count), wide, narrow)
        return found

    def too_many(count: int) -> bool:
        return not problem.feasible(mixed(count)[None])[0]

    # Counts from 1 on: none at all is the uniform map, which is known to fit.
    return mixed(bisect_left(range(1, problem.num_decisions + 1), True, key=too_many))


def top_of_each_layer(problem: Problem, rank: Ints) -> Ints:
    """Return the map in which the same share of every layer, its first ranks, is wider, (D,).

    Layers have equal shares to within one decision each: the last of them go to layers spread
    evenly over the model.

    Args:
        problem: What is searched.
        rank: (D,), place of each decision in its layer's ranking, 0 for the first.
    """
    sizes = np.bincount(layer_of_decision(problem))[layer_of_decision(problem)]
    place = np.empty(len(rank), np.int64)
    place[np.lexsort((_even(len(rank)), rank / sizes))] = np.arange(len(rank))
    return two_widths(problem, lambda count: place < count)


def layer_of_decision(problem: Problem) -> Ints:
    """Return the MoE layer of each decision, (D,)."""
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(float))
    return layers.astype(np.int64)


def within_limits(problem: Problem, assignment: Ints, rule: str) -> Ints:
    """Return the map (D,) of a rule that knows no budget, or say that it is beyond the limits.

    Raises:
        InputError: If it is.
    """
    if not problem.feasible(assignment[None])[0]:
        raise InputError(
            f"{rule} knows no budget, and its map of "
            f"{problem.effective_bits(assignment[None])[0]:.2f} effective bits is beyond the "
            "limits; raise them, or leave budget_free off."
        )
    return assignment


def _even(count: int) -> Floats:
    numbers: Floats = np.arange(1.0, count + 1) * _GOLDEN % 1
    return numbers
