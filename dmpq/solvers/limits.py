"""Limits: the exact budgets they stand for, who is within them, and those that no map can meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.hw_models import Cost, HardwareModel
from dmpq.objective import Constraints, shown
from dmpq.solvers.projection import Projection

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Assignments = NDArray[np.integer]

BITS_PER_BYTE: Final = 8
NOT_ADDITIVE: Final = ("latency_s", "energy_j")
"""Limits on costs that do not add up over decisions."""

USABLE_SHARE: Final = 0.9
"""Of a device's memory."""

GIGABYTE: Final = 1e9
_BOUND_STEPS: Final = 100
_SHOWN_STEP: Final = 2e-6
"""About half of the last digit that is shown."""

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


def shares_taken(constraints: Constraints, cost: Cost) -> Floats:
    """Return what K maps take of the limits that do not add up, latency before energy, (K, P)."""
    given = constraints.given()
    taken = [getattr(cost, name) / given[name] for name in NOT_ADDITIVE if name in given]
    return np.array(taken, np.float64).reshape(-1, len(cost.latency_s)).T


def usable_bytes(capacity_bytes: float) -> float:
    """Return how much of a device's memory a model may take, bytes.

    The rest is for the runtime and for fragmentation (``reference/hardware.md`` section 8, item 6;
    ``ai-dynamo/aiconfigurator`` reserves 3.5 GB of 80).
    """
    return USABLE_SHARE * capacity_bytes


def with_device_memory(
    constraints: Constraints,
    *,
    capacity_bytes: float,
    sizes: Ints,
    num_weights: int,
    cost_sizes: Ints,
    fixed_bytes: float,
) -> Constraints:
    """Return limits with the device's own memory as one of them, where it binds.

    It binds where maps within the limit on bits would not fit, or where the limit on memory that
    was set is above it. Elsewhere nothing changes, so that a search on a large device does not
    depend on how large it is.

    Args:
        constraints: The limits as set.
        capacity_bytes: Memory of the device.
        sizes: Stored bits of each decision in each format, on the model itself, (D, B).
        num_weights: Weights of all routed experts.
        cost_sizes: The same as ``sizes`` at the cost geometry, (D, B).
        fixed_bytes: Memory there that no decision changes, bytes.
    """
    usable, asked = usable_bytes(capacity_bytes), constraints.memory_bytes
    if asked is None:
        left = (usable - fixed_bytes) * BITS_PER_BYTE
        most = float(cost_sizes.max(1).sum())
        if most > left and constraints.avg_bits is not None:
            limit = min(constraints.avg_bits * num_weights, float(sizes.max(1).sum()))
            most = min(most, most_within(cost_sizes, sizes, limit))
        if most <= left:
            return constraints
    elif asked <= usable:
        return constraints
    return replace(constraints, memory_bytes=usable)


def memory_notes(
    asked: Constraints, limits: Constraints, hardware: HardwareModel
) -> tuple[str, ...]:
    """Return what a user should know where the device's memory is one of the limits."""
    if limits.memory_bytes is None or limits.memory_bytes == asked.memory_bytes:
        return ()
    why = f"{hardware.name} has {device_memory(hardware.capacity_bytes)}"
    limit = f"{limits.memory_bytes / GIGABYTE:g}"
    if asked.memory_bytes is None:
        return (f"memory is limited to {limit} GB: {why}",)
    return (f"--memory-gb {asked.memory_bytes / GIGABYTE:g} is reduced to {limit}: {why}",)


def most_within(taken: Ints, sizes: Ints, limit: float) -> float:
    """Return a bound on what maps can take within one limit on something else.

    Lagrangian: ``min over p >= 0 of sum_d max_b (taken - p sizes) + p limit``; where sizes are
    proportional to what is taken, it exceeds the truth by less than one decision's.

    Args:
        taken: (D, B).
        sizes: (D, B), what each format takes of the limit.
        limit: Upper limit on the sum of the chosen sizes.
    """

    def bound(price: float) -> float:
        return float((taken - price * sizes).max(1).sum() + price * limit)

    steepest = float(taken.max() / max(int(sizes[sizes > 0].min(initial=1)), 1))
    low, high = 0.0, max(steepest, 1.0)
    for _ in range(_BOUND_STEPS):  # convex in the price
        third = (high - low) / 3
        if bound(low + third) <= bound(high - third):
            high -= third
        else:
            low += third
    return min(bound(0.0), bound(low), bound(high))


