"""A hardware model corrected by measured whole maps, while a search runs.

    t(map) = base(map) + sum over kernels k of  (c_k - 1) x_k(map)

with x_k the time that the base gives to the routed experts in the formats of kernel k. The
factors ``c_k = r (1 + d_k)`` are a common ratio r, the median of measured to predicted, and
deviations from it by ridge regression of relative errors:

    min  sum over maps of  (1 - r sum_k (1 + d_k) x_k / y)^2 / s^2  +  sum over k of  d_k^2 / v^2

where y is what was measured, s the noise of a measurement, and v how far kernels are expected to
deviate. Nothing measured, all factors are 1. Energy is the corrected time at the base's mean
power.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.hw_models.base import Cost, Floats, HardwareModel, Workload
from dmpq.hw_models.live import LiveModel
from dmpq.hw_models.maps import checked_maps
from dmpq.spec import ModelSpec

NOISE: Final = 0.03
"""Least relative error of one measured map: s is this, or what the fit leaves if that is more."""
DEVIATION: Final = 0.2
"""How far a kernel's factor is expected to be from the common ratio, relative to it: v."""
_LEAST: Final = 0.05
"""Least factor, relative to the common ratio: no kernel takes no time."""


@dataclass(frozen=True)
class Factor:
    """What a kernel's predicted times are multiplied by.

    Attributes:
        value: The factor.
        deviation: Its standard deviation, from the fit.
    """

    value: float
    deviation: float


