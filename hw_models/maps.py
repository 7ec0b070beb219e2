"""Bit maps as hardware models take them, checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.spec import ModelSpec


def checked_maps(
    assignments: NDArray[np.integer], spec: ModelSpec, menu: Menu
) -> NDArray[np.int64]:
    """Return bit maps that fit a model and a menu, (K, N) or (K, 2N), C-contiguous.

    Raises:
        InputError: If their shape, type or range is wrong.
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
    return np.ascontiguousarray(maps, dtype=np.int64)
