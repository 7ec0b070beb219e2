"""Which column of a table serves which purpose: by the usual names, or as the user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmpq.errors import InputError, did_you_mean


def named(name: str, names: Sequence[str], *, flag: str, where: str) -> str:
    """Return a column that the user named.

    Raises:
        InputError: If there is none of that name.
    """
    if name in names:
        return name
    raise InputError(
        f"{where} has no column {name!r}{did_you_mean(name, names)}; it has "
        f"{', '.join(names)[:200]}: give one of these as {flag}."
    )


def usual(
    names: Sequence[str], known: Sequence[str], *, what: str, flag: str | None, where: str
) -> str:
    """Return the first column that has one of the usual names.

    Args:
        names: Of the table.
        known: The usual names, the surest first.
        what: What the column holds, in words.
        flag: By which the user may name it; ``None`` where there is none.
        where: What table it is.

    Raises:
        InputError: If there is none.
    """
    found = next((name for name in known if name in names), None)
    if found is None:
        remedy = f"name it with {flag}" if flag else "rename it to one of these"
        raise InputError(
            f"{where} has no column of {what} ({', '.join(known)}); it has "
            f"{', '.join(names)[:200] or 'none'}: {remedy}."
        )
    return found


def pair(names: Sequence[str], known: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the first pair of usual names that the table has."""
    return next((both for both in known if set(both) <= set(names)), None)


def renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Return a row's values by purpose."""
    return {purpose: row.get(column) for purpose, column in columns.items()}
