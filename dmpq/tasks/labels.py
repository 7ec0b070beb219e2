"""Labels of data against the classes of a model's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dmpq.errors import InputError, did_you_mean
from dmpq.tasks.examples import Encoder

_MOST_DIGITS: Final = 18
"""Of a class's number; Python refuses to read numbers of some thousands."""


def class_of(label: Any, encoder: Encoder) -> int:
    """Return the class of a label: by its name in the model's ``label2id``, or by its number.

    Args:
        label: As the data has it.
        encoder: Knows the head's classes.

    Raises:
        InputError: If the head has no such class.
    """
    name = str(label).strip()
    if name in encoder.labels:
        return encoder.labels[name]
    if name.isdecimal() and len(name) <= _MOST_DIGITS and int(name) < encoder.classes:
        return int(name)
    known = ", ".join(encoder.labels)
    raise InputError(
        f"The data has the label {name[:80]!r}{did_you_mean(name, encoder.labels)}, and the "
        f"model's head has {encoder.classes} classes: {known[:200]}; give data with the model's "
        "labels, or name another column with --label-column."
    )


def text_of(value: Any) -> str:
    """Return a text of the data as it is; what is none would be judged by its spelling in Python.

    Raises:
        InputError: If it is missing, or no text.
    """
    if isinstance(value, str):
        return value
    raise InputError(
        f"The data holds {str(value)[:80]!r} where a text should be; correct it, leave the "
        "example out, or name another column with --text-column."
    )


def refuse_long(ids: Sequence[int], encoder: Encoder, text: str) -> None:
    """Refuse an example that the model cannot read whole.

    Raises:
        InputError: With the text's beginning, its length and the limit.
    """
    if len(ids) > encoder.longest:
        raise InputError(
            f"The example that begins with {text[:40]!r} has {len(ids)} tokens, and the model "
            f"reads {encoder.longest} (--sequence-length and the model's own limit); shorten it, "
            "or leave it out."
        )
    if not ids:
        raise InputError("The data holds an example without text; leave it out.")


def missing(package: str, metric: str) -> InputError:
    """Return the error for a metric's package that is not installed."""
    return InputError(
        f"{metric[0].upper()}{metric[1:]} is computed by {package}, which is not installed; "
        "install dmpq[tasks]."
    )
