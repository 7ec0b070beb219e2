"""The maps next to a map, one step of one decision away: what tells its marginal losses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmpq.problem import Problem

Ints = NDArray[np.int64]


def neighbours(problem: Problem, centre: NDArray[np.integer], *, count: int) -> Ints:
    """Return distinct maps one step from a map, within every limit, those in doubt first.

    A step is narrower by one format, or wider by one where another decision pays: the one, of the
    same layer or a later one, whose step down costs the objective least, so that a measurement
    resumes at the layer of the first. In doubt are steps whose price, objective per stored bit,
    is near the map's own: between the dearest step up and the cheapest step down.

    Args:
        problem: Says what sizes, the linearised objective and the limits are.
        centre: (D,), the map.
        count: Number of maps at most.

    Returns:
        (n, D), n <= ``count``; none for a map at either end, where nothing is to be exchanged.
    """
    values, sizes = problem.linear_values(), problem.sizes
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(np.float64))
    order = np.argsort(sizes, axis=1, kind="stable")
    rows = np.arange(len(centre))
    place = np.argmax(order == centre[:, None], axis=1)

    def price(places: Ints) -> tuple[Ints, NDArray[np.float64]]:
        """Return formats (D,) and what they cost per bit saved, NaN where there is none."""
        exists = (places >= 0) & (places < order.shape[1])
        formats = order[rows, np.clip(places, 0, order.shape[1] - 1)]
        saved = (sizes[rows, centre] - sizes[rows, formats]).astype(np.float64)
        lost = values[rows, formats] - values[rows, centre]
        exists &= (saved != 0) & (lost * saved > 0)
        return formats, np.divide(lost, saved, out=np.full(len(rows), np.nan), where=exists)

    narrower, down = price(place - 1)
    wider, up = price(place + 1)
    if np.isnan(down).all() or np.isnan(up).all():
        return np.empty((0, len(centre)), np.int64)
    own = np.sqrt(np.nanmin(down) * np.nanmax(up))
    found: list[tuple[float, Ints]] = []
    for row in rows:
        if not np.isnan(down[row]):
            moved = centre.astype(np.int64)
            moved[row] = narrower[row]
            found.append((abs(np.log(down[row] / own)), moved))
        pays = (layers >= layers[row]) & (rows != row) & ~np.isnan(down)
        if not np.isnan(up[row]) and pays.any():
            other = int(np.flatnonzero(pays)[down[pays].argmin()])
            moved = centre.astype(np.int64)
            moved[row], moved[other] = wider[row], narrower[other]
            found.append((abs(np.log(up[row] / own)), moved))
    found.sort(key=lambda pair: pair[0])
    maps = np.array([moved for _, moved in found]).reshape(-1, len(centre))
    return maps[problem.feasible(maps)][:count] if len(maps) else maps