@dataclass(frozen=True, kw_only=True)
class Words:
    """How limits are spoken of.

    Attributes:
        narrowest: Key of the narrowest format.
        geometry: Name of the geometry at which costs are computed.
        device: Name of the hardware.
        capacity_bytes: Its memory, where that is the limit on memory; ``None`` where the user set
            one.
        routed: Whether the experts' routing is known.
    """

    narrowest: str
    geometry: str
    device: str
    capacity_bytes: float | None
    routed: bool


@dataclass(frozen=True)
class Least:
    """What has to be granted of one limit so that it can be met with the others, in its unit.

    Attributes:
        found: What the cheapest known map takes.
        proven: What every map takes at least; 0 where nothing is proven.
    """

    found: float
    proven: float

    @property
    def exact(self) -> bool:
        """Whether both are the same, to the digits that are shown."""
        return self.proven >= self.found * (1 - _SHOWN_STEP)


def refuse_impossible(
    constraints: Constraints,
    projection: Projection,
    *,
    costs: Callable[[Assignments], Cost],
    num_weights: int,
    fixed_bytes: float,
    words: Words,
) -> None:
    """Refuse limits that no map meets, naming the smallest change with which one does.

    Args:
        constraints: The limits.
        projection: Onto the same limits.
        costs: Takes maps, (K, D), to their costs by the full cost model.
        num_weights: Weights of all routed experts.
        fixed_bytes: Memory that no decision changes, bytes.
        words: How to speak of the limits.

    Raises:
        InputError: If no map meets all limits, which is proven where they add up or the hardware's
            costs can be bounded, or else none was found. It says for each limit the least value
            with which a map meets it and the others, as far as that is known.
    """
    given = constraints.given()
    if projection.possible:
        return

    def least(name: str, onto: Projection) -> Least | None:
        choice = onto.least(name)
        if choice is None:
            return None
        found = _taken(name, choice, onto, costs, num_weights)
        return Least(found, _proven(name, found, onto, num_weights, fixed_bytes))

    alone = {name: least(name, _only(name, projection)) for name in given}
    single = next(iter(given)) if len(given) == 1 else "memory_bytes"
    own = len(given) == 1 or words.capacity_bytes is not None
    smallest = alone.get(single)
    if own and smallest is not None and smallest.found > given[single] * (1 + _ROUNDING):
        raise InputError(_below(single, given[single], smallest, words))
    limits = " and ".join(_limit(name, value, words) for name, value in given.items())
    needed = {name: least(name, projection) for name in given}
    relaxation = projection.relaxation
    proven = not projection.priced or (relaxation is not None and relaxation.impossible)
    start = f"No map {'meets' if proven else 'was found that meets'} {limits} together"
    changes = [_change(name, value, words) for name, value in needed.items() if value is not None]
    if changes:
        others = "the other kept" if len(given) == 2 else "the others kept"
        idle = [_name(name, words) for name, value in needed.items() if value is None]
        rest = f"; raising {' or '.join(idle)} alone is not enough" if idle else ""
        raise InputError(f"{start}; with {others}, {', or '.join(changes)}{rest}.")
    apart = [_least(name, value, words) for name, value in alone.items() if value is not None]
    raise InputError(
        f"{start}, and no change of one of them is enough; by themselves they can be met from "
        f"{', '.join(apart)} on."
    )


def _proven(
    name: str, found: float, projection: Projection, num_weights: int, fixed_bytes: float
) -> float:
    """Return what every map within the other limits takes of one at least, in its unit.

    Args:
        name: The limit.
        found: What the cheapest known map takes, which is proven where all limits add up.
        projection: Onto it and the others.
        num_weights: Weights of all routed experts.
        fixed_bytes: Memory that no decision changes, bytes.
    """
    if not projection.priced:
        return found
    if projection.relaxation is None:
        return 0.0
    least = projection.relaxation.least(name)
    if name == "avg_bits":
        return least / num_weights
    return least / BITS_PER_BYTE + fixed_bytes if name == "memory_bytes" else least


