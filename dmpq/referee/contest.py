"""A contest: a device and limits within which every agent searches, written as one word.

``bits=3`` is 3 effective bits on the default device; ``rtx4090:bits=3+latency=60%`` is the same on
an RTX 4090 together with a step of at most 60% of the time that uniform 8 bits takes there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from dmpq.errors import InputError, unknown
from dmpq.objective import Baselines, Constraints

_NAMES: Final = {
    "bits": "avg_bits",
    "memory": "memory_bytes",
    "latency": "latency_s",
    "energy": "energy_j",
}
_PERCENT: Final = 100.0


@dataclass(frozen=True)
class Contest:
    """Limits on a device.

    Attributes:
        text: How it was written: what rows and tables call it.
        hw: The device, or ``None`` for the default one.
        avg_bits: Effective bits per expert weight.
        shares: Limit → share of what the baseline map takes: ``memory_bytes``, ``latency_s``,
            ``energy_j``.
    """

    text: str
    hw: str | None
    avg_bits: float | None
    shares: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Contest:
        """Return the contest that a word describes.

        Raises:
            InputError: If it names no limit, an unknown one or one twice, or a value is none.
        """
        device, _, limits = text.rpartition(":")
        found: dict[str, float] = {}
        for part in limits.split("+"):
            name, _, value = part.partition("=")
            if name not in _NAMES:
                raise unknown("limit", name, _NAMES, "A contest is written as bits=3+latency=60%.")
            if name in found:
                raise InputError(f"The contest {text!r} limits {name} twice; limit it once.")
            found[name] = _value(name, value, text)
        bits = found.pop("bits", None)
        shares = tuple((_NAMES[name], share) for name, share in found.items())
        return cls(text, device or None, bits, shares)

    def constraints(self, baselines: Baselines) -> Constraints:
        """Return the limits in their units.

        Args:
            baselines: What the shares are of.
        """
        limits = {name: share * getattr(baselines, name) for name, share in self.shares}
        return Constraints(avg_bits=self.avg_bits, **limits)


def _value(name: str, text: str, contest: str) -> float:
    """Return bits as they are, and shares of percents."""
    share = name != "bits"
    example = "60%, of what uniform 8 bits takes" if share else "3"
    try:
        if share != text.endswith("%"):
            raise ValueError
        value = float(text.rstrip("%")) / (_PERCENT if share else 1.0)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"The contest {contest!r} limits {name} to {text!r}; write {example}.")
    return value
