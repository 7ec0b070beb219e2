"""Description files, read strictly: JSON of one schema into frozen dataclasses, or one sentence.

Every number has bounds by its name: a figure in another unit than its name says is refused.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, unknown

MAX_FILE_BYTES: Final = 1 << 20
_LARGEST: Final = 1e300
# ValueError: no UTF-8, no JSON, or an integer of more digits than Python reads.
_UNREADABLE: Final = (OSError, ValueError, RecursionError)

Bounds = Mapping[str, tuple[float, float]]
T = TypeVar("T")


def read_file(
    path: Path,
    kind: type[T],
    *,
    schema: str,
    what: str,
    bounds: Bounds,
    max_bytes: int = MAX_FILE_BYTES,
) -> T:
    """Read a description file.

    Args:
        path: The file.
        kind: A frozen dataclass whose members are dataclasses, tuples, mappings and scalars.
        schema: What its ``"schema"`` must say.
        what: What the file describes, for messages: ``"device"``.
        bounds: Name of a number → least and greatest value.
        max_bytes: Size of the largest file that is read.

    Raises:
        InputError: If it cannot be read or is no such file, with what is wrong in it.
    """
    try:
        data = _load(path, max_bytes)
        if not isinstance(data, dict) or data.pop("schema", None) != schema:
            raise InputError(f'it does not say "schema": "{schema}"')
        described: T = _read(kind, data, f"the {what}", bounds)
    except InputError as error:
        raise InputError(
            f"The {what} file {path} is refused: {str(error).rstrip('.')}."
        ) from error
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"The {what} file {path} cannot be read: {reason}.") from error
    return described


def schema_of(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """Return what a file's ``"schema"`` says; ``None`` where it cannot be read or says nothing."""
    try:
        data = _load(path, max_bytes)
    except (InputError, *_UNREADABLE):
        return None
    schema = data.get("schema") if isinstance(data, dict) else None
    return schema if isinstance(schema, str) else None


def refuse_unsourced(
    figures: Iterable[str], sources: Mapping[str, str], assumed: Collection[str]
) -> None:
    """Refuse a figure that nobody stands behind.

    Raises:
        InputError: If one of ``figures`` has no source and is not listed as assumed.
    """
    for figure in figures:
        if figure not in sources and figure not in assumed:
            raise InputError(f"{figure} has neither a source nor a place under assumed; add one")


def _load(path: Path, max_bytes: int) -> Any:
    if path.stat().st_size > max_bytes:
        raise InputError(f"it is larger than {max_bytes} bytes")
    return json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)


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
        inner = get_args(kind)[0]
        return tuple(_read(inner, v, f"{where} {i}", bounds) for i, v in enumerate(value))
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
    return kind(**_read_members(kind, value, where, bounds))


def _read_members(kind: Any, value: dict[str, Any], where: str, bounds: Bounds) -> dict[str, Any]:
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
        got = _read(hints[member.name], value[member.name], f"{where}'s {member.name}", bounds)
        low, high = bounds.get(member.name, (-math.inf, math.inf))
        if isinstance(got, int | float) and not low <= got <= high:
            raise InputError(
                f"{where}'s {member.name} is {got:g}, outside {low:g} to {high:g}; give it in the "
                "unit of its name"
            )
        members[member.name] = got
    return members


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{where} is {str(value)[:60]!r}; it must be {wanted}")
