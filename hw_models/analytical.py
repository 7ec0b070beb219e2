"""The analytical hardware model: a roofline over expected distinct experts, per kernel stack.

For each layer, projection and format present, one launch:

    t = t0 + ((bytes / (e_m BW))^4 + (flops / (e_c P))^4 + (weights / R)^4)^(1/4)

with bytes and weights those of the experts that a step is expected to wake, flops those of their
tokens in whole tiles, and efficiencies e_m, e_c, ceiling R and launch t0 those of the width's
kernel in this stack. Attention, routers, shared experts and head follow the same roofline at the
checkpoint's own precision. The form and most efficiencies were fitted to the measured MoE and GEMM
tables of ``ai-dynamo/aiconfigurator`` (Apache-2.0) and to gemlite's published speed-ups; each
device file names its sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models.base import Cost, Floats, Workload
from dmpq.hw_models.device import Device, Stack
from dmpq.hw_models.explanation import Explanation, FormatUse
from dmpq.hw_models.itemised import Sums, expert_parts, resident_parts
from dmpq.hw_models.tables import Tables, build_tables, power_mean
from dmpq.spec import ModelSpec

# Mean power where none was fitted: within 12% on ML.ENERGY's H100 decode points.
UNCALIBRATED_POWER_SHARE: Final = 0.75
_DECISIONS_AT_ONCE: Final = 1 << 16


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Where the cost of K bit maps comes from, over L layers with experts.

    Attributes:
        experts_s: (K, L), the routed experts' products, without launches.
        launches_s: (K, L), their launches: one per projection and format present.
        attention_s: Attention, routers, shared experts and dense blocks of all layers.
        head_s: The output head.
        overhead_s: Fixed overhead per layer, step and sequence.
        traffic_bytes: (K,), bytes moved, expected.
        flops: (K,), operations, expected.
        expert_bytes: (K,), memory of the routed experts.
        resident_bytes: Memory of everything else.
        power_w: (K,), mean power.
    """

    experts_s: Floats
    launches_s: Floats
    attention_s: float
    head_s: float
    overhead_s: float
    traffic_bytes: Floats
    flops: Floats
    expert_bytes: Floats
    resident_bytes: float
    power_w: Floats

    @property
    def latency_s(self) -> Floats:
        """Time of a step, shape (K,)."""
        fixed = self.attention_s + self.head_s + self.overhead_s
        total: Floats = (self.experts_s + self.launches_s).sum(axis=1) + fixed
        return total


