"""The measured hardware model: prices from recorded times of real kernels.

    t = sum over experts e of  q_e (t_gate_up[b](m_e) + t_down[b](m_e) + t_gather(m_e))
        + sum over the other matrices of t(T) + max(KV bytes / bandwidth, score operations / rate)

with q_e the probability that a step wakes the expert and m_e its tokens then. The bandwidth is
that of a copy, the rate that of the projection to queries, keys and values at as many rows as
queries share a part of the cache. Every expert is
computed by itself, as it was timed, so that times add up exactly. An expert's measured time is
divided between its projections as the times of its two halves are. Norms, rotary embeddings,
softmax and sampling are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import FULL_WIDTH, Format, Menu
from dmpq.hw_models.base import NOTHING_RUNS, Cost, Floats, Workload
from dmpq.hw_models.bounds import StepBound, additive
from dmpq.hw_models.maps import checked_maps, summed
from dmpq.hw_models.measurements import ExpertTiming, Measurements, Points
from dmpq.hw_models.needs import lacking, needs, rows_when_active, seconds_at
from dmpq.hw_models.resident import (
    attention_shape,
    cache_bytes,
    head_shape,
    resident_bytes,
    resident_matrices,
    score_flops,
    score_rows,
)
from dmpq.hw_models.routing import active_probability, inclusion_probabilities
from dmpq.spec import ModelSpec, MoELayer


@dataclass(frozen=True)
class MeasuredModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` that replays recorded measurements.

    Attributes:
        record: The measurements.
        deterministic: The same record gives the same answers.
        calibrated: The figures were measured on the device that they are for.
    """

    record: Measurements
    deterministic: bool = True
    calibrated: bool = True

    @property
    def name(self) -> str:
        """``"host"`` or ``"cuda"``."""
        return self.record.name

    @property
    def device(self) -> str:
        """The device in words."""
        return self.record.device

    @property
    def stack(self) -> str:
        """The kernels in words."""
        return self.record.stack

    @property
    def source(self) -> str:
        """Where time and energy come from."""
        record = self.record
        return (
            f"measured on {record.device} with {record.stack} ({record.digest}); energy: "
            f"{record.energy.source}"
        )

    @property
    def capacity_bytes(self) -> float:
        """Memory of the device."""
        return self.record.capacity_bytes

    def cost(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Cost:
        """Return the cost of bit maps; see :meth:`dmpq.hw_models.HardwareModel.cost`.

        Raises:
            InputError: If the assignments do not fit, or the record lacks what they need.
        """
        maps = checked_maps(assignments, spec, menu)
        tables = self._tables(spec, menu, workload, inclusion)
        stored = self.stored_bits(spec, menu) / 8
        latency, energy, memory = (
            summed(table, maps) for table in (tables.seconds, tables.joules, stored)
        )
        return Cost(
            latency_s=latency + tables.other_s,
            memory_bytes=memory + resident_bytes(spec, workload) + self.record.runtime_bytes,
            energy_j=energy + tables.other_j,
        )

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return seconds per expert, projection and format, shape (N, 2, B); they add up."""
        return self._tables(spec, menu, workload, inclusion).seconds.copy()

    def step_bound(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> StepBound:
        """Return what a step costs at least; see :class:`dmpq.hw_models.bounds.Bounded`."""
        tables = self._tables(spec, menu, workload, inclusion)
        return additive(
            tables.seconds, tables.joules, other_s=tables.other_s, other_j=tables.other_j
        )

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits of each expert's projections in memory, (N, 2, B).

        What the kernel was seen to hold, where it is the format's own; else the format's bits.
        """
        bits = spec.stored_bits(menu)
        for ordinal, layer in enumerate(spec.moe_layers):
            experts = np.flatnonzero(spec.layer_of_expert == ordinal)
            for b in menu.stored:
                fmt = menu.formats[b]
                timing = self.record.expert(_shape(layer), fmt)
                if timing.bits == fmt.bits and timing.group_size in (0, fmt.group_size):
                    own = bits[experts[0], :, b]
                    held = own * max(1.0, 8 * timing.stored_bytes / own.sum())
                    bits[experts, :, b] = np.rint(held).astype(np.int64)
        return bits

    def notes(self) -> tuple[str, ...]:
        """Return where the energy comes from."""
        return (f"energy: {self.record.energy.source}",)

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format that the record has no kernel of its own for."""
        stored = [menu.formats[index] for index in menu.stored]
        timings = ((fmt, timing) for fmt in stored for timing in self._timings(fmt))
        notes = (
            kernel_note(fmt, timing.bits, timing.group_size, timing.kernel, self.name)
            for fmt, timing in timings
        )
        return tuple(dict.fromkeys(text for text in notes if text is not None))

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return the recorded kernel of each format; several where shapes differ in it."""
        named = {
            fmt.key: (
                [NOTHING_RUNS]
                if fmt.is_pruned
                else [kernel_words(t.kernel, t.bits, t.group_size) for t in self._timings(fmt)]
            )
            for fmt in menu.formats
        }
        return {key: either(words) for key, words in named.items()}

    def _timings(self, fmt: Format) -> list[ExpertTiming]:
        """Return what a format is timed with, one for each shape of expert."""
        shapes = dict.fromkeys(expert.shape for expert in self.record.experts)
        return [self.record.expert(shape, fmt) for shape in shapes]

    def _tables(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        inclusion: NDArray[np.floating] | None,
    ) -> _Tables:
        key = None if inclusion is None else np.asarray(inclusion, np.float64).tobytes()
        return _build(self.record, spec, menu, workload, key)


def kernel_words(kernel: str, bits: int, group_size: int) -> str:
    """Return a kernel and the groups that it runs with: ``"gemlite A16W4, groups of 64"``.

    Args:
        kernel: Its name.
        bits: Its width.
        group_size: Its groups; 0 for one scale per row, or none.
    """
    return kernel if bits == FULL_WIDTH else f"{kernel}, {_scales(group_size)}"


def either(words: Iterable[str]) -> str:
    """Return what formats are timed with: "a" for one kernel, "a; or b" for two."""
    return "; or ".join(dict.fromkeys(words))


def kernel_note(fmt: Format, bits: int, group_size: int, kernel: str, name: str) -> str | None:
    """Return how what a format is timed as differs from what it is; ``None`` for not at all.

    Args:
        fmt: The format.
        bits: Width of the kernel that it is timed with.
        group_size: The kernel's groups; 0 for one scale per row, or none.
        kernel: Name of the kernel.
        name: Name of the hardware.
    """
    if bits != fmt.bits:
        return (
            f"{fmt.key}: {name} has no {fmt.bits}-bit kernel; stored packed at {fmt.bits} bits, "
            f"timed as {bits} bits ({kernel})"
        )
    if fmt.is_full or group_size == fmt.group_size:
        return None
    return (
        f"{fmt.key}: stored in groups of {fmt.group_size}, timed with {_scales(group_size)} "
        f"({kernel})"
    )


def _scales(group_size: int) -> str:
    return f"groups of {group_size}" if group_size else "one scale per row"


@dataclass(frozen=True, eq=False)
class _Tables:
    """Seconds and joules per expert, projection and format, (N, 2, B), and those of the rest."""

    seconds: Floats
    joules: Floats
    other_s: float
    other_j: float


@lru_cache(maxsize=32)
def _build(
    record: Measurements,
    spec: ModelSpec,
    menu: Menu,
    workload: Workload,
    inclusion: bytes | None,
) -> _Tables:
    given = None if inclusion is None else np.frombuffer(inclusion, dtype=np.float64)
    selected = inclusion_probabilities(spec, given)
    missing = lacking(needs(spec, menu, workload, selected), record)
    if missing is not None:
        raise InputError(
            f"The measurements of {record.device} have no time of {missing}, which {spec.name} "
            "needs for this workload; measure it with python -m dmpq.hardware measure."
        )
    active = active_probability(selected, workload.tokens)
    rows = rows_when_active(selected, workload.tokens)
    full_w = record.power_w(FULL_WIDTH, 0)
    seconds = np.zeros((spec.num_experts, 2, len(menu)))
    joules = np.zeros_like(seconds)
    for ordinal, layer in enumerate(spec.moe_layers):
        experts = np.flatnonzero(spec.layer_of_expert == ordinal)
        moved = seconds_at(_gather(record, layer), rows[experts])
        for b in menu.stored:
            timing = record.expert(_shape(layer), menu.formats[b])
            parts = _parts(timing, rows[experts])
            power = record.power_w(timing.bits, timing.group_size)
            for p in (0, 1):
                seconds[experts, p, b] = active[experts] * (parts[p] + moved / 2)
                joules[experts, p, b] = active[experts] * (power * parts[p] + full_w * moved / 2)
    other = _other_seconds(record, spec, workload)
    return _Tables(seconds, joules, other, full_w * other)


def _shape(layer: MoELayer) -> tuple[int, int, bool]:
    return layer.hidden_size, layer.intermediate_size, layer.gated


def _gather(record: Measurements, layer: MoELayer) -> Points:
    return next(g.points for g in record.gathers if g.hidden_size == layer.hidden_size)


def _parts(timing: ExpertTiming, rows: Floats) -> tuple[Floats, Floats]:
    """Return the times of an expert's two projections; together they are its measured time."""
    whole, first, second = (
        seconds_at(points, rows) for points in (timing.whole, timing.gate_up, timing.down)
    )
    share = first / (first + second)
    return whole * share, whole * (1 - share)


def _other_seconds(record: Measurements, spec: ModelSpec, workload: Workload) -> float:
    """Return the time outside the routed experts."""
    points = {matrix.shape: matrix.points for matrix in record.matrices}

    def at(shape: tuple[int, int], tokens: int) -> float:
        return float(seconds_at(points[shape], np.array([float(tokens)]))[0])

    layers = sum(
        count * at(shape, workload.tokens) for shape, count in resident_matrices(spec).items()
    )
    shape, rows = attention_shape(spec), score_rows(spec, workload)
    rate = 2 * shape[0] * shape[1] * rows / at(shape, rows)
    attention = max(
        cache_bytes(spec, workload) / record.copy.bandwidth_bytes_per_s,
        score_flops(spec, workload) / rate,
    )
    return layers + at(head_shape(spec), workload.batch) + attention
