"""JSON files read strictly into dataclasses: no unknown name, no missing one, no wrong unit."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, unknown

Bounds = Mapping[str, tuple[float, float]]
T = TypeVar("T")
_LARGEST: Final = 1e300
_SHOWN: Final = 60


def read_json(kind: type[T], path: Path, *, schema: str, bounds: Bounds, max_bytes: int) -> T:
    """Return the dataclass that a file holds.

    Args:
        kind: Dataclass of scalars, literals, tuples, mappings to text, and dataclasses.
        path: The file.
        schema: What its ``"schema"`` must say.
        bounds: Field name → smallest and largest value; outside it, a figure is in another unit.
        max_bytes: Largest file that is read.

    Raises:
        InputError: What is wrong, as a clause without a subject or full stop.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise InputError(f"it is larger than {max_bytes} bytes")
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"it cannot be read ({reason})") from error
    if not isinstance(data, dict) or data.pop("schema", None) != schema:
        raise InputError(f'it does not say "schema": "{schema}"')
    got: T = _read(kind, data, "the file", bounds)
    return got


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice!r} is written twice in one object")
    return dict(pairs)


def _read(kind: Any, value: Any, where: str, bounds: Bounds) -> Any:
    """Return ``value`` as ``kind``: a dataclass, a tuple or mapping of kinds, or a scalar."""
    if isinstance(kind, types.UnionType):
        inner = next(k for k in get_args(kind) if k is not types.NoneType)
        return None if value is None else _read(inner, value, where, bounds)
    origin = get_origin(kind)
    if origin is tuple:
        _expect(isinstance(value, list), where, value, "a list")
        item = get_args(kind)[0]
        return tuple(_read(item, v, f"{where} {i}", bounds) for i, v in enumerate(value))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: _read(str, v, f"{where} of {key}", bounds) for key, v in value.items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise unknown(where, str(value), get_args(kind))
        return value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and -_LARGEST < value < _LARGEST, where, value, "a finite number")
        return float(value)
    if kind in (int, bool, str):
        _expect(type(value) is kind, where, value, f"of type {kind.__name__}")
        return value
    _expect(isinstance(value, dict), where, value, "an object")
    return kind(**_members(kind, value, where, bounds))


def _members(kind: Any, value: dict[str, Any], where: str, bounds: Bounds) -> dict[str, Any]:
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise unknown(f"name in {where}", name, hints)
    members = {}
    for member in fields(kind):
        if member.name not in value:
            if member.default is MISSING:
                raise InputError(f"{where} has no {member.name}; add it")
            continue
        label = f"{where}'s {member.name}"
        got = _read(hints[member.name], value[member.name], label, bounds)
        low, high = bounds.get(member.name, (-math.inf, math.inf))
        if isinstance(got, int | float) and not low <= got <= high:
            raise InputError(
                f"{label} is {got:g}, outside {low:g} to {high:g}; give it in the unit of its name"
            )
        members[member.name] = got
    return members


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{where} is {str(value)[:_SHOWN]!r}; it must be {wanted}")