def _only(name: str, projection: Projection) -> Projection:
    """Return the projection onto one limit alone."""
    for other in (*projection.names, *projection.priced):
        if other != name:
            projection = projection.without(other)
    return projection


def _taken(
    name: str,
    choice: Ints,
    projection: Projection,
    costs: Callable[[Assignments], Cost],
    num_weights: int,
) -> float:
    if name == "avg_bits":
        return float(projection.sizes[np.arange(len(choice)), choice].sum() / num_weights)
    return float(getattr(costs(choice[None]), name)[0])


def _below(name: str, limit: float, least: Least, words: Words) -> str:
    """Return why a single limit cannot be met."""
    flag, at_least = shown(name, limit)[0], _shown_above(name, least.found)
    if name == "memory_bytes" and words.capacity_bytes is not None:
        return (
            f"The smallest map takes {at_least} GB at {words.geometry}, and {words.device} has "
            f"{device_memory(words.capacity_bytes)}; use a device with at least "
            f"{_shown_above(name, least.found / USABLE_SHARE)} GB, narrower formats (--bits), or "
            "a smaller --batch or --context."
        )
    found = "" if least.exact else "that was found "
    what = {
        "avg_bits": f"the effective bits of uniform {words.narrowest} (scales and zero-points "
        "included)",
        "memory_bytes": f"the memory in GB of the smallest map at {words.geometry}",
        "latency_s": f"the least time in ms {found}on {words.device}",
        "energy_j": f"the least energy in J {found}on {words.device}",
    }
    bound = ""
    if not least.exact and least.proven > 0:
        bound = f" (none takes less than {_shown_below(name, least.proven)})"
    return (
        f"{flag} {shown(name, limit)[1]} is below {at_least}, {what[name]}{bound}; raise it, or "
        "offer narrower formats with --bits."
    )


def _limit(name: str, value: float, words: Words) -> str:
    """Return a limit as the user gave it."""
    if name == "memory_bytes" and words.capacity_bytes is not None:
        return f"the memory of {words.device} ({device_memory(words.capacity_bytes)})"
    return " ".join(shown(name, value))


def device_memory(capacity_bytes: float) -> str:
    """Return how much memory a device has, in words."""
    return f"{capacity_bytes / GIGABYTE:g} GB, of which {USABLE_SHARE:.0%} may be used"


def _name(name: str, words: Words) -> str:
    """Return what a limit is called."""
    own = name == "memory_bytes" and words.capacity_bytes is not None
    return f"the memory of {words.device}" if own else shown(name, 1.0)[0]


def _change(name: str, least: Least, words: Words) -> str:
    """Return what a limit would have to be, as far as is known."""
    if name == "memory_bytes" and words.capacity_bytes is not None:
        share = Least(least.found / USABLE_SHARE, least.proven / USABLE_SHARE)
        return f"the device would have to have {_amount(name, share, words, unit=' GB')}"
    flag = shown(name, least.found)[0]
    return f"{flag} would have to be raised to {_amount(name, least, words)}"


def _least(name: str, least: Least, words: Words) -> str:
    return f"{_name(name, words)} {_amount(name, least, words)}"


def _amount(name: str, least: Least, words: Words, *, unit: str = "") -> str:
    """Return a least value, and how certain it is.

    A map of the cost found exists, but where costs do not add up a cheaper one may, down to what
    is proven; before the routing is known, not even that.
    """
    found = _shown_above(name, least.found) + unit
    if least.exact:
        return found
    if not words.routed:
        return f"about {found} (the routing is not known yet)"
    if least.proven <= 0:
        return f"at most {found}"
    return f"at most {found} (and at least {_shown_below(name, least.proven)}{unit})"


def _shown_above(name: str, value: float) -> str:
    """Return a value in its flag's unit, rounded up so that the limit it names can be met."""
    scale = float(shown(name, 1.0)[1])  # a power of ten
    exact, step = value * scale, 0
    while float(text := shown(name, value * (1 + step * _SHOWN_STEP))[1]) < exact:
        step += 1
    return text


def _shown_below(name: str, value: float) -> str:
    """Return a value in its flag's unit, rounded down."""
    scale = float(shown(name, 1.0)[1])
    exact, step = value * scale, 0
    while float(text := shown(name, value * (1 - step * _SHOWN_STEP))[1]) > exact:
        step += 1
    return text
