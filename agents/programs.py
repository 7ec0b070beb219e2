"""What published allocators share: rows of experts by decision, programs per layer, floors.

A program is a choice of formats of least summed value within a budget of stored bits. Published
ones are solved for a layer at a time, each layer on its own share of the budget, or for the whole
model; some ask for at least one expert of certain widths in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.problem import Problem
from dmpq.solvers.knapsack import solve_mip

if TYPE_CHECKING:
    from dmpq.model_evaluator import ModelEvaluator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_BISECTIONS: Final = 20


def by_decision(problem: Problem, rows: Floats) -> Floats:
    """Return experts' rows (N, B) summed over each decision, (D, B).

    A projection gets its share of the expert's weights.
    """
    spec = problem.spec
    layers = [layer.expert_parameters / layer.num_experts for layer in spec.moe_layers]
    per_weight = rows / np.array(layers)[spec.layer_of_expert][:, None]
    summed: Floats = problem.per_decision(per_weight) * problem.decision_weights[:, None]
    return summed


def layer_of_decision(problem: Problem) -> Ints:
    """Return the layer of each decision, (D,)."""
    layers: Ints = problem.per_decision(problem.spec.layer_of_expert.astype(float)).astype(int)
    return layers


def wanted(problem: Problem, widths: Sequence[int]) -> list[Flags]:
    """Return which formats have each of some widths, (B,) each; widths not on offer are left out.

    Where a layer shares one format there is nothing to ask for, and the list is empty.
    """
    if problem.serve == "layer":
        return []
    masks = [problem.menu.bits == width for width in widths]
    return [mask for mask in masks if mask.any()]


def solve_layer(
    values: Floats,
    sizes: Ints,
    capacity: int,
    *,
    at_least: Sequence[Flags] = (),
    spend_all: bool = False,
) -> Ints:
    """Return the best choice of each of a layer's decisions, int64 (E,), by dynamic programming.

    Exact: the table holds the least value at every exact size and for every set of the floors met
    so far. Ties go to fewer bits. Floors that the capacity cannot pay for are dropped, the last
    ones first.

    Args:
        values: (E, B), what each choice costs in the objective; smaller is better.
        sizes: (E, B), what each choice takes of the capacity, integers.
        capacity: Upper limit on the sum of the chosen sizes.
        at_least: Sets of formats, (B,) each, of which at least one decision must take one.
        spend_all: Take the largest sum of sizes that can be reached, whatever its value: the
            equality "all bits are spent", as far as sizes allow.

    Raises:
        InputError: If even the smallest choices do not fit.
    """
    smallest = sizes.min(1)
    spare = capacity - int(smallest.sum())
    if spare < 0:
        raise InputError(
            f"A layer's budget of {capacity} bits is below {smallest.sum()}, the least that its "
            f"{len(sizes)} decisions can take; raise the limit or offer smaller formats."
        )
    extra = sizes - smallest[:, None]
    unit = int(np.gcd.reduce(extra, axis=None)) or 1
    units = extra // unit
    width = min(spare // unit, int(units.max(1).sum())) + 1
    masks = sum(
        (mask.astype(int) << i for i, mask in enumerate(at_least)), np.zeros(len(sizes[0]), int)
    )
    states = 1 << len(at_least)
    best = np.full((states, width), np.inf)
    best[0, 0] = 0.0
    steps = np.zeros((len(sizes), states, width), np.int16)
    for step, value, unit_of in zip(steps, values, units, strict=True):
        best = _add_decision(best, value, unit_of, masks, step)
    ends = np.isfinite(best[-1])
    if not ends.any():
        return solve_layer(values, sizes, capacity, at_least=at_least[:-1], spend_all=spend_all)
    at = int(np.flatnonzero(ends)[-1]) if spend_all else int(best[-1].argmin())
    state, choice = states - 1, np.zeros(len(sizes), np.int64)
    for row in range(len(sizes) - 1, -1, -1):
        state, choice[row] = divmod(int(steps[row, state, at]), sizes.shape[1])
        at -= int(units[row, choice[row]])
    return choice


def _add_decision(
    best: Floats, values: Floats, units: Ints, masks: Ints, step: NDArray[np.int16]
) -> Floats:
    """Return the least value at every set of floors met and exact size, a decision added.

    Args:
        best: (S, W), least value of the decisions before.
        values: (B,), of the decision's formats.
        units: (B,), sizes of the formats.
        masks: (B,), the floors that each format meets, as a set of bits.
        step: (S, W), written: the state before, times B, plus the format.
    """
    width = best.shape[1]
    least = np.full(best.shape, np.inf)
    for fmt in np.argsort(units, kind="stable").tolist():
        moved = int(units[fmt])
        if moved >= width:
            continue
        for state in range(len(best)):
            into = state | int(masks[fmt])
            total = best[state, : width - moved] + values[fmt]
            target = least[into, moved:]
            better = total < target
            target[better] = total[better]
            step[into, moved:][better] = state * len(values) + fmt
    return least


def solve_by_layer(problem: Problem, solve: Callable[[Ints, int], Ints]) -> Ints:
    """Return a map, (D,), of programs solved layer by layer, within every limit.

    Each layer may spend its weights' share of the limit on effective bits. Where the map would
    exceed another limit, all layers get the same smaller number of bits per weight, as many as
    meet it. Latency and energy do not add up (a launch per width), so that often only maps of one
    width meet them on this road: the map within the limits nearest to the first is then better.

    Args:
        problem: Says what the limits are.
        solve: Takes the decisions of a layer (E,) and its budget, stored bits, to the formats of
            these decisions, (E,).
    """
    layers, weights = layer_of_decision(problem), problem.decision_weights
    members = [np.flatnonzero(layers == layer) for layer in np.unique(layers)]

    def at(bits: float) -> Ints:
        choice = np.zeros(problem.num_decisions, np.int64)
        for rows in members:
            least = int(problem.sizes[rows].min(1).sum())
            choice[rows] = solve(rows, max(least, math.floor(bits * int(weights[rows].sum()))))
        return choice

    low, widest = (float(getattr(problem.sizes, end)(1).sum()) for end in ("min", "max"))
    low, high = low / problem.num_weights, widest / problem.num_weights
    high = min(high, math.inf if problem.limits.avg_bits is None else problem.limits.avg_bits)
    found = first = at(high)
    if problem.feasible(first[None])[0]:
        return first
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        tried = at(middle)
        if problem.feasible(tried[None])[0]:
            low, found = middle, tried
        else:
            high = middle
    nearest = within_limits(problem, first)
    own, other = problem.effective_bits(np.stack([found, nearest]))
    return found if own >= other and problem.feasible(found[None])[0] else nearest


def solve_model(problem: Problem, values: Floats, *, at_least: Sequence[Flags] = ()) -> Ints:
    """Return the map of least value, (D,), with floors in every layer, within every limit.

    The exact knapsack where its optimum meets the floors, else branch and bound. Floors that the
    limits cannot pay for are dropped, the last ones first.

    Args:
        problem: Says what the limits are.
        values: (D, B), what each format costs in the objective; smaller is better.
        at_least: Sets of formats, (B,) each, of which every layer must take one at least once.
    """
    layers = layer_of_decision(problem)
    inside = [(layers == layer)[:, None] for layer in np.unique(layers)]
    choice = problem.project(values)
    taken = np.eye(values.shape[1], dtype=bool)[choice]
    sizes, limits = problem.linear_limits
    if not len(limits):
        sizes, limits = problem.sizes[None], problem.sizes.max(1).sum()[None]
    for count in range(len(at_least), 0, -1):
        covers = [rows & formats for formats in at_least[:count] for rows in inside]
        if all((taken & cover).any() for cover in covers):
            break
        try:
            found = solve_mip(values, sizes, limits, covers=covers)
        except InputError:
            continue
        return within_limits(problem, found)
    return choice


def within_limits(problem: Problem, choice: Ints) -> Ints:
    """Return a map, (D,), or where it exceeds a limit the one within them nearest to its sizes."""
    if problem.feasible(choice[None])[0]:
        return choice
    own = problem.sizes[np.arange(len(choice)), choice]
    return problem.project(np.abs(problem.sizes - own[:, None]).astype(np.float64))


def model_evaluator(problem: Problem, agent: str) -> ModelEvaluator:
    """Return the evaluator of a problem that runs the model.

    Raises:
        InputError: If the problem has none.
    """
    from dmpq.model_evaluator import ModelEvaluator

    if not isinstance(problem.evaluator, ModelEvaluator):
        raise InputError(
            f"The agent {agent!r} differentiates the model's loss, but this problem's evaluator "
            f"is {problem.evaluator.name!r}; give it a ModelEvaluator, or choose an agent that "
            "reads the profile alone, such as 'gemq'."
        )
    return problem.evaluator
