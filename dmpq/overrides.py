"""Instance attributes that hold while a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

_MISSING: Final = object()


@contextmanager
def overridden(objects: Sequence[object], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Set an attribute on each object itself; afterwards each has what it had before.

    Written past ``__setattr__``, so that nothing registers what it holds. Blocks may be nested.

    Args:
        objects: Any with a ``__dict__``, such as modules.
        name: Of the attribute.
        values: One per object.
    """
    before = [vars(target).get(name, _MISSING) for target in objects]
    for target, value in zip(objects, values, strict=True):
        vars(target)[name] = value
    try:
        yield
    finally:
        for target, value in zip(objects, before, strict=True):
            if value is _MISSING:
                del vars(target)[name]
            else:
                vars(target)[name] = value
