"""What a step costs as a function that can be bounded from below: lines in time and in choices.

The analytical model's time is a sum over layers, projections and formats of a launch and of a
power mean of three times that add up over experts (:mod:`dmpq.hw_models.tables`): convex in the
sums. Energy is that time at a power that lies between limits, which makes it at least the lesser
of two such functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import Menu
from dmpq.hw_models.base import Floats, Workload
from dmpq.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Line:
    """A cost as ``scale * T + linear + constant``, T the time of experts and launches, seconds.

    Attributes:
        scale: Cost per second of T.
        linear: (N, 2, B), what each expert's projections add in each format.
        constant: What no choice changes.
    """

    scale: float
    linear: Floats
    constant: float


@dataclass(frozen=True, eq=False)
class StepBound:
    """What a step costs at least; N experts, 2 projections, B formats.

    Attributes:
        times: (N, 2, B, M), seconds that an expert adds to each of M times, of whose sums over the
            experts of a layer, projection and format the power mean of fourth powers counts.
        launch_s: (B,), time of a launch: one per layer, projection and format present.
        alike: (B,), the first format that a format shares launches with: itself, or one stored
            alike.
        lines: ``latency_s`` and ``energy_j`` → lines; the cost is at least the least of them.
    """

    times: Floats
    launch_s: Floats
    alike: NDArray[np.int64]
    lines: Mapping[str, tuple[Line, ...]]


@runtime_checkable
class Bounded(Protocol):
    """A hardware model that says what its costs are made of, so that limits can be disproved."""

    def step_bound(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> StepBound:
        """Return what a step costs at least; arguments as those of ``cost``."""
        ...


def additive(seconds: Floats, joules: Floats, *, other_s: float, other_j: float) -> StepBound:
    """Return the bound, which is exact, of costs that add up over experts.

    Args:
        seconds: (N, 2, B).
        joules: (N, 2, B).
        other_s: Time that no choice changes.
        other_j: Energy likewise.
    """
    formats = seconds.shape[2]
    return StepBound(
        times=np.zeros((*seconds.shape, 1)),
        launch_s=np.zeros(formats),
        alike=np.arange(formats),
        lines={
            "latency_s": (Line(0.0, seconds, other_s),),
            "energy_j": (Line(0.0, joules, other_j),),
        },
    )
