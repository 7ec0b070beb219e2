"""Calibration: the parameters of a kernel stack, estimated from measured points.

Least squares of the logarithm of predicted over measured, within bounds, through the analytical
model itself: there is no second formula. What points cannot tell apart is not estimated but held;
:func:`choose_parameters` has the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Final

import numpy as np

from dmpq.errors import InputError
from dmpq.formats import FULL_WIDTH, Format
from dmpq.hw_models.analytical import AnalyticalModel, Breakdown
from dmpq.hw_models.base import Floats, Phase, Workload
from dmpq.hw_models.device import Device, Power, Stack
from dmpq.hw_models.points import Point, geometry, layer_alone, matrix_shape
from dmpq.hw_models.tables import build_tables
from dmpq.spec import ModelSpec, MoELayer

LAYER_TILES: Final = (16, 64, 128)
MATRIX_TILES: Final = (1, 16, 64)
"""Candidates; the one of least loss on the points fitted is taken. Grouped kernels of MoE layers
pad to whole tiles; stacks of single products have a kernel for few rows that pads nothing."""
BOUNDS: Final = {
    "memory_efficiency": (0.05, 1.0),
    "compute_efficiency": (0.01, 1.0),
    "launch_s": (1e-7, 5e-4),
    "dequantized_weights_per_s": (1e9, 1e14),
    "dense_memory_efficiency": (0.05, 1.0),
    "dense_compute_efficiency": (0.05, 1.0),
    "layer_s": (1e-7, 5e-4),
    "sequence_s": (1e-7, 1e-3),
    "base_w": (1.0, 2e3),
    "memory_w": (1.0, 2e3),
    "compute_w": (1.0, 5e3),
}
STARTS: Final = {
    "memory_efficiency": 0.7,
    "compute_efficiency": 0.35,
    "launch_s": 2e-5,
    "dequantized_weights_per_s": 2e12,
    "dense_memory_efficiency": 0.8,
    "dense_compute_efficiency": 0.6,
    "layer_s": 3e-5,
    "sequence_s": 3e-5,
}
"""Where every search starts: never at a fitted value, which would know the points left out."""

_FEWEST: Final = 3
_UNPACKED_AT: Final = 8
_DIGITS: Final = 4
_TOLERANCE: Final = 1e-7
_LAYER_FIGURES: Final = ("memory_efficiency", "compute_efficiency", "launch_s")
_STEP_FIGURES: Final = (
    "dense_memory_efficiency",
    "dense_compute_efficiency",
    "layer_s",
    "sequence_s",
)
_STEP_POINTS, _STEP_BATCHES = 8, 3


@dataclass(frozen=True)
class Estimate:
    """One fitted figure.

    Attributes:
        name: Which, as ``"kernels.4.launch_s"``.
        value: In the unit of its name.
        at_bound: Whether it is at a bound of the search, so that the points do not fix it.
    """

    name: str
    value: float
    at_bound: bool


@dataclass(frozen=True)
class Fit:
    """A stack with its fitted figures.

    Attributes:
        device: The device, with fitted power where the points had power.
        stack: The stack.
        estimates: Every fitted figure; tile rows are among the stack's own.
        points: How many points it was fitted to.
    """

    device: Device
    stack: Stack
    estimates: tuple[Estimate, ...]
    points: int


def predict(device: Device, stack: Stack, points: Sequence[Point]) -> Floats:
    """Return what the analytical model says of points: seconds, or speed-ups, shape (n,)."""
    return np.array([_predicted(device, _relevant(stack, p), p)[0] for p in points])


def predict_power(device: Device, stack: Stack, points: Sequence[Point]) -> Floats:
    """Return the mean power of steps, watts, shape (n,)."""
    return np.array([_predicted(device, _relevant(stack, p), p)[1] for p in points])


def with_power(device: Device, power: Power) -> Device:
    """Return the device with fitted power."""
    return replace(device, power=power, sources={**device.sources, "power": "fitted"})


def faster_than_memory(device: Device, point: Point) -> bool:
    """Say whether a layer took less than its active weights take at the nominal bandwidth.

    Such a point measured a cache: its weights had not been evicted since the run before. In a
    model the other layers evict them.
    """
    if point.kind != "moe_layer":
        return False
    spec, workload = _asked(point)
    menu, stack = point.precision.menu, device.stacks[0]
    tables = build_tables(device, stack, spec, menu, workload, None, True)
    read = float(tables.active.sum() * tables.stored_bytes.sum())
    return point.value * device.bandwidth_bytes_per_s < read


def fit(device: Device, stack: Stack, points: Sequence[Point]) -> Fit:
    """Estimate a stack's parameters.

    Args:
        device: The device; its facts are held.
        stack: Where figures come from that the points do not tell; see :func:`starting_stack`.
        points: All of this device and stack.

    Raises:
        InputError: If there are too few points for a single parameter.
    """
    names = choose_parameters(stack, points)
    return _fit(device, stack, points, names)


def leave_one_out(
    device: Device, stack: Stack, points: Sequence[Point]
) -> tuple[Floats, Floats] | None:
    """Predict the points of each model by a fit to those of the others.

    The parameters are those of the fit to all points. A width that no remaining point has takes
    the figures of the next wider one that some have, or else of the next narrower one.

    Returns:
        Predicted values and powers, (n,) each; ``None`` where all points are of one model.
    """
    models = sorted({p.model for p in points})
    if len(models) < 2:
        return None
    names = choose_parameters(stack, points)
    values, watts = np.zeros(len(points)), np.full(len(points), np.nan)
    for model in models:
        out = [i for i, p in enumerate(points) if p.model == model]
        rest = [p for p in points if p.model != model]
        found = _fit(device, stack, rest, names)
        left = [points[i] for i in out]
        values[out] = predict(found.device, found.stack, left)
        watts[out] = predict_power(found.device, found.stack, left)
    return values, watts


def choose_parameters(stack: Stack, points: Sequence[Point]) -> tuple[str, ...]:
    """Return which figures points can tell; the others are held.

    Of the kernel of each width measured in layers: memory efficiency, from 3 points also compute
    efficiency, from 4 also the launch. Measured in speed-ups only: the ceiling on dequantizing,
    from 3 points also compute efficiency; the rest is the 16-bit kernel's. Measured in whole
    models only: memory efficiency, below 8 bits the ceiling. Where there are speed-ups, also the
    16-bit kernel's compute efficiency, which they show by where they fade. From 8 steps of 3 batch
    sizes: the dense efficiencies and the overheads per layer and sequence; the overhead per step
    is held, which few models tell from that per layer. In the end there are fewer figures than
    points: launches go first, then compute efficiencies.

    Raises:
        InputError: If there are fewer than 3 points.
    """
    if len(points) < _FEWEST:
        what = "point" if len(points) == 1 else "points"
        raise InputError(
            f"The stack {stack.name!r} has {len(points)} measured {what} in scope; give at least "
            f"{_FEWEST} to fit it."
        )
    names: list[str] = []
    for kernel in stack.kernels:
        own = [p for p in points if stack.kernel(p.precision.bits) == kernel and _has_experts(p)]
        layers = sum(p.kind == "moe_layer" for p in own)
        ratios = sum(p.kind == "speedup" for p in own)
        figures: tuple[str, ...] = ()
        if layers:
            figures = _LAYER_FIGURES[: max(1, min(layers - 1, 3))]
        elif ratios:
            figures = ("dequantized_weights_per_s", "compute_efficiency")[: 1 + (ratios > 2)]
        elif own:
            narrow = kernel.bits < _UNPACKED_AT
            figures = ("dequantized_weights_per_s",) if narrow else _LAYER_FIGURES[:1]
        names += [f"kernels.{kernel.bits}.{figure}" for figure in figures]
    if sum(p.kind == "speedup" for p in points) > _FEWEST:
        names.append(f"kernels.{FULL_WIDTH}.compute_efficiency")
    steps = [p for p in points if p.kind == "decode"]
    if len(steps) >= _STEP_POINTS and len({p.batch for p in steps}) >= _STEP_BATCHES:
        names += _STEP_FIGURES
    for droppable in ("launch_s", "compute_efficiency"):
        while len(names) >= len(points):
            last = next((n for n in reversed(names) if n.endswith(f".{droppable}")), None)
            if last is None:
                break
            names.remove(last)
    return tuple(names)


def starting_stack(device: Device, name: str, points: Sequence[Point]) -> Stack:
    """Return the stack whose figures a fit begins with: the device's own, or a new one.

    A width that points have and the stack has not gets a kernel with the figures of the next
    wider one; a new stack takes what is held from the device's default stack.
    """
    known = {stack.name: stack for stack in device.stacks}
    default = device.stacks[0]
    stack = known.get(name) or replace(
        default,
        name=name,
        kernels=(replace(default.kernel(FULL_WIDTH), source=f"as in {default.name}"),),
        source=f"as in {default.name}",
        calibrated=False,
        fitted=(),
    )
    have = {kernel.bits: kernel for kernel in stack.kernels}
    for point in points:
        bits = point.precision.bits
        if bits not in have and _has_experts(point):
            wide = stack.kernel(bits)
            math = "fp8" if point.precision.fp8 else wide.math
            have[bits] = replace(wide, bits=bits, math=math, source="")
    return replace(stack, kernels=tuple(have[bits] for bits in sorted(have)))


def _has_experts(point: Point) -> bool:
    return point.kind == "speedup" or not geometry(point.model).dense


def _fit(device: Device, stack: Stack, points: Sequence[Point], wanted: Sequence[str]) -> Fit:
    borrowed = _borrowed(stack, points, wanted)
    names = [name for name in wanted if name not in borrowed]
    measured = np.log([p.value for p in points])
    kinds = {p.kind for p in points}
    tiles: tuple[int, ...] = (stack.tile_rows,)
    if "moe_layer" in kinds:
        tiles = LAYER_TILES
    elif "speedup" in kinds:
        tiles = MATRIX_TILES
    tries = []
    for tile_rows in tiles:
        tiled = _untold(replace(stack, tile_rows=tile_rows), names, points)

        def errors(figures: Floats, tiled: Stack = tiled) -> Floats:
            there = _with(tiled, dict(zip(names, map(float, figures), strict=True)))
            return np.log(predict(device, there, points)) - measured

        starts = [STARTS[_figure(name)] for name in names]
        found, loss = _least_squares(errors, starts, [BOUNDS[_figure(n)] for n in names])
        tries.append((loss, found, tiled))
    _, found, tiled = min(tries, key=lambda one: one[0])
    figures = dict(zip(names, (_rounded(v) for v in found), strict=True))
    known = _with(tiled, figures)
    lent = {name: _value(known, lender) for name, lender in borrowed.items()}
    fitted = replace(_with(known, lent), fitted=tuple(names))
    power, watts = _fit_power(device, fitted, points)
    return Fit(
        device=with_power(device, power) if power else device,
        stack=fitted,
        estimates=(*_estimates(figures), *watts),
        points=len(points),
    )


def _borrowed(stack: Stack, points: Sequence[Point], names: Sequence[str]) -> dict[str, str]:
    """Return which figures of widths that no point has are taken from which of another width."""
    own = {stack.kernel(p.precision.bits).bits for p in points if _has_experts(p)}
    if any(p.kind == "speedup" for p in points):
        own.add(FULL_WIDTH)
    lent = {}
    for name in names:
        if not name.startswith("kernels."):
            continue
        _, bits, figure = name.split(".")
        if int(bits) not in own and own:
            wider, narrower = [b for b in own if b > int(bits)], [b for b in own if b < int(bits)]
            lender = min(wider) if wider else max(narrower)
            lent[name] = f"kernels.{lender}.{figure}"
    return lent


def _value(stack: Stack, name: str) -> float | None:
    _, bits, figure = name.split(".")
    value: float | None = getattr(stack.kernel(int(bits)), figure)
    return value


def _untold(stack: Stack, names: Sequence[str], points: Sequence[Point]) -> Stack:
    """Return the stack with what hangs on fitted figures reset, so that no old fit stays in it.

    The quantized kernels measured in speed-ups have the 16-bit kernel's other figures.
    """
    ceilings = {n for n in names if n.endswith(".dequantized_weights_per_s")}
    wide = stack.kernel(FULL_WIDTH)
    kernels = [
        replace(k, memory_efficiency=wide.memory_efficiency, launch_s=wide.launch_s)
        if f"kernels.{k.bits}.dequantized_weights_per_s" in ceilings
        else replace(k, dequantized_weights_per_s=None)
        if any(stack.kernel(p.precision.bits) == k for p in points if _has_experts(p))
        else k
        for k in stack.kernels
    ]
    return replace(stack, kernels=tuple(kernels))


def _fit_power(
    device: Device, stack: Stack, points: Sequence[Point]
) -> tuple[Power | None, tuple[Estimate, ...]]:
    """Return power as a line in what the fitted stack achieves; ``None`` for too few points."""
    told = [p for p in points if p.power_w is not None and p.kind != "moe_layer"]
    if len(told) < _STEP_POINTS:
        return None, ()
    names = ("base_w", "memory_w", "compute_w")
    measured = np.log([p.power_w for p in told if p.power_w is not None])

    def errors(figures: Floats) -> Floats:
        there = with_power(device, Power(*(float(f) for f in figures)))
        return np.log(predict_power(there, stack, told)) - measured

    starts = [0.4 * device.tdp_w, 0.3 * device.tdp_w, device.tdp_w]
    found, _ = _least_squares(errors, starts, [BOUNDS[n] for n in names])
    figures = dict(zip(names, (_rounded(v) for v in found), strict=True))
    return Power(**figures), _estimates({f"power.{n}": v for n, v in figures.items()})


def _least_squares(
    errors: Callable[[Floats], Floats],
    starts: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> tuple[Floats, float]:
    """Return the best figures and half the sum of squares, searched in logarithms."""
    from scipy.optimize import least_squares

    low, high = np.log(bounds).T
    result = least_squares(
        lambda logs: errors(np.exp(logs)),
        np.log(starts),
        bounds=(low, high),
        ftol=_TOLERANCE,
        xtol=_TOLERANCE,
        gtol=_TOLERANCE,
    )
    return np.exp(result.x), float(result.cost)


def _estimates(figures: dict[str, float]) -> tuple[Estimate, ...]:
    return tuple(Estimate(n, v, _at_bound(n, v)) for n, v in figures.items())


def _at_bound(name: str, value: float) -> bool:
    low, high = BOUNDS[_figure(name)]
    return not low * 1.01 < value < high * 0.99


def _figure(name: str) -> str:
    return name.rpartition(".")[2]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _with(stack: Stack, figures: Mapping[str, float | None]) -> Stack:
    """Return the stack with figures by their names."""
    kernels = []
    for kernel in stack.kernels:
        prefix = f"kernels.{kernel.bits}."
        own = {_figure(n): v for n, v in figures.items() if n.startswith(prefix)}
        kernels.append(replace(kernel, **own))  # type: ignore[arg-type]
    outer = {n: v for n, v in figures.items() if "." not in n}
    return replace(stack, kernels=tuple(kernels), **outer)  # type: ignore[arg-type]


def _relevant(stack: Stack, point: Point) -> Stack:
    """Return the part of a stack that a point's prediction depends on, for a cache that hits."""
    widths = {point.precision.bits, FULL_WIDTH}
    kernels = {k.bits: replace(k, source="") for k in map(stack.kernel, widths)}
    alone = point.kind in ("moe_layer", "speedup")
    rising = tuple(kernels[bits] for bits in sorted(kernels))
    part = replace(stack, name="", source="", fitted=(), kernels=rising)
    return replace(part, layer_s=0.0, sequence_s=0.0, step_s=0.0) if alone else part


