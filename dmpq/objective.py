"""The one reward formula, its weights, the hard limits beside it, and what it is relative to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.hw_models import Cost

Floats = NDArray[np.float64]

_EXAMPLE: Final = "acc=1,lat=0.1,mem=0.1,eng=0.1"
_ROUNDING: Final = 1e-12
"""Of a change of units."""


@dataclass(frozen=True)
class Weights:
    """How much each term of the reward counts; not negative.

    Attributes:
        acc: Of the damage, relative to that of the narrowest uniform map that prunes nothing.
        lat: Of the latency, relative to that of the baseline map.
        mem: Of the memory, likewise.
        eng: Of the energy, likewise.
    """

    acc: float = 1.0
    lat: float = 0.1
    mem: float = 0.1
    eng: float = 0.1

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise InputError(
                    f"The weight {name}={weight} must be a number, 0 or more; as in {_EXAMPLE}."
                )

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Return the weights of ``"acc=1,lat=0.1"``; names that are not mentioned weigh 0.

        Raises:
            InputError: If a name is unknown or given twice, or a weight is no number.
        """
        names = [field.name for field in fields(cls)]
        weights = dict.fromkeys(names, 0.0)
        seen = set()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, number = (piece.strip() for piece in part.partition("="))
            if name not in weights:
                raise unknown("weight", name, names)
            if name in seen:
                raise InputError(f"The weight {name} is given twice in {text!r}; give it once.")
            seen.add(name)
            try:
                weights[name] = float(number)
            except ValueError as error:
                raise InputError(
                    f"{part!r} is no weight; write names and numbers, as in {_EXAMPLE}."
                ) from error
        if not seen:
            raise InputError(f"The weights are empty; write them as in {_EXAMPLE}.")
        return cls(**weights)

    def spelled(self) -> str:
        """Return the weights as :meth:`parse` reads them, those of 0 left out."""
        given = {name: weight for name, weight in asdict(self).items() if weight}
        return (
            ",".join(f"{k}={float(v)!r}".removesuffix(".0") for k, v in given.items()) or "acc=0"
        )

    def as_array(self) -> Floats:
        """Return the weights in the order of the reward's terms, (4,)."""
        return np.array([self.acc, self.lat, self.mem, self.eng])


@dataclass(frozen=True)
class Constraints:
    """Upper limits that no map exceeds; ``None`` for no limit.

    Attributes:
        avg_bits: Effective bits per expert weight, scales and zero-points included.
        memory_bytes: Memory of the whole model in the workload, bytes.
        latency_s: Time of one step, seconds.
        energy_j: Energy of one step, joules.
    """

    avg_bits: float | None = None
    memory_bytes: float | None = None
    latency_s: float | None = None
    energy_j: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.given().items():
            flag, unit, _ = _FLAGS[name]
            refuse_limit(flag, limit / unit)

    def given(self) -> dict[str, float]:
        """Return the limits that are set, by name."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}


_FLAGS: Final[Mapping[str, tuple[str, float, float]]] = {
    "avg_bits": ("--avg-bits", 1.0, 64),
    "memory_bytes": ("--memory-gb", 1e9, 1e12),
    "latency_s": ("--latency-ms", 1e-3, 1e12),
    "energy_j": ("--energy-j", 1.0, 1e12),
}
"""Limit → its flag, what one of the flag's unit is, and the most of them that make sense."""

LIMIT_FLAGS: Final = tuple(flag for flag, _, _ in _FLAGS.values())


def refuse_limit(flag: str, value: float) -> None:
    """Refuse a limit, in its flag's unit, that makes no sense.

    Raises:
        InputError: If it is no number above 0, or beyond any device's.
    """
    most = next(most for known, _, most in _FLAGS.values() if known == flag)
    if not 0 < value <= most * (1 + _ROUNDING):
        raise InputError(
            f"{flag} {value:.6g} makes no sense; give a number above 0, at most {most:g}, or "
            "leave it out for no limit."
        )


def shown(name: str, value: float) -> tuple[str, str]:
    """Return a limit's flag and a value in the flag's unit, as a user would write them."""
    flag, unit, _ = _FLAGS[name]
    return flag, f"{value / unit:.6g}"


@dataclass(frozen=True)
class Baselines:
    """What the reward's terms are relative to; all above 0.

    Attributes:
        damage: KL of the narrowest uniform map that prunes nothing, nats per token.
        latency_s: Of the uniform 8-bit map, or the widest quantized one where 8 is not offered.
        memory_bytes: Of the same map.
        energy_j: Of the same map.
    """

    damage: float
    latency_s: float
    memory_bytes: float
    energy_j: float


def reward_terms(
    weights: Weights, baselines: Baselines, damage: Floats, cost: Cost
) -> dict[str, Floats]:
    """Return the signed and weighted terms of K maps; their sum is the reward.

    ``R = w_acc ΔAcc - w_lat L/L0 - w_mem M/M0 - w_eng E/E0`` with ``ΔAcc = -D/D0``.

    Args:
        weights: Of the terms.
        baselines: D0, L0, M0 and E0.
        damage: (K,), D: KL to the full-precision logits, nats per token.
        cost: L, M and E of the same maps.
    """
    return {
        "accuracy": -weights.acc * damage / baselines.damage,
        "latency": -weights.lat * cost.latency_s / baselines.latency_s,
        "memory": -weights.mem * cost.memory_bytes / baselines.memory_bytes,
        "energy": -weights.eng * cost.energy_j / baselines.energy_j,
    }
