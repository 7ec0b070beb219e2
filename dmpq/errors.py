"""The one exception that users see, and the hint that goes with a near miss."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_LONGEST: Final = 200
_OUT_OF_MEMORY: Final = ("out of memory", "not enough memory", "can't allocate memory")


class InputError(ValueError):
    """Bad input, in one sentence: what is wrong, the value, what is allowed, what to do.

    Commands print it and end with exit code 2.
    """


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest allowed name, or an empty string."""
    names = {name.casefold(): name for name in allowed}
    close = difflib.get_close_matches(value.casefold(), names, n=1, cutoff=0.6)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error's message, cut to a readable length, without stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sentence = lines[0].partition(". ")[0].rstrip(".:")
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - 3] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether there was too little memory: torch says so by a RuntimeError."""
    said = str(error).lower()
    torch_says = isinstance(error, RuntimeError) and any(sign in said for sign in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or torch_says


def unknown(what: str, value: str, allowed: Iterable[str], remedy: str = "") -> InputError:
    """Return the error for a name that is not on the list.

    Args:
        what: What the name should have named, for example ``"hardware"``.
        value: The name as given.
        allowed: Every name that would have been accepted.
        remedy: What else the user may do, as a clause without full stop; or empty.
    """
    names = sorted(allowed)
    value = value if isinstance(value, str) and len(value) <= _LONGEST else str(value)[:_LONGEST]
    hint = did_you_mean(value, names)
    listed = ", ".join(names)
    remedy = remedy.rstrip(".")
    tail = f"; {remedy[0].lower()}{remedy[1:]}" if remedy else ""
    return InputError(f"Unknown {what} {value!r}{hint}; choose one of: {listed}{tail}.")
