"""One step of a decision: the next larger or smaller of its formats, by what it stores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def stepped(sizes: Ints, assignment: NDArray[np.integer], by: int) -> Ints:
    """Return the format that each decision has ``by`` steps up its menu, -1 where there is none.

    Args:
        sizes: (D, B), stored bits of each format.
        assignment: (D,), menu indices.
        by: Steps, positive for larger formats.

    Returns:
        (D,), menu indices.
    """
    order = np.argsort(sizes, axis=1, kind="stable")
    place = (order == np.asarray(assignment)[:, None]).argmax(1) + by
    last = sizes.shape[1] - 1
    formats = np.take_along_axis(order, np.clip(place, 0, last)[:, None], axis=1)[:, 0]
    return np.where((place >= 0) & (place <= last), formats, -1)
