"""Reads JSON into frozen dataclasses, strictly: no unknown name, no wrong type, no wrong unit."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, unknown

MAX_FILE_BYTES: Final = 1 << 20
_LARGEST: Final = 1e300

Bounds = Mapping[str, tuple[float, float]]


def read_object(path: Path, schema: str) -> dict[str, Any]:
    """Return a file's JSON object, without its ``schema``.

    Raises:
        InputError: If it is too large, names something twice, or says another schema.
        OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError: If it cannot be read.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"it is larger than {MAX_FILE_BYTES} bytes")
    data = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    if not isinstance(data, dict) or data.pop("schema", None) != schema:
        raise InputError(f'it does not say "schema": "{schema}"')
    return data


def read_as(kind: Any, value: Any, where: str, bounds: Bounds) -> Any:
    """Return ``value`` as ``kind``: a dataclass, a tuple or mapping of kinds, or a scalar.

    Args:
        kind: The type wanted.
        value: Parsed JSON.
        where: What the value is, for the error.
        bounds: Least and largest value of a number, by the name of its field.

    Raises:
        InputError: If it is something else, without full stop.
    """
    if isinstance(kind, types.UnionType):
        inner = next(k for k in get_args(kind) if k is not types.NoneType)
        return None if value is None else read_as(inner, value, where, bounds)
    origin = get_origin(kind)
    if origin is tuple:
        _expect(isinstance(value, list), where, value, "a list")
        inner = get_args(kind)[0]
        return tuple(read_as(inner, v, f"{where} {i}", bounds) for i, v in enumerate(value))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: read_as(str, v, f"{where} of {key}", bounds) for key, v in value.items()}
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
        got = read_as(hints[member.name], value[member.name], f"{where}'s {member.name}", bounds)
        low, high = bounds.get(member.name, (-math.inf, math.inf))
        if isinstance(got, int | float) and not low <= got <= high:
            raise InputError(
                f"{where}'s {member.name} is {got:g}, outside {low:g} to {high:g}; give it in the "
                "unit of its name"
            )
        members[member.name] = got
    return members


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice!r} is written twice in one object")
    return dict(pairs)


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{where} is {str(value)[:60]!r}; it must be {wanted}")
