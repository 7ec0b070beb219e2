"""How far a calibrated profile is off: on its own points, and on models it was not fitted to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmpq.hw_models.base import Floats
from dmpq.hw_models.calibration import (
    Fit,
    fit,
    leave_one_out,
    predict,
    predict_power,
    starting_stack,
)
from dmpq.hw_models.device import Device
from dmpq.hw_models.points import Point

LARGEST_MAPE: Final = 0.15
"""Mean absolute relative error on models left out above which a profile is not calibrated."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions.

    Attributes:
        mape: Mean of the absolute relative errors.
        bias: Mean of the relative errors; positive where predictions are too high.
        n: Points.
    """

    mape: float
    bias: float
    n: int


@dataclass(frozen=True)
class Ordering:
    """Kendall's tau (b) among points of one device, model, token count and context.

    Attributes:
        tau: Mean over the groups, each weighted by its pairs; a group whose predictions are all
            alike counts as 0.
        groups: Groups in which the measured values differ.
        pairs: Pairs of points in them.
    """

    tau: float
    groups: int
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """A fit and how far it is off.

    Attributes:
        fit: The fit.
        points: The points.
        predicted: (n,), by the fit.
        left_out: (n,), each model's by a fit to the others; ``None`` where there is only one.
        in_sample: Errors of the fit on its own points.
        held_out: Errors on models left out.
        order: Ordering by the fit; ``None`` where no group has two points.
        held_order: Ordering on models left out.
        power: Errors of power, by the fit; ``None`` where it was not fitted.
        held_power: The same on models left out.
    """

    fit: Fit
    points: tuple[Point, ...]
    predicted: Floats
    left_out: Floats | None
    in_sample: Errors
    held_out: Errors | None
    order: Ordering | None
    held_order: Ordering | None
    power: Errors | None
    held_power: Errors | None

    @property
    def calibrated(self) -> bool:
        """Whether all kernels were fitted to times, and models not fitted are met well enough.

        Speed-ups alone leave the level of the 16-bit kernel, to which they are relative, untold.
        """
        wanted = {f"kernels.{k.bits}.memory_efficiency" for k in self.fit.stack.kernels}
        held = self.held_out
        return (
            held is not None and held.mape <= LARGEST_MAPE and wanted <= set(self.fit.stack.fitted)
        )


def calibrate(device: Device, stack_name: str, points: Sequence[Point]) -> Calibration:
    """Fit a stack and say how far it is off.

    Args:
        device: The device.
        stack_name: One of its stacks, or a new one's name.
        points: Points of this device and stack, all in scope.

    Raises:
        InputError: If there are too few points.
    """
    stack = starting_stack(device, stack_name, points)
    found = fit(device, stack, points)
    measured = np.array([p.value for p in points])
    predicted = predict(found.device, found.stack, points)
    left = leave_one_out(device, stack, points)
    left_out = None if left is None else left[0]
    with_power = [i for i, p in enumerate(points) if p.power_w is not None]
    power = held_power = None
    if any(e.name.startswith("power.") for e in found.estimates):
        told = [points[i] for i in with_power]
        watts = np.array([p.power_w for p in told if p.power_w is not None])
        power = errors(predict_power(found.device, found.stack, told), watts)
        held_power = None if left is None else errors(left[1][with_power], watts)
    return Calibration(
        fit=found,
        points=tuple(points),
        predicted=predicted,
        left_out=left_out,
        in_sample=errors(predicted, measured),
        held_out=None if left_out is None else errors(left_out, measured),
        order=ordering(points, predicted),
        held_order=None if left_out is None else ordering(points, left_out),
        power=power,
        held_power=held_power,
    )


def errors(predicted: Floats, measured: Floats) -> Errors:
    """Return the errors of predictions."""
    relative = predicted / measured - 1
    return Errors(float(np.abs(relative).mean()), float(relative.mean()), len(measured))


def ordering(points: Sequence[Point], predicted: Floats) -> Ordering | None:
    """Return Kendall's tau of predictions against measurements; ``None`` without any pair.

    A group of speed-ups also holds the product that they are relative to, at 1.
    """
    from scipy.stats import kendalltau

    together = defaultdict(list)
    for point, value in zip(points, predicted, strict=True):
        key = point.device, point.kind == "speedup", point.model, point.batch, point.context
        together[key].append((point.value, float(value)))
    total, pairs, groups = 0.0, 0, 0
    for key, values in together.items():
        reference = [(1.0, 1.0)] if key[1] else []
        real, said = zip(*values, *reference, strict=True)
        if len(set(real)) < 2:
            continue
        tau = float(kendalltau(real, said).statistic) if len(set(said)) > 1 else 0.0
        count = len(real) * (len(real) - 1) // 2
        total, pairs, groups = total + tau * count, pairs + count, groups + 1
    return Ordering(total / pairs, groups, pairs) if groups else None
