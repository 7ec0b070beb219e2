"""Description files, read strictly: JSON of one schema into frozen dataclasses, or one sentence.

Every number has bounds by its name: a figure in another unit than its name says is refused.
"""

from __future__ import annotations

import json
import math
import stat
import types
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, did_you_mean, unknown

MAX_FILE_BYTES: Final = 1 << 20
_LARGEST: Final = 1e300
_SHOWN: Final = 60
UNREADABLE: Final = (OSError, ValueError, RecursionError)
"""What reading a file may raise: a ``ValueError`` where it is no UTF-8, no JSON, or has an integer
of more digits than Python reads."""

Bounds = Mapping[str, tuple[float, float]]
T = TypeVar("T")

_TYPES: Final = {int: "a whole number", bool: "true or false", str: "text"}


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
        data = load_object(path, schema=schema, max_bytes=max_bytes)
        described: T = _read(kind, data, f"the {what}", bounds)
    except InputError as error:
        raise InputError(
            f"The {what} file {path} is refused: {str(error).rstrip('.')}."
        ) from error
    except UNREADABLE as error:
        raise InputError(
            f"The {what} file {path} cannot be read: {why_unreadable(error)}."
        ) from error
    return described


def load_object(path: Path, *, schema: str, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file, without its ``"schema"``.

    Raises:
        InputError: If it is no object of this schema, or names something twice.
        OSError, ValueError, RecursionError: One of :data:`UNREADABLE`, if it is no JSON.
    """
    data = _load(path, max_bytes)
    said = data.pop("schema", None) if isinstance(data, dict) else None
    if said != schema:
        other = "" if said is None else f", but {str(said)[:60]!r}"
        raise InputError(f'it does not say "schema": "{schema}"{other}')
    found: dict[str, Any] = data
    return found


def why_unreadable(error: BaseException) -> str:
    """Return one clause for one of :data:`UNREADABLE`, in a user's words."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"it is no JSON ({error.msg}, line {error.lineno} column {error.colno})"
    return "one of its integers has too many digits"


def refuse_bad_name(name: str) -> None:
    """Refuse what cannot stand before the slash of ``NAME/STACK``, or after it.

    Raises:
        InputError: If it is blank, long, not printable, or holds a slash.
    """
    plain = name.isprintable() and name == name.strip() and "/" not in name
    if not plain or not 0 < len(name) <= _SHOWN:
        raise InputError(
            f"{name[:_SHOWN]!r} is no name; give printable text without a slash, of at most "
            f"{_SHOWN} characters"
        )


def schema_of(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """Return what a file's ``"schema"`` says; ``None`` where it cannot be read or says nothing."""
    try:
        data = _load(path, max_bytes)
    except (InputError, *UNREADABLE):
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
        if not sources.get(figure, "").strip() and figure not in assumed:
            raise InputError(f"{figure} has neither a source nor a place under assumed; add one")


def _load(path: Path, max_bytes: int) -> Any:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise InputError("it is no regular file")
    if found.st_size > max_bytes:
        raise InputError(f"it is larger than {max_bytes} bytes")
    return json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice[:_SHOWN]!r} is written twice in one object; write it once")
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
        return tuple(_read(inner, v, f"{where}[{i}]", bounds) for i, v in enumerate(value))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, value, "an object")
        return {
            _read(str, key, f"a name in {where}", bounds): _read(str, v, f"{where}.{key}", bounds)
            for key, v in value.items()
        }
    if origin is Literal:
        allowed = get_args(kind)
        hint = did_you_mean(str(value), allowed)
        _expect(value in allowed, where, value, f"one of {', '.join(allowed)}{hint}")
        return value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and -_LARGEST < value < _LARGEST, where, value, "a finite number")
        return float(value)
    if kind in (int, bool, str):
        _expect(type(value) is kind, where, value, _TYPES[kind])
        if kind is str:
            _expect(not any(map(_is_control, value)), where, value, "text without control codes")
        return value
    _expect(isinstance(value, dict), where, value, "an object")
    return kind(**_read_members(kind, value, where, bounds))


def _read_members(kind: Any, value: dict[str, Any], where: str, bounds: Bounds) -> dict[str, Any]:
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise unknown(f"name in {where}", name[:_SHOWN], hints)
    members = {}
    for member in fields(kind):
        if member.name not in value:
            if member.default is MISSING:
                raise InputError(f"{where} has no {member.name}; add it")
            continue
        got = _read(hints[member.name], value[member.name], _inside(where, member.name), bounds)
        if member.name == "source" and not got.strip():
            raise InputError(f"{where} has an empty source; say where its figures are from")
        low, high = bounds.get(member.name, (-math.inf, math.inf))
        if isinstance(got, int | float) and not low <= got <= high:
            raise InputError(
                f"{_inside(where, member.name)} is {got:g}, outside {low:g} to {high:g}; give it "
                "in the unit of its name"
            )
        members[member.name] = got
    return members


def _inside(where: str, name: str) -> str:
    """Return where a member is: ``the device's stacks[0].kernels[0].bits``."""
    if "' " in where or "'s " in where:
        return f"{where}.{name}"
    return f"{where}' {name}" if where.endswith("s") else f"{where}'s {name}"


def _is_control(character: str) -> bool:
    """Return whether a character could do something to a terminal, or is half of one."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{where} is {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    """Return a value as JSON would write it, cut."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return repr(text) if isinstance(value, str) else text