@dataclass(frozen=True)
class AnalyticalModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` computed from a device file.

    Attributes:
        facts: The device.
        kernels: One of its kernel stacks.
    """

    facts: Device
    kernels: Stack
    deterministic: bool = True

    @property
    def name(self) -> str:
        """Name of the device."""
        return self.facts.name

    @property
    def device(self) -> str:
        """The device in words."""
        return self.facts.description

    @property
    def stack(self) -> str:
        """Name of the kernel stack."""
        return self.kernels.name

    @property
    def calibrated(self) -> bool:
        """Whether the figures were fitted on this very device."""
        return self.facts.calibrated

    @property
    def source(self) -> str:
        """Where the stack's figures come from, and which of the device's are assumed."""
        assumed = ", ".join(self.facts.assumed)
        return f"analytical; {self.kernels.source}" + (f"; assumed: {assumed}" if assumed else "")

    @property
    def capacity_bytes(self) -> float:
        """Memory of the device."""
        return self.facts.capacity_bytes

    def cost(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Cost:
        """Return the cost of bit maps; see :meth:`dmpq.hw_models.HardwareModel.cost`."""
        parts = self.breakdown(spec, menu, assignments, workload, inclusion=inclusion)
        latency = parts.latency_s
        return Cost(
            latency_s=latency,
            memory_bytes=parts.expert_bytes + parts.resident_bytes,
            energy_j=parts.power_w * latency,
        )

    def breakdown(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Breakdown:
        """Return the parts of the cost; arguments as those of :meth:`cost`.

        Raises:
            InputError: If the assignments do not fit the model or the menu.
        """
        maps = _checked(assignments, spec, menu)
        tables = self._tables(spec, menu, workload, inclusion)
        step = max(1, _DECISIONS_AT_ONCE // spec.num_experts)
        parts = [_experts(tables, maps[i : i + step]) for i in range(0, max(len(maps), 1), step)]
        experts_s, launches_s, traffic, flops, stored = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        result = Breakdown(
            experts_s=experts_s,
            launches_s=launches_s,
            attention_s=tables.attention_s,
            head_s=tables.head_s,
            overhead_s=tables.overhead_s,
            traffic_bytes=traffic + tables.resident_traffic_bytes,
            flops=flops + tables.resident_flops,
            expert_bytes=stored,
            resident_bytes=tables.resident_bytes,
            power_w=np.zeros(len(maps)),
        )
        result.power_w[:] = self._power_w(result)
        return result

    def explain(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignment: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Explanation:
        """Return where a map's cost comes from; see :class:`dmpq.hw_models.Explainable`."""
        maps = np.asarray(assignment)[None]
        power_w = float(self.breakdown(spec, menu, maps, workload, inclusion=inclusion).power_w[0])
        tables = self._tables(spec, menu, workload, inclusion)
        sums = _sums_of_projections(tables, maps)
        parts = (
            *expert_parts(tables, menu, sums),
            *resident_parts(self.facts, self.kernels, spec, workload),
        )
        uses = zip(*(present.sum(0) for present, _, _ in sums), strict=True)
        woken = sum(active.sum(0) for _, active, _ in sums) / 2
        launches = sum((present > 0).sum(0) for present, _, _ in sums)
        return Explanation(
            model=spec.name,
            device=self.device,
            stack=self.stack,
            workload=workload,
            parts=tuple(replace(part, energy_j=power_w * part.latency_s) for part in parts),
            formats=tuple(
                FormatUse(
                    key=menu.keys[b],
                    experts=float(sum(use)) / 2,
                    active=float(woken[b]),
                    launches=int(launches[b]),
                    kernel_bits=self.kernels.kernel(menu.formats[b].bits).bits,
                )
                for b, use in enumerate(uses)
                if sum(use)
            ),
            power_w=power_w,
            capacity_bytes=self.capacity_bytes,
        )

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return seconds per expert, projection and format, shape (N, 2, B).

        Each expert by itself on the roofline, with an equal share of its layer's launch: the sum
        over a uniform map under uniform routing is exactly the experts' part of its latency.
        """
        tables = self._tables(spec, menu, workload, inclusion)
        layers = spec.layer_of_expert
        counts = np.bincount(layers)[layers]
        active, rows = tables.active[:, None, None], tables.rows[:, None, None]
        own = power_mean(
            active * tables.memory_s[layers],
            rows * tables.row_s[layers],
            active * tables.unpack_s[layers],
        )
        shared: Floats = own + tables.launch_s / counts[:, None, None]
        return shared

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format whose width has no kernel of its own in this stack."""
        notes = []
        for fmt in menu.formats:
            runs_as = self.kernels.kernel(fmt.bits).bits
            if runs_as != fmt.bits:
                notes.append(
                    f"{fmt.key}: {self.name}/{self.stack} has no {fmt.bits}-bit kernel; stored "
                    f"at {fmt.bits} bits, timed as {runs_as} bits"
                )
        return tuple(notes)

    def _tables(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        inclusion: NDArray[np.floating] | None,
    ) -> Tables:
        key = None if inclusion is None else np.asarray(inclusion, np.float64).tobytes()
        return build_tables(self.facts, self.kernels, spec, menu, workload, key)

    def _power_w(self, parts: Breakdown) -> Floats | float:
        """Return mean power, watts: fitted where the file has a fit, else a share of TDP."""
        facts, latency = self.facts, parts.latency_s
        if facts.power is None:
            return UNCALIBRATED_POWER_SHARE * facts.tdp_w
        peak = facts.peak_flops_per_s(self.kernels.kernel(16).math)
        memory = parts.traffic_bytes / latency / facts.bandwidth_bytes_per_s
        compute = parts.flops / latency / peak
        line = facts.power.base_w + facts.power.memory_w * memory + facts.power.compute_w * compute
        clipped: Floats = np.clip(line, facts.idle_w, facts.tdp_w)
        return clipped


def _checked(assignments: NDArray[np.integer], spec: ModelSpec, menu: Menu) -> NDArray[np.integer]:
    maps = np.asarray(assignments)
    experts = spec.num_experts
    if maps.ndim != 2 or maps.shape[1] not in (experts, 2 * experts):
        raise InputError(
            f"The assignments have shape {maps.shape}, but {spec.name} has {experts} experts; "
            f"give an array of shape (maps, {experts}) or (maps, {2 * experts})."
        )
    if not np.issubdtype(maps.dtype, np.integer):
        raise InputError(f"The assignments are {maps.dtype}; give integer indices into the menu.")
    if maps.size and not 0 <= maps.min() <= maps.max() < len(menu):
        raise InputError(
            f"The assignments reach from {maps.min()} to {maps.max()}, but the menu has "
            f"{len(menu)} formats; give indices from 0 to {len(menu) - 1}."
        )
    return maps


def _experts(
    tables: Tables, maps: NDArray[np.integer]
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return time and launches (K, L), traffic, operations and memory (K,) of routed experts."""
    layers = len(tables.stored_bytes)
    count, time, launches = len(maps), np.zeros((len(maps), layers)), np.zeros((len(maps), layers))
    traffic, flops, stored = np.zeros(count), np.zeros(count), np.zeros(count)
    whole = maps.shape[1] == len(tables.base)
    sums = _sums(tables, maps) if whole else None
    for p in (0, 1):
        present, active, rows = sums or _sums(tables, maps[:, p::2])
        busy = power_mean(
            active * tables.memory_s[:, p],
            rows * tables.row_s[:, p],
            active * tables.unpack_s[:, p],
        )
        time += busy.sum(axis=2)
        launches += ((present > 0) * tables.launch_s).sum(axis=2)
        traffic += (active * tables.traffic_bytes[:, p]).reshape(count, -1).sum(axis=1)
        flops += (rows.sum(axis=2) * tables.flops_per_row[:, p]).sum(axis=1)
        stored += (present * tables.stored_bytes[:, p]).reshape(count, -1).sum(axis=1)
    return time, launches, traffic, flops, stored


def _sums_of_projections(tables: Tables, maps: NDArray[np.integer]) -> tuple[Sums, Sums]:
    """Return what :func:`_sums` says of the first map's gate+up and of its down, each (L, B)."""
    whole = maps.shape[1] == len(tables.base)
    both = [_sums(tables, maps if whole else maps[:, p::2]) for p in (0, 1)]
    first, second = ((present[0], active[0], rows[0]) for present, active, rows in both)
    return first, second


def _sums(
    tables: Tables, choices: NDArray[np.integer]
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return experts, expected active experts and rows per map, layer and format: (K, L, B).

    All experts of a layer have one shape, so these sums say all that a cost depends on. They are
    added up in the order of the experts: a map costs the same to the bit alone or among others.
    """
    count = len(choices)
    shape = count, len(tables.stored_bytes), len(tables.launch_s)
    width = shape[1] * shape[2]
    index = (np.arange(count)[:, None] * width + tables.base + choices).ravel()

    def added(values: Floats) -> Floats:
        spread = np.broadcast_to(values, choices.shape).ravel()
        total = np.bincount(index, spread, count * width)
        return np.asarray(total, dtype=np.float64).reshape(shape)

    present = np.bincount(index, minlength=count * width).reshape(shape)
    return present, added(tables.active), added(tables.rows)
