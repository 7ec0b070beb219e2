"""The JSON file that a hardware command writes: refused before the work, then written whole."""

from __future__ import annotations

from pathlib import Path

from dmpq.errors import InputError
from dmpq.files import replace_atomically


def check_out(out: Path) -> None:
    """Refuse a file that could not be written, or that is no JSON file's name.

    Raises:
        InputError: If it is none in a folder that exists.
    """
    if out.suffix != ".json" or out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out} is no .json file in a folder that exists; give one.")


def write_out(out: Path, content: bytes) -> None:
    """Write the file, whole or not at all.

    Raises:
        InputError: If the system does not let it be written.
    """
    try:
        replace_atomically(out, content)
    except OSError as error:
        raise InputError(
            f"--out {str(out)[:200]} cannot be written ({error.strerror}); give another."
        ) from error
