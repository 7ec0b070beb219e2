"""Bit maps as hardware models take them: checked, and summed over a table."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models.base import Floats
from dmpq.spec import ModelSpec

_DECISIONS_AT_ONCE: Final = 1 << 20


def checked_maps(
    assignments: NDArray[np.integer], spec: ModelSpec, menu: Menu
) -> NDArray[np.int64]:
    """Return bit maps that fit a model and a menu, (K, N) or (K, 2N), C-contiguous.

    Raises:
        InputError: If their shape, type or range is wrong, or one prunes half an expert.
    """
    maps = np.asarray(assignments)
    experts = spec.num_experts
    if maps.ndim != 2 or maps.shape[1] not in (experts, 2 * experts):
        raise InputError(
            f"The assignments have shape {maps.shape}, but {spec.name} has {experts} experts; "
            f"give an array of shape (maps, {experts}) or (maps, {2 * experts})."
        )
    if not np.issubdtype(maps.dtype, np.integer):
        raise InputError(f"The assignments are {maps.dtype}; give integer indices into the menu.")
    if maps.size and not 0 <= maps.min() <= maps.max() < len(menu):
        raise InputError(
            f"The assignments reach from {maps.min()} to {maps.max()}, but the menu has "
            f"{len(menu)} formats; give indices from 0 to {len(menu) - 1}."
        )
    if maps.shape[1] != experts:
        menu.check_whole(maps.reshape(len(maps), experts, 2))
    return np.ascontiguousarray(maps, dtype=np.int64)


def summed(table: Floats, maps: NDArray[np.integer]) -> Floats:
    """Return the sum over each map's experts of a table (N, 2, B), shape (K,).

    Added in the order of the experts whatever stands beside: a map costs the same to the bit
    alone or among others.
    """
    experts, _, formats = table.shape
    flat = table.sum(axis=1) if maps.shape[1] == experts else table.reshape(-1, formats)
    start = np.arange(len(flat)) * formats
    step = max(1, _DECISIONS_AT_ONCE // len(flat))
    parts = [
        np.ascontiguousarray(flat.ravel()[start + maps[i : i + step]]).sum(axis=1)
        for i in range(0, max(len(maps), 1), step)
    ]
    total: Floats = np.concatenate(parts)
    return total
