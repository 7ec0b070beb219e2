"""What must be timed before a model can be priced for a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dmpq.formats import Format, Menu
from dmpq.hw_models.base import Floats, Workload
from dmpq.hw_models.measurements import Measurements, Points
from dmpq.hw_models.resident import (
    Shape,
    attention_shape,
    head_shape,
    resident_matrices,
    score_rows,
)
from dmpq.hw_models.routing import active_probability
from dmpq.spec import ModelSpec

MOST_TOKENS: Final = 512
"""Tokens beyond which times are taken to be proportional to them: products are compute-bound."""

ExpertShape = tuple[int, int, bool]


@dataclass(frozen=True)
class Needs:
    """Shapes, and the largest number of tokens at which each must have been timed.

    Attributes:
        formats: Formats on the menu that store weights, and 16 bits.
        experts: (hidden, intermediate, gated) → tokens.
        matrices: (out, in) → tokens.
    """

    formats: tuple[Format, ...]
    experts: Mapping[ExpertShape, int] = field(hash=False)
    matrices: Mapping[Shape, int] = field(hash=False)


def needs(spec: ModelSpec, menu: Menu, workload: Workload, selected: Floats) -> Needs:
    """Return what pricing a model takes.

    Args:
        spec: Geometry of the model.
        menu: Formats on offer.
        workload: What a step is.
        selected: (N,), probability that a token selects each expert.
    """
    rows = rows_when_active(selected, workload.tokens)
    experts: dict[ExpertShape, int] = {}
    for ordinal, layer in enumerate(spec.moe_layers):
        shape = layer.hidden_size, layer.intermediate_size, layer.gated
        most = _whole(rows[spec.layer_of_expert == ordinal].max())
        experts[shape] = max(most, experts.get(shape, 1))
    matrices = dict.fromkeys(resident_matrices(spec), _whole(workload.tokens))
    attention = attention_shape(spec)
    matrices[attention] = max(matrices[attention], score_rows(spec, workload))
    head = head_shape(spec)
    matrices[head] = max(_whole(workload.batch), matrices.get(head, 1))
    formats = dict.fromkeys([*(menu.formats[index] for index in menu.stored), Format(16)])
    return Needs(tuple(formats), experts, matrices)


def rows_when_active(selected: Floats, tokens: int) -> Floats:
    """Return the tokens of each expert in a step that wakes it, (N,): at least 1."""
    active = active_probability(selected, tokens)
    rows = np.divide(tokens * selected, active, out=np.ones_like(active), where=active > 0)
    at_least_one: Floats = np.maximum(rows, 1.0)
    return at_least_one


def grid(most: int) -> tuple[int, ...]:
    """Return the numbers of tokens that are timed: powers of two up to the first of ``most``."""
    return tuple(2**i for i in range(MOST_TOKENS.bit_length()) if 2 ** (i - 1) < most)


def covers(points: Points | None, most: int) -> bool:
    """Return whether there are times, and they reach up to a number of tokens."""
    return points is not None and points[-1].tokens >= min(most, MOST_TOKENS)


def seconds_at(points: Points, tokens: Floats) -> Floats:
    """Return times at any numbers of tokens, of the same shape.

    Between measured points, the logarithm of time is linear in that of tokens; beyond the last
    one, time is proportional to tokens.
    """
    known = np.log([point.tokens for point in points])
    times = np.log([point.median_s for point in points])
    beyond = np.maximum(tokens / points[-1].tokens, 1.0)
    seconds: Floats = np.exp(np.interp(np.log(tokens), known, times)) * beyond
    return seconds


def lacking(wanted: Needs, known: Measurements) -> str | None:
    """Return the first thing that measurements lack, in words; ``None`` where they suffice."""
    experts: dict[ExpertShape, Points] = {}
    for expert in known.experts:
        old = experts.get(expert.shape)
        if old is None or expert.whole[-1].tokens < old[-1].tokens:
            experts[expert.shape] = expert.whole
    gathers = {gather.hidden_size: gather.points for gather in known.gathers}
    for shape, most in wanted.experts.items():
        name = f"experts of widths {shape[0]} and {shape[1]}"
        for points in (experts.get(shape), gathers.get(shape[0])):
            if points is None:
                return name
            if not covers(points, most):
                return f"{name} at {min(most, MOST_TOKENS)} tokens each"
    matrices = {matrix.shape: matrix.points for matrix in known.matrices}
    for size, most in wanted.matrices.items():
        found = matrices.get(size)
        if found is None:
            return f"a {size[0]} x {size[1]} matrix"
        if not covers(found, most):
            return f"a {size[0]} x {size[1]} matrix at {min(most, MOST_TOKENS)} tokens"
    return None


def _whole(tokens: float) -> int:
    """Return tokens rounded up, but for what rounding errors add."""
    return max(1, int(np.ceil(tokens - 1e-9)))