@dataclass(frozen=True)
class _Observation:
    """A measured map: what the base says of each kernel, and the time it took, in seconds."""

    parts: dict[str, float]
    seconds: float

    @property
    def predicted_s(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Correction:
    """Factors fitted to measured maps.

    Attributes:
        ratio: Median of measured to predicted; the factor of kernels that no map used.
        factors: Kernel → factor.
        measured: Number of maps.
        error_before: Mean relative error of the base on them.
        error_after: That of the corrected times, on the same maps.
    """

    ratio: float = 1.0
    factors: dict[str, Factor] = field(default_factory=dict)
    measured: int = 0
    error_before: float = 0.0
    error_after: float = 0.0

    def of(self, kernel: str) -> float:
        """Return the factor of a kernel."""
        known = self.factors.get(kernel)
        return self.ratio if known is None else known.value


@dataclass(eq=False)
class CorrectedModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` that learns from measured maps.

    Between two observations its costs are a pure function. They are the same for the same
    observations in the same order.

    Attributes:
        base: The model that is corrected.
        kernel_of: Names the kernel that runs a format; formats of one kernel share a factor. By
            default every format is its own.
        deterministic: An observation changes the answers.
    """

    base: HardwareModel
    kernel_of: Callable[[Format], str] = lambda fmt: fmt.key
    deterministic: bool = False
    _observed: list[_Observation] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def device(self) -> str:
        """The device in words."""
        return self.base.device

    @property
    def stack(self) -> str:
        """Kernels that the figures hold for."""
        return self.base.stack

    @property
    def calibrated(self) -> bool:
        """Whether the base's figures, or corrections of them, were measured on this device."""
        return self.base.calibrated or bool(self._observed)

    @property
    def source(self) -> str:
        """Where the base's figures come from, and how many maps correct them."""
        return f"{self.base.source}; corrected by {len(self._observed)} measured maps"

    @property
    def capacity_bytes(self) -> float:
        """Memory of the device, bytes."""
        return self.base.capacity_bytes

    @cached_property
    def correction(self) -> Correction:
        """The factors, from all that was observed so far."""
        return _fitted(self._observed)

    def observe(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignment: NDArray[np.integer],
        workload: Workload,
        seconds: float,
        *,
        inclusion: NDArray[np.floating] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Learn from a measured map.

        Args:
            spec: Geometry of the model.
            menu: Formats that the assignment indexes.
            assignment: (N,), or (2N,) with each expert's gate+up before its down.
            workload: What a step is.
            seconds: Measured time of the routed experts in a step.
            inclusion: (N,), probability that a token selects each expert; ``None`` for uniform.
            layers: MoE layers that were measured; ``None`` for all.

        Raises:
            InputError: If the time is none, or the map does not fit the model.
        """
        if not 0 < seconds < np.inf:
            raise InputError(f"A map cannot have taken {seconds} s; give a time above 0.")
        parts = self.parts(spec, menu, assignment, workload, inclusion=inclusion, layers=layers)
        self._observed.append(_Observation(parts, float(seconds)))
        self.__dict__.pop("correction", None)

    def parts(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignment: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
        layers: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Return the base's seconds for a map's routed experts by kernel; see :meth:`observe`."""
        one = checked_maps(np.asarray(assignment)[None], spec, menu)[0].reshape(-1)
        table = self.base.expert_latency(spec, menu, workload, inclusion=inclusion)
        if layers is not None:
            table = table * np.isin(spec.layer_of_expert, layers)[:, None, None]
        rows = _rows(table, len(one))
        chosen = rows[np.arange(len(one)), one]
        parts: dict[str, float] = {}
        for i, fmt in enumerate(menu.formats):
            if (one == i).any() and not fmt.is_pruned:
                kernel = self.kernel_of(fmt)
                parts[kernel] = parts.get(kernel, 0.0) + float(chosen[one == i].sum())
        return parts

    def cost(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Cost:
        """Return the corrected cost of bit maps; see :meth:`dmpq.hw_models.HardwareModel.cost`."""
        base = self.base.cost(spec, menu, assignments, workload, inclusion=inclusion)
        if not self._observed:
            return base
        maps = checked_maps(assignments, spec, menu)
        table = self.base.expert_latency(spec, menu, workload, inclusion=inclusion)
        more, columns = _rows(table * (self._factors(menu) - 1), maps.shape[1]), maps.shape[1]
        added = np.array([more[np.arange(columns), one].sum() for one in maps])
        latency = base.latency_s + added
        return Cost(
            latency_s=latency,
            memory_bytes=base.memory_bytes,
            energy_j=base.energy_j * (latency / base.latency_s),
        )

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return each expert's share of a step's corrected time, (N, 2, B)."""
        table = self.base.expert_latency(spec, menu, workload, inclusion=inclusion)
        corrected: Floats = table * self._factors(menu)
        return corrected

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits of each expert's projections in memory, (N, 2, B): the base's."""
        return self.base.stored_bits(spec, menu)

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return the base's notes on formats."""
        return self.base.unsupported(menu)

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return the base's kernels."""
        return self.base.kernels(menu)

    def notes(self) -> tuple[str, ...]:
        """Return the base's notes, and that costs are corrected."""
        return (*self.base.notes(), "times of the routed experts are corrected by measured maps")

    def _factors(self, menu: Menu) -> Floats:
        """Return the factor of each format, (B,)."""
        return np.array([self.correction.of(self.kernel_of(fmt)) for fmt in menu.formats])


def live_base(model: CorrectedModel) -> LiveModel:
    """Return the machine at hand that a model corrects.

    Raises:
        InputError: If it corrects something that cannot be measured here.
    """
    if not isinstance(model.base, LiveModel):
        raise InputError(
            f"--measure-every measures maps on the machine at hand, and --hw {model.name} is not "
            "it; give --hw host or --hw cuda, or leave --measure-every out."
        )
    return model.base


def _rows(table: Floats, columns: int) -> Floats:
    """Return seconds of projections, (N, 2, B), by the columns of a map, (N or 2N, B)."""
    experts, _, formats = table.shape
    rows: Floats = table.sum(axis=1) if columns == experts else table.reshape(-1, formats)
    return rows


def _fitted(observed: Sequence[_Observation]) -> Correction:
    """Return the factors that explain what was observed; see the module."""
    if not observed:
        return Correction()
    kernels = sorted({kernel for one in observed for kernel in one.parts})
    seconds = np.array([one.seconds for one in observed])
    ratio = float(np.median(seconds / [one.predicted_s for one in observed]))
    shares = np.array([[one.parts.get(kernel, 0.0) for kernel in kernels] for one in observed])
    shares *= ratio / seconds[:, None]
    left = 1 - shares.sum(axis=1)
    deviations, noise = np.zeros(len(kernels)), NOISE
    for _ in range(2):  # the second time with the noise that the first one leaves
        precision = shares.T @ shares / noise**2 + np.eye(len(kernels)) / DEVIATION**2
        deviations = np.linalg.solve(precision, shares.T @ left / noise**2)
        noise = max(NOISE, float(np.sqrt(np.mean((left - shares @ deviations) ** 2))))
    values = ratio * np.maximum(1 + deviations, _LEAST)
    spread = ratio * np.sqrt(np.diag(np.linalg.inv(precision)))
    predicted = np.array([one.predicted_s for one in observed])
    corrected = shares @ (values / ratio)  # relative to what was measured
    return Correction(
        ratio=ratio,
        factors={
            kernel: Factor(float(value), float(deviation))
            for kernel, value, deviation in zip(kernels, values, spread, strict=True)
        },
        measured=len(observed),
        error_before=float(np.mean(np.abs(predicted / seconds - 1))),
        error_after=float(np.mean(np.abs(corrected - 1))),
    )
