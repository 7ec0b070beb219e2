"""Freed memory goes back to the system at once, so that a peak is what is in use.

glibc serves blocks below a threshold from its heap, where freed ones leave holes that count as
resident; and it raises the threshold, up to 32 MiB, to the largest block that was ever freed
(mallopt(3), M_MMAP_THRESHOLD). Matrices of experts are of that size: half of the memory that a
streamed profile took was such holes.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
_BLOCK: Final = 1 << 20
"""Bytes from which on a block is a mapping of its own."""


def return_freed_memory() -> bool:
    """Keep large blocks out of this process's heap from now on.

    Returns:
        Whether the C library has been told; others than glibc are left as they are.
    """
    try:
        told: int = ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BLOCK)
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(told)
