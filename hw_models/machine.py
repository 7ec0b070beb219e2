"""The facts of this machine that a measurement depends on; no host name among them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

from dmpq.errors import InputError, first_line

_CPUS: Final = Path("/sys/devices/system/cpu")
_CPUINFO: Final = Path("/proc/cpuinfo")
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
UNKNOWN_CACHE_BYTES: Final = 64 << 20
"""Taken where the system does not tell: more than most caches, so that weights rotate enough."""


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the CPU in words: its model, where the system tells it."""
    fields: dict[str, str] = {}
    for line in _lines(cpuinfo):
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    named = fields.get("model name") or fields.get("model") or platform.processor()
    return " ".join(named.split()) or platform.machine()


def cpu_cache_bytes(cpus: Path = _CPUS) -> int:
    """Return the last-level caches of all CPUs together, bytes.

    Caches shared by several CPUs count once; chips of several dies have several.
    """
    found: dict[int, dict[str, int]] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size = _text(index / "level"), _text(index / "size")
        if level.isdecimal() and size[-1:] in _UNITS and size[:-1].isdecimal():
            shared = _text(index / "shared_cpu_list") or str(index)
            kind = _text(index / "type")
            found.setdefault(int(level), {})[f"{shared} {kind}"] = (
                int(size[:-1]) * _UNITS[size[-1]]
            )
    return sum(found[max(found)].values()) if found else UNKNOWN_CACHE_BYTES


def memory_bytes() -> int:
    """Return the machine's memory.

    Raises:
        InputError: If the system does not tell.
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise InputError(
            f"The system does not say how much memory there is ({first_line(error)}); measure on "
            "Linux or macOS, or choose a device by name."
        ) from error


def cache_folder(kind: str = "measurements") -> Path:
    """Return the folder where what was measured or simulated on this machine is kept.

    In ``$XDG_CACHE_HOME``, which must be an absolute path to count, or in ``~/.cache``.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "dmpq" / kind


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""
