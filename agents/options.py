"""Options of agents as text: ``NAME,option=value,...`` read into fields of an agent's class."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, did_you_mean

_LONGEST: Final = 60
_JOIN: Final = "+"
_NONE: Final = "none"
_BOOLS: Final = {"true": True, "false": False}
_RESCORE: Final = "rescore"


@dataclass(frozen=True)
class Option:
    """One option of an agent.

    Attributes:
        name: The field's.
        kind: What values it takes, in words.
        default: As it would be written; ``None`` where it must be given.
        text: What the class's docstring says of it; or empty.
        read: Takes text to a value; raises ``ValueError`` for what is none.
    """

    name: str
    kind: str
    default: str | None
    text: str
    read: Callable[[str], Any]


def split(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options of an agent as it is written, ``NAME,option=value,...``.

    Raises:
        InputError: If a part is no option, or one is given twice.
    """
    name, *parts = (part.strip() for part in text.split(","))
    given: dict[str, str] = {}
    for part in parts:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not option:
            raise InputError(
                f"{part[:_LONGEST]!r} is no option of {name[:_LONGEST]!r}; write "
                "NAME,option=value with commas between options, as in ppo,samples=8,epochs=5."
            )
        if option in given:
            raise InputError(
                f"The option {option[:_LONGEST]!r} of {name[:_LONGEST]!r} is given twice; give it "
                "once."
            )
        given[option] = value
    return name, given


def options_of(kind: type[Any]) -> dict[str, Option]:
    """Return what may be set of an agent's class as text, by name.

    Fields of a dataclass that are whole numbers, numbers, true or false, text, one of a few,
    tuples of these, or none. Others, such as a policy to start from, are for Python alone.
    """
    if not dataclasses.is_dataclass(kind):
        return {}
    said = _attributes(kind)
    found = {}
    for field in dataclasses.fields(kind):
        reader = _reader(_hint(kind, field)) if field.init else None
        if reader is not None:
            words, read = reader
            default = None if (value := _default(field)) is _MISSING else shown(value)
            found[field.name] = Option(field.name, words, default, said.get(field.name, ""), read)
    return found


def read_options(kind: type[Any], name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Return an agent's options as values.

    Args:
        kind: Its class.
        name: What the user calls it.
        given: Option → text.

    Raises:
        InputError: If there is no such option, or a value is none.
    """
    known = options_of(kind)
    values = {}
    for option, text in given.items():
        if option not in known:
            raise _no_such(option, name, known)
        try:
            values[option] = known[option].read(text)
        except ValueError as error:
            raise InputError(
                f"{option} of {name[:_LONGEST]!r} is {text[:_LONGEST]!r}; give "
                f"{known[option].kind}."
            ) from error
    return values


def label(name: str, values: Mapping[str, Any]) -> str:
    """Return a name with options, in one order and one spelling."""
    return ",".join([name, *(f"{option}={shown(values[option])}" for option in sorted(values))])


def shown(value: Any) -> str:
    """Return a value as it is written in an option."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return shown(value.value)
    if isinstance(value, tuple):
        return _JOIN.join(map(shown, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


def _no_such(option: str, name: str, known: Mapping[str, Option]) -> InputError:
    shown_name = name[:_LONGEST]
    if option == _RESCORE:
        return InputError(
            f"{shown_name!r} cannot be re-scored: {_RESCORE} measures again what a rule adds up, "
            "as mckp, gemq and frequency do; leave it out, or take such a rule."
        )
    if not known:
        return InputError(
            f"{shown_name!r} has no option {option[:_LONGEST]!r}, nor any other; leave it out."
        )
    return InputError(
        f"{shown_name!r} has no option {option[:_LONGEST]!r}{did_you_mean(option, known)}; choose "
        f"one of: {', '.join(known)}."
    )


class _Missing(Enum):
    MISSING = 0


_MISSING: Final = _Missing.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _MISSING


def _hint(kind: type[Any], field: dataclasses.Field[Any]) -> Any:
    """Return a field's type, or ``None`` where its module does not know it."""
    owner = next(one for one in kind.__mro__ if field.name in vars(one).get("__annotations__", {}))
    # By itself: another field's type may be known to type checkers alone.
    alone = type("One", (), {"__annotations__": {field.name: field.type}})
    try:
        return get_type_hints(alone, globalns=vars(sys.modules[owner.__module__]))[field.name]
    except NameError:
        return None


def _reader(hint: Any) -> tuple[str, Callable[[str], Any]] | None:
    """Return the words for a type's values and what reads one, ``None`` for others' types."""
    simple: dict[Any, tuple[str, Callable[[str], Any]]] = {
        int: ("a whole number", _whole),
        float: ("a number", _number),
        bool: ("true or false", _bool),
        str: ("text", str),
    }
    origin, inside = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and hint in simple:
        return simple[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([*hint])
    if origin is Literal:
        return _one_of(inside)
    if origin in (Union, types.UnionType) and types.NoneType in inside and len(inside) == 2:
        part = _reader(next(one for one in inside if one is not types.NoneType))
        return None if part is None else (f"{part[0]}, or none", _or_none(part[1]))
    if origin is tuple and len(inside) == 2 and inside[1] is Ellipsis:
        part = _reader(inside[0])
        return None if part is None else (f"{part[0]}, or several as in 3+2", _many(part[1]))
    return None


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _bool(text: str) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError(text)
    return _BOOLS[text.lower()]


def _one_of(values: Any) -> tuple[str, Callable[[str], Any]]:
    by_text = {shown(value): value for value in values}

    def read(text: str) -> Any:
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]

    return " or ".join([", ".join([*by_text][:-1]), [*by_text][-1]]).removeprefix(" or "), read


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == _NONE else read(text)


def _many(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: tuple(read(part.strip()) for part in text.split(_JOIN)) if text else ()


def _attributes(kind: type[Any]) -> dict[str, str]:
    """Return what docstrings of a class and its bases say of attributes, on one line each."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        section = re.search(
            r"^Attributes:\n((?:[ ]+.*\n|\n)*)", inspect.cleandoc(one.__doc__ or "") + "\n", re.M
        )
        for entry in re.finditer(
            r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M
        ):
            found[entry[1]] = re.sub(r":\w+:`[~.]?([^`]*)`", r"\1", " ".join(entry[2].split()))
    return {name: text.replace("``", "") for name, text in found.items()}
