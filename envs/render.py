"""Pictures of bit maps: a table for the terminal, a heat map for videos and notebooks."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.problem import Problem

CELL: Final = 14
"""Side of one expert's square, pixels."""
GAP: Final = 2
"""White space between squares, pixels."""

UNDECIDED: Final = -1

_GREY: Final = (200, 200, 200)
_WHITE: Final = 255
_VIRIDIS: Final = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)


def palette(formats: int) -> NDArray[np.uint8]:
    """Return one colour per format, dark for narrow and bright for wide, and grey at the end.

    The last row (index -1) is the colour of what is not decided yet; shape (formats + 1, 3).
    """
    anchors = np.linspace(0, 1, len(_VIRIDIS))
    at = np.linspace(0, 1, formats)
    colours = [np.interp(at, anchors, channel) for channel in _VIRIDIS.T]
    return np.vstack([np.stack(colours, axis=1), _GREY]).round().astype(np.uint8)


def layers(problem: Problem, assignment: NDArray[np.integer]) -> list[NDArray[np.integer]]:
    """Return the menu indices of each layer, (experts, projections); -1 where undecided."""
    spec = problem.spec
    grid = problem.expand(assignment[None])[0].reshape(spec.num_experts, -1)
    ends = np.cumsum([layer.num_experts for layer in spec.moe_layers])[:-1]
    return np.split(grid, ends)


def table(problem: Problem, assignment: NDArray[np.integer], title: str) -> str:
    """Return a table with a row per layer and a column per expert.

    A cell is a menu key, two with a stroke between where projections differ, and a dot where
    nothing is decided.
    """
    names = np.array([*problem.menu.keys, "."])
    rows = [["/".join(names[cell]) for cell in layer] for layer in layers(problem, assignment)]
    width = max(len(cell) for row in rows for cell in row)
    digits = len(str(len(rows) - 1))
    lines = [
        f"layer {index:>{digits}} | " + " ".join(cell.rjust(width) for cell in row)
        for index, row in enumerate(rows)
    ]
    return "\n".join([title, *lines]) + "\n"


def heat_map(problem: Problem, assignment: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the map as an image, uint8 (height, width, 3).

    A row of squares is a layer, a square an expert (gate+up above down where they differ). The
    strip at the bottom shows the colours of the menu's formats, narrowest first.
    """
    colours = palette(len(problem.menu))
    rows = layers(problem, assignment)
    columns = max(len(problem.menu), *(len(row) for row in rows))
    pitch = CELL + GAP
    image = np.full(((len(rows) + 1) * pitch + 2 * GAP, columns * pitch + GAP, 3), _WHITE)
    strip = np.arange(len(problem.menu))[:, None]
    for index, cells in enumerate([*rows, strip]):
        # The legend stands apart by one more gap.
        top = GAP + index * pitch + (GAP if index == len(rows) else 0)
        repeated = cells.repeat(CELL // cells.shape[1], axis=1)
        for column, cell in enumerate(repeated):
            left = GAP + column * pitch
            image[top : top + CELL, left : left + CELL] = colours[cell][:, None]
    return image.astype(np.uint8)
