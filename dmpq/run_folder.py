"""A run's output folder: it belongs to one configuration, and to one process at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.files import locked, replace_atomically

_MARK: Final = "config.json"
_WRITTEN: Final = frozenset(
    {"bitmap.json", "bitmap.partial.json", "history.jsonl", "history.partial.jsonl"}
    | {"journal.jsonl", "profile.safetensors", "summary.json", "policy", "plane.png", "bits.png"}
    | {"front.csv", "front.png", "maps"}
)


def run_folder(config: SearchConfig) -> Path:
    """Return the run's folder, made if need be; it belongs to one configuration.

    Raises:
        InputError: If it cannot be written, or belongs to something else.
    """
    name = f"{Path(config.model).name}-{Path(config.hw).stem}-{config.digest()}"
    if config.out is not None and not config.out.strip():
        raise InputError("--out is empty; give a folder, or leave it out.")
    folder = Path(config.out) if config.out is not None else Path("runs") / name
    claim(folder, config.digest(), asdict(config), written=_WRITTEN)
    return folder


def claim(folder: Path, digest: str, config: dict[str, Any], *, written: Collection[str]) -> None:
    """Make a folder if need be, and mark it as belonging to a configuration.

    Args:
        folder: The folder.
        digest: Hash of the configuration.
        config: The configuration, to be read by people.
        written: Names of what will be written there: a folder that holds one without the mark may
            be somebody else's.

    Raises:
        InputError: If it cannot be written, or belongs to something else.
    """
    mark = folder / _MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = _owner(mark)
        foreign = sorted(set(written) & {file.name for file in folder.iterdir()})
        if owner is None and foreign:
            raise InputError(
                f"{folder} holds {foreign[0]} but no {_MARK} of a run, so that it may be somebody "
                "else's; nothing was written: give another --out."
            )
        if owner is None:
            described = {"digest": digest, **config}
            replace_atomically(mark, (json.dumps(described, indent=2) + "\n").encode())
        elif not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(
            f"The output folder {folder} cannot be used ({error.strerror}); give another with "
            "--out."
        ) from error
    if owner not in (None, digest):
        raise InputError(
            f"{folder} holds the run of another configuration ({owner}); nothing was written: "
            "give another --out, or remove the folder."
        )


def _owner(mark: Path) -> str | None:
    """Return the digest of the configuration that a folder belongs to; ``None`` where to none."""
    if not os.path.lexists(mark):
        return None
    try:
        match json.loads(mark.read_text(encoding="utf-8")):
            case {"digest": str(digest)}:
                return digest
    except (ValueError, RecursionError):
        pass
    return "damaged config.json"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the run's folder against a second run while the block lasts, where locks exist.

    Raises:
        InputError: If another run is at work in it.
    """
    with locked(folder / _MARK, folder):
        yield
