"""Limits: the exact budgets they stand for, who is within them, and those that no map can meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.hw_models import Cost
from dmpq.objective import Constraints, shown
from dmpq.projection import Projection

Ints = NDArray[np.int64]
Assignments = NDArray[np.integer]

BITS_PER_BYTE: Final = 8

_ROUNDING: Final = 1e-12
"""Share by which a cost may exceed its limit: the rounding of sums."""


def exact_limits(
    constraints: Constraints,
    *,
    sizes: Ints,
    num_weights: int,
    cost_sizes: Ints,
    fixed_bytes: float,
) -> tuple[Ints, Ints]:
    """Return what each format takes of each exact budget, (C, D, B), and the budgets, (C,), bits.

    Effective bits on the model itself, then memory at the cost geometry; each where set.

    Args:
        constraints: The limits.
        sizes: Stored bits of each decision in each format, on the model itself, (D, B).
        num_weights: Weights of all routed experts.
        cost_sizes: The same as ``sizes`` at the cost geometry, (D, B).
        fixed_bytes: Memory there that no decision changes, bytes.
    """
    taken, limits = [], []
    if constraints.avg_bits is not None:
        taken.append(sizes)
        bits = constraints.avg_bits * num_weights
        limits.append(math.floor(min(bits, sizes.max(1).sum())))
    if constraints.memory_bytes is not None:
        taken.append(cost_sizes)
        left = (constraints.memory_bytes - fixed_bytes) * BITS_PER_BYTE
        bits = left + _ROUNDING * abs(left)
        limits.append(math.floor(min(bits, cost_sizes.max(1).sum())))
    return np.array(taken, np.int64).reshape(-1, *sizes.shape), np.array(limits, np.int64)


def within(
    constraints: Constraints, bits: Ints, cost: Cost, *, num_weights: int
) -> NDArray[np.bool_]:
    """Return whether maps meet every limit, (K,).

    Args:
        constraints: The limits.
        bits: Stored bits of the maps, (K,).
        cost: Costs of the maps.
        num_weights: Weights of all routed experts.
    """
    inside = np.ones(len(bits), np.bool_)
    for name, limit in constraints.given().items():
        if name == "avg_bits":
            inside &= bits <= limit * num_weights
        else:
            inside &= getattr(cost, name) <= limit * (1 + _ROUNDING)
    return inside


def refuse_impossible(
    constraints: Constraints,
    projection: Projection,
    *,
    costs: Callable[[Assignments], Cost],
    smallest: Assignments,
    num_weights: int,
    narrowest: str,
    geometry: str,
    device: str,
) -> None:
    """Refuse limits that no map meets, naming the least that can be reached.

    Args:
        constraints: The limits.
        projection: Onto the same limits.
        costs: Takes maps, (K, D), to their costs by the full cost model.
        smallest: The map of least memory, (D,).
        num_weights: Weights of all routed experts.
        narrowest: Key of the narrowest format.
        geometry: Name of the geometry at which costs are computed.
        device: Name of the hardware.

    Raises:
        InputError: If a limit is below the least of its kind, or no map meets all together.
    """
    given = constraints.given()
    words = {
        "avg_bits": f"the effective bits of uniform {narrowest} (scales and zero-points included)",
        "memory_bytes": f"the memory in GB of the smallest map at {geometry}",
        "latency_s": f"the least time in ms that was found on {device}",
        "energy_j": f"the least energy in J that was found on {device}",
    }
    least: dict[str, float] = {}
    if "avg_bits" in given:
        least["avg_bits"] = float(projection.sizes.min(1).sum() / num_weights)
    if "memory_bytes" in given:
        least["memory_bytes"] = float(costs(smallest[None]).memory_bytes[0])
    _refuse_below(given, least, words)
    if not projection.priced:
        if len(given) > 1:
            projection.solve(np.zeros(projection.sizes.shape))
        return
    cost = costs(projection.cheap_maps)
    least = {name: float(getattr(cost, name).min()) for name in projection.priced}
    _refuse_below(given, least, words)
    if not len(projection.cheapest):
        limits = " and ".join(" ".join(shown(name, value)) for name, value in given.items())
        raise InputError(
            f"No map was found that meets {limits} together, though each alone can be met; "
            "raise one of them."
        )


def _refuse_below(
    given: Mapping[str, float], least: Mapping[str, float], words: Mapping[str, str]
) -> None:
    """Refuse a limit below the least of its kind, which ``words`` describe."""
    for name, value in least.items():
        if given[name] * (1 + _ROUNDING) >= value:
            continue
        flag, limit = shown(name, given[name])
        raise InputError(
            f"{flag} {limit} is below {shown(name, value)[1]}, {words[name]}; raise it, or offer "
            "narrower formats with --bits."
        )