@lru_cache(maxsize=1 << 14)
def _predicted(device: Device, stack: Stack, point: Point) -> tuple[float, float]:
    """Return the value of a point, and watts."""
    model = AnalyticalModel(device, stack, balanced=point.kind == "moe_layer")
    parts = _breakdown(model, point)
    experts = float((parts.experts_s + parts.launches_s)[0].sum())
    if point.kind == "speedup":
        return float((parts.experts_s + parts.launches_s)[1].sum()) / experts, np.nan
    if point.kind == "moe_layer":
        return experts + parts.activations_s, np.nan
    if geometry(point.model).dense:
        return float(parts.latency_s[0]) - experts - parts.activations_s, float(parts.power_w[0])
    return float(parts.latency_s[0]), float(parts.power_w[0])


def _breakdown(model: AnalyticalModel, point: Point) -> Breakdown:
    """Return the parts of the cost of a point's uniform map; of a speed-up, also of 16 bits."""
    spec, workload = _asked(point)
    menu, count = point.precision.menu, 1
    if point.kind == "speedup":
        menu, count = replace(menu, formats=(*menu.formats, Format(FULL_WIDTH))), 2
    maps = np.repeat(np.arange(count)[:, None], spec.num_experts, axis=1)
    return model.breakdown(spec, menu, maps, workload)


@cache
def _asked(point: Point) -> tuple[ModelSpec, Workload]:
    """Return the model and the step that a point measured."""
    if point.kind == "speedup":
        out_features, in_features = matrix_shape(point.model)
        spec = layer_alone(MoELayer("matrix", 1, 1, in_features, out_features, gated=False))
    elif point.kind == "moe_layer":
        spec = layer_alone(geometry(point.model).spec.moe_layers[0])
    else:
        spec = replace(geometry(point.model).spec, dtype_bytes=point.precision.rest_bytes)
    phase: Phase = "prefill" if point.kind == "prefill" else "decode"
    return spec, Workload(phase, batch=point.batch, context=max(1, point.context))
