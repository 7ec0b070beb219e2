"""Decisions: what shares one format, and how values of experts and projections add up by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.formats import Menu
from dmpq.spec import ModelSpec

Serve = Literal["expert", "projection", "layer"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Assignments = NDArray[np.integer]


def check_whole(serve: Serve, menu: Menu) -> None:
    """Refuse to decide over projections where experts can be pruned, which they are whole.

    Raises:
        InputError: If both are asked for.
    """
    if serve == "projection" and menu.pruned.any():
        raise InputError(
            "--serve projection gives gate+up and down formats of their own, and an expert is "
            "pruned (0 bits) whole; leave 0 out of --bits, or use --serve expert."
        )


@dataclass(frozen=True, eq=False)
class Decisions:
    """The D decisions of a model with N experts.

    A decision is an expert, a projection (column 2n is expert n's gate+up, 2n+1 its down) or a
    layer.

    Attributes:
        spec: Geometry of the model.
        serve: What shares one format.

    Raises:
        InputError: If nothing is served like that.
    """

    spec: ModelSpec
    serve: Serve

    def __post_init__(self) -> None:
        if self.serve not in get_args(Serve):
            raise unknown("serving granularity", self.serve, get_args(Serve))

    @cached_property
    def of_projection(self) -> Ints:
        """The decision of each projection, (N, 2)."""
        experts = np.arange(self.spec.num_experts)
        if self.serve == "projection":
            return experts[:, None] * 2 + np.arange(2)
        owner = self.spec.layer_of_expert if self.serve == "layer" else experts
        return np.stack([owner, owner], axis=1)

    @property
    def count(self) -> int:
        """D."""
        return int(self.of_projection[-1, -1]) + 1

    @cached_property
    def layers(self) -> Ints:
        """The layer of each decision, (D,)."""
        layers = np.zeros(self.count, np.int64)
        layers[self.of_projection] = self.spec.layer_of_expert[:, None]
        return layers

    @cached_property
    def weights(self) -> Ints:
        """Number of weights that each decision covers, (D,)."""
        shapes = np.array(
            [
                (math.prod(layer.gate_up_shape), math.prod(layer.down_shape))
                for layer in self.spec.moe_layers
            ]
        )
        return self.summed(shapes[self.spec.layer_of_expert]).astype(np.int64)

    def summed(self, values: NDArray[np.number]) -> Floats:
        """Return the sums of projections' values, (N, 2, ...), by decision, (D, ...)."""
        sums = np.zeros((self.count, *values.shape[2:]))
        np.add.at(sums, self.of_projection, values)
        return sums

    def mean(self, values: Floats) -> Floats:
        """Return the mean of experts' values, (N, ...), over each decision, (D, ...)."""
        both = np.stack([values, values], axis=1)
        mean: Floats = self.summed(both) / self.summed(np.ones_like(both))
        return mean

    def expand(self, assignments: Assignments) -> Assignments:
        """Return maps of decisions, (K, D), as maps of experts (K, N) or projections (K, 2N)."""
        if self.serve == "layer":
            return assignments[:, self.spec.layer_of_expert]
        return assignments
