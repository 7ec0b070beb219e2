"""The one exception that users see, and the hint that goes with a near miss."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, in one sentence: what is wrong, the value, what is allowed, what to do.

    Commands print it and end with exit code 2.
    """


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def unknown(what: str, value: str, allowed: Iterable[str], remedy: str = "") -> InputError:
    """Return the error for a name that is not on the list.

    Args:
        what: What the name should have named, for example ``"hardware"``.
        value: The name as given.
        allowed: Every name that would have been accepted.
        remedy: What else the user may do; a sentence, or empty.
    """
    names = sorted(allowed)
    hint = did_you_mean(value, names)
    listed = ", ".join(names)
    tail = f" {remedy}" if remedy else ""
    return InputError(f"Unknown {what} {value!r}{hint}; choose one of: {listed}.{tail}")
