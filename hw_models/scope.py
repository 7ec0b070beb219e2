"""The scope of a calibration: which points count, declared in a file before anything is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from dmpq.errors import InputError, unknown
from dmpq.hw_models.calibration import faster_than_memory
from dmpq.hw_models.device import Device
from dmpq.hw_models.points import Outside, Point
from dmpq.hw_models.strict import UNREADABLE, load_object, why_unreadable

SCHEMA: Final = "dmpq.scope/1"
_MOST: Final = 1 << 30


@dataclass(frozen=True)
class Scope:
    """Bounds within which every point counts; a point outside is listed with its reason.

    Attributes:
        devices: Names of devices; empty for any.
        batch: Least and most sequences of a decode step.
        context: Least and most tokens per sequence.
        layer_tokens: Least and most tokens through an MoE layer or a prefill.
        rows: Least and most rows of a matrix product.
    """

    devices: tuple[str, ...] = ()
    batch: tuple[int, int] = (1, _MOST)
    context: tuple[int, int] = (1, _MOST)
    layer_tokens: tuple[int, int] = (1, _MOST)
    rows: tuple[int, int] = (1, _MOST)

    def why_outside(self, point: Point) -> str:
        """Return why a point does not count, or an empty string."""
        if self.devices and point.device not in self.devices:
            return f"device {point.device} is not in the scope"
        tokens = point.batch * max(1, point.context)
        ranges = {
            "decode": (("batch", point.batch), ("context", point.context)),
            "prefill": (("layer_tokens", tokens), ("context", point.context)),
            "moe_layer": (("layer_tokens", point.batch),),
            "speedup": (("rows", point.batch),),
        }
        for name, value in ranges[point.kind]:
            low, high = getattr(self, name)
            if not low <= value <= high:
                return f"{name} {value} is outside {low} to {high}"
        return ""

    def split(self, points: Sequence[Point], device: Device) -> tuple[list[Point], list[Outside]]:
        """Return the points that count, and the others.

        Beside the bounds, one rule of physics: a layer that took less time than its weights take
        at the device's nominal bandwidth measured a cache.
        """
        inside: list[Point] = []
        outside: list[Outside] = []
        for point in points:
            reason = self.why_outside(point)
            if not reason and faster_than_memory(device, point):
                reason = "faster than the nominal bandwidth: it measured a cache"
            if reason:
                what = f"{point.model}, {point.device}/{point.stack}, {point.precision.bits} bits"
                outside.append(Outside(point.name, what, reason))
            else:
                inside.append(point)
        return inside, outside

    def words(self) -> str:
        """Return the bounds as one clause."""
        ranges = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "devices"}
        said = [f"{n} {low} to {high}" for n, (low, high) in ranges.items() if high < _MOST]
        return ", ".join(said) or "every point of the file"


def read_scope(path: Path) -> Scope:
    """Read a scope.

    Raises:
        InputError: If it cannot be read, or names or bounds are no scope's.
    """
    try:
        data = load_object(path, schema=SCHEMA)
    except InputError as error:
        raise InputError(f"The scope {path} is refused: {str(error).rstrip('.')}.") from error
    except UNREADABLE as error:
        raise InputError(f"The scope {path} cannot be read: {why_unreadable(error)}.") from error
    names = [field.name for field in fields(Scope)]
    values = {}
    for name, value in data.items():
        if name == "declared":
            continue
        if name not in names:
            raise unknown(f"name in the scope {path}", name, [*names, "declared"])
        values[name] = tuple(_checked(name, value, path))
    return Scope(**values)


def _checked(name: str, value: Any, path: Path) -> list[Any]:
    kind = str if name == "devices" else int
    holds = isinstance(value, list) and all(type(v) is kind for v in value)
    if holds and kind is int:
        holds = len(value) == 2 and 1 <= value[0] <= value[1]
    if not holds:
        wanted = "a list of names" if kind is str else "two whole numbers, least and most"
        raise InputError(f"{name} in the scope {path} is {str(value)[:60]!r}; give {wanted}.")
    return list(value)
