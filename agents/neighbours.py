"""The maps next to a map, one step of one decision away: what tells its marginal losses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.steps import stepped
from dmpq.problem import Problem

Ints = NDArray[np.int64]


def neighbours(
    problem: Problem,
    centre: NDArray[np.integer],
    *,
    count: int,
    values: NDArray[np.float64] | None = None,
) -> Ints:
    """Return distinct maps one step from a map, within every limit, those in doubt first.

    A step is narrower by one format, or wider by one where another decision pays: the one, of the
    same layer or a later one, whose step down costs the objective least, so that a measurement
    resumes at the layer of the first. In doubt are steps whose price, objective per stored bit,
    is near the map's own: between the dearest step up and the cheapest step down.

    Args:
        problem: Says what sizes, the linearised objective and the limits are.
        centre: (D,), the map.
        count: Number of maps at most.
        values: (D, B), what each format costs; ``None`` for the linearised objective.

    Returns:
        (n, D), n <= ``count``; none for a map at either end, where nothing is to be exchanged.
    """
    values, sizes = problem.linear_values() if values is None else values, problem.sizes
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(np.float64))
    rows = np.arange(len(centre))

    def price(formats: Ints) -> NDArray[np.float64]:
        """Return what stepping to formats (D,) costs per bit saved, NaN where there is none."""
        saved = (sizes[rows, centre] - sizes[rows, formats]).astype(np.float64)
        lost = values[rows, formats] - values[rows, centre]
        exists = (formats >= 0) & (saved != 0) & (lost * saved > 0)
        prices: NDArray[np.float64] = np.full(len(rows), np.nan)
        np.divide(lost, saved, out=prices, where=exists)
        return prices

    narrower, wider = stepped(sizes, centre, -1), stepped(sizes, centre, 1)
    down, up = price(narrower), price(wider)
    if np.isnan(down).all() or np.isnan(up).all():
        return np.empty((0, len(centre)), np.int64)
    own = np.sqrt(np.nanmin(down) * np.nanmax(up))
    payer = _payers(down, layers)
    up[payer < 0] = np.nan
    steps = np.stack([down, up], axis=1).ravel()  # of each decision, down before up
    doubt = np.abs(np.log(steps / own))
    order = np.argsort(doubt, kind="stable")[: np.isfinite(doubt).sum()]
    found = np.empty((0, len(centre)), np.int64)
    for start in range(0, len(order) if count else 0, max(count, 1)):
        chosen = order[start : start + count]
        which, row = np.arange(len(chosen)), chosen // 2
        maps = np.repeat(centre.astype(np.int64)[None], len(chosen), axis=0)
        ups = chosen % 2 == 1
        maps[which, row] = np.where(ups, wider[row], narrower[row])
        paying = payer[row[ups]]
        maps[which[ups], paying] = narrower[paying]
        found = np.concatenate([found, maps[problem.feasible(maps)]])
        if len(found) >= count:
            break
    return found[:count]


def _payers(down: NDArray[np.float64], layers: NDArray[np.float64]) -> Ints:
    """Return which decision pays for a step up of each, (D,), -1 for none.

    Args:
        down: (D,), price of a step down, NaN where there is none.
        layers: (D,), layer of each decision.
    """
    payer = np.full(len(down), -1)
    cheapest = np.argsort(down, kind="stable")[: np.isfinite(down).sum()]
    for layer in np.unique(layers):
        first, second = (*cheapest[layers[cheapest] >= layer][:2].tolist(), -1, -1)[:2]
        here = np.flatnonzero(layers == layer)
        payer[here] = np.where(here == first, second, first)
    return payer
