"""Files that are whole or not there: atomic replacement, and journals that survive a crash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError


def replace_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never half.

    The file gets the mode that an ordinary ``open`` would give it.

    Raises:
        InputError: If a device, a pipe or a socket is there, which would be replaced by a file.
    """
    target = Path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(
            f"{target} is no ordinary file, and would be replaced by one; give another name."
        )
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def safetensors_bytes(
    arrays: Mapping[str, NDArray[Any]], *, metadata: dict[str, str] | None = None
) -> bytes:
    """Return named arrays, of whatever memory layout, as one safetensors file.

    safetensors 0.8 writes the buffer under a strided view instead of the view.
    """
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(whole, metadata=metadata)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[None]:
    """Lock a file or folder against another run while the block lasts, where locks exist.

    Args:
        path: What is locked.
        folder: The output folder, for the error.

    Raises:
        InputError: If another run is at work there, or has just moved or removed it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            raise InputError(
                f"Another run is at work in {folder}; wait for its end, or give another --out."
            )
        yield
    finally:
        os.close(handle)


def goes_on(folder: Path, name: str, state: Mapping[str, Any]) -> bool:
    """Return whether a folder holds unfinished work of this very state; else clear it for that.

    Args:
        folder: Of the unfinished work; whatever else is in it is removed.
        name: The file that says what the work is made of.
        state: What it is made of, plain JSON values.
    """
    text = json.dumps(state, sort_keys=True)
    made_of = {"made_of": hashlib.sha256(text.encode()).hexdigest()}
    try:
        if json.loads((folder / name).read_text("utf-8")) == made_of:
            return True
    except (OSError, ValueError, RecursionError):
        pass
    for left in folder.iterdir():
        remove(left)
    replace_atomically(folder / name, json.dumps(made_of).encode())
    return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(made: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, which is removed when the new one is there.

    Args:
        made: The finished one, on the same file system.
        folder: Where to; what is there, if anything, is lost.
    """
    before = folder.with_name(f".{folder.name}.before")
    remove(before)
    if os.path.lexists(folder):
        os.rename(folder, before)
    os.rename(made, folder)
    remove(before)


class JsonLines:
    """An append-only file of JSON objects, one a line; a torn last line is cut on opening."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._file = self.path.open("a", encoding="utf-8")

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Add one object and hand it to the operating system."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the objects written so far; a damaged line is passed over."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line, parse_constant=_refuse_constant)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()
