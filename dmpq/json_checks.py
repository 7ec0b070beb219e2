"""Checks of values read from JSON: each refuses what it does not allow, by name and value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from dmpq.errors import InputError, unknown

_MAX_INTEGER: Final = 1 << 63

Check = Callable[[str, Any], None]
"""Takes where a value stands, for the sentence, and the value; raises InputError."""


def bad(where: str, value: Any, allowed: str) -> InputError:
    """Return the error that a value is not what is allowed."""
    return InputError(f"{where} is {str(value)[:60]!r}; it must be {allowed}.")


def plain(value: Any, where: str) -> Any:
    """Return ``value`` in plain JSON types, refusing what JSON or a reader cannot hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        strange = next((key for key in value if not isinstance(key, str)), None)
        if strange is not None:
            raise bad(f"a name in {where}", strange, "text")
        return {key: plain(member, f"{where}.{key}") for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member, where) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise bad(where, value, "a finite number")
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise InputError(f"{where} is an integer of more than 63 bits; give a smaller one.")
    if value is not None and not isinstance(value, str | int | float):
        raise bad(where, type(value).__name__, "text, a number, true, false or null")
    return value


def members(where: str, value: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Return a JSON object after checking that it has these names and no others."""
    if not isinstance(value, Mapping):
        raise bad(where, value, "a JSON object")
    for name in value:
        if name not in names:
            raise unknown(f"name in {where}", str(name), names)
    for name in names:
        if name not in value:
            raise InputError(f"The {where} has no {name!r}; add it.")
    return value


def text_value(where: str, value: Any) -> None:
    """Refuse all but printable text."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise bad(where, value, "printable text")


def optional_text(where: str, value: Any) -> None:
    """Refuse all but printable text and null."""
    if value is not None:
        text_value(where, value)


def boolean(where: str, value: Any) -> None:
    """Refuse all but true and false."""
    if not isinstance(value, bool):
        raise bad(where, value, "true or false")


def number(where: str, value: Any) -> None:
    """Refuse all but numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(where, value, "a number")


def limit(where: str, value: Any) -> None:
    """Refuse all but positive numbers and null, which is no limit."""
    if value is not None:
        number(where, value)
        if value <= 0:
            raise bad(where, value, "a positive number, or null for no limit")


def not_negative(where: str, value: Any) -> None:
    """Refuse all but numbers of 0 or more."""
    number(where, value)
    if value < 0:
        raise bad(where, value, "0 or more")


def whole(least: int) -> Check:
    """Return a check for whole numbers of at least so much."""

    def check(where: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad(where, value, f"a whole number, {least} or more")

    return check


def one_of(*allowed: str) -> Check:
    """Return a check for one of some texts."""

    def check(where: str, value: Any) -> None:
        if value not in allowed:
            raise unknown(where, str(value), allowed)

    return check


def matches(pattern: re.Pattern[str], allowed: str) -> Check:
    """Return a check for text that a pattern matches whole, said in words."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise bad(where, value, allowed)

    return check


def record(**checks: Check) -> Check:
    """Return a check for an object with exactly these members."""

    def check(where: str, value: Any) -> None:
        for name, member in members(where, value, tuple(checks)).items():
            checks[name](f"{where}.{name}", member)

    return check


def table(member: Check, name: Check = text_value) -> Check:
    """Return a check for an object of any names, all of whose members are alike."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise bad(where, value, "a JSON object")
        for key, item in value.items():
            name(f"a name in {where}", key)
            member(f"{where}.{key}", item)

    return check


def list_of(member: Check) -> Check:
    """Return a check for a list, not empty, all of whose members are alike."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, list) or not value:
            raise bad(where, value, "a list that is not empty")
        for item in value:
            member(f"a member of {where}", item)

    return check


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its pairs, none of which has another's name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{name[:60]!r} is written twice in one object; write it once.")
        found[name] = value
    return found


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, as ``json.loads`` names them."""
    raise InputError(f"It holds {name}, which is no JSON number; write a finite number.")
