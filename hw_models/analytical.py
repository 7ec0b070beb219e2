"""The analytical hardware model: a roofline over expected distinct experts, per kernel stack.

For each layer, projection and format present, one launch:

    t = t0 + ((bytes / (e_m BW))^4 + (flops / (e_c P))^4 + (weights / R)^4)^(1/4)

with bytes and weights those of the experts that a step is expected to wake, flops those of their
tokens in whole tiles, and efficiencies e_m, e_c, ceiling R and launch t0 those of the width's
kernel in this stack. Attention, routers, shared experts and head follow the same roofline at the
stack's resident width, which is the checkpoint's own precision where the device has it.

Widths that a device lacks follow three rules, and :meth:`AnalyticalModel.unsupported` names each
case. A width that cannot be *stored* (``stored_widths``) takes the memory and the time of the next
wider one that can. A width without a *kernel* keeps its own memory and takes the time of the next
wider kernel. A width beyond the device's *arithmetic* (16 bits on an 8-bit Edge TPU) keeps its
memory and is computed in several passes over parts of its bits: never cheaper than a width that
the device has, so that no search gains by pretending; and no invented host computes it instead.

The form and most efficiencies were fitted to the measured MoE and GEMM
tables of ``ai-dynamo/aiconfigurator`` (Apache-2.0) and to gemlite's published speed-ups; each
device file names its sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import FULL_WIDTH, Format, Menu
from dmpq.hw_models.base import NOTHING_RUNS, Cost, Floats, Workload
from dmpq.hw_models.bounds import Line, StepBound
from dmpq.hw_models.device import Device, Math, Stack, figures
from dmpq.hw_models.explanation import Explanation, FormatUse
from dmpq.hw_models.itemised import Sums, expert_parts, resident_parts
from dmpq.hw_models.maps import checked_maps
from dmpq.hw_models.tables import Tables, build_tables, power_mean, stored_formats
from dmpq.spec import ModelSpec

# Mean power where none was fitted: within 12% on ML.ENERGY's H100 decode points.
UNCALIBRATED_POWER_SHARE: Final = 0.75
_UNCALIBRATED_POWER_ERROR: Final = 0.15
_DECISIONS_AT_ONCE: Final = 1 << 16


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Where the cost of K bit maps comes from, over L layers with experts.

    Attributes:
        experts_s: (K, L), the routed experts' products, without launches.
        launches_s: (K, L), their launches: one per projection and format present.
        activations_s: Moving the routed experts' activations, all layers.
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
    activations_s: float
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
        fixed = self.activations_s + self.attention_s + self.head_s + self.overhead_s
        total: Floats = (self.experts_s + self.launches_s).sum(axis=1) + fixed
        return total


@dataclass(frozen=True)
class AnalyticalModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` computed from a device file.

    Attributes:
        facts: The device.
        kernel_stack: One of its kernel stacks.
        balanced: Whether the tokens of a step share the experts out evenly, as the benchmarks of
            MoE kernels draw them, instead of choosing independently.
    """

    facts: Device
    kernel_stack: Stack
    deterministic: bool = True
    balanced: bool = False

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
        return self.kernel_stack.name

    @property
    def calibrated(self) -> bool:
        """Whether the experts' kernels were fitted to measured points of this very device."""
        return self.facts.calibrated or self.kernel_stack.calibrated

    @property
    def source(self) -> str:
        """Where the stack's figures come from, and which of those that count are assumed."""
        assumed = "; ".join(self.assumed)
        return f"analytical; {self.kernel_stack.source}" + (
            f"; assumed: {assumed}" if assumed else ""
        )

    @property
    def assumed(self) -> tuple[str, ...]:
        """Figures that a cost on this stack depends on and that nobody has published."""
        maths = {kernel.math for kernel in self.kernel_stack.kernels}
        idle = set() if self.facts.power else {"idle_w"}  # without a fit it bounds nothing
        peaks = {f"peak_{math}_flops_per_s" for math in get_args(Math) if math not in maths}
        named = [name for name in self.facts.assumed if name not in peaks | idle]
        own = [name for name in named if not name.startswith("stacks.")]
        if f"stacks.{self.stack}" in named:
            return *own, f"all of stack {self.stack}"
        widths: dict[str, list[str]] = {}
        for kernel in self.kernel_stack.kernels:
            if kernel.assumed:
                rest = figures(kernel).keys() - {"bits", "passes", *kernel.assumed}
                what = ", ".join(kernel.assumed) if rest else "all"
                widths.setdefault(what, []).append(str(kernel.bits))
        kernels = [f"{what} of {_listed(bits)} bits" for what, bits in widths.items()]
        return *own, *self.kernel_stack.assumed, *kernels

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
        maps = self._as_stored(checked_maps(assignments, spec, menu), menu)
        tables = self._tables(spec, menu, workload, inclusion)
        step = max(1, _DECISIONS_AT_ONCE // spec.num_experts)
        parts = [_experts(tables, maps[i : i + step]) for i in range(0, max(len(maps), 1), step)]
        experts_s, launches_s, traffic, flops, stored = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        result = Breakdown(
            experts_s=experts_s,
            launches_s=launches_s,
            activations_s=tables.activations_s,
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
        """Return where a map's cost comes from; see :class:`dmpq.hw_models.Explainable`.

        Formats that the device stores alike are one, under the first one's key.
        """
        maps = self._as_stored(checked_maps(np.asarray(assignment)[None], spec, menu), menu)
        power_w = float(self.breakdown(spec, menu, maps, workload, inclusion=inclusion).power_w[0])
        tables = self._tables(spec, menu, workload, inclusion)
        sums = _sums_of_projections(tables, maps)
        parts = (
            *expert_parts(tables, menu, sums),
            *resident_parts(self.facts, self.kernel_stack, spec, workload),
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
                    launches=int(launches[b] * tables.runs[b]),
                    kernel_bits=(
                        self.kernel_stack.kernel(menu.formats[b].bits).bits
                        if tables.runs[b]
                        else 0
                    ),
                    kernel=self._modelled(menu.formats[b]),
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

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits that each expert's projections take in the device's memory: (N, 2, B).

        Those of the format itself, or of the wider one that the device stores it as.
        """
        formats = stored_formats(self.kernel_stack, menu)
        menus = [Menu((fmt,), menu.quantizer, menu.symmetric) for fmt in formats]
        return np.concatenate([spec.stored_bits(one) for one in menus], axis=2)

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
        layers, alike = spec.layer_of_expert, self._alike(menu)
        active, rows = tables.active[:, None, None], tables.rows[:, None, None]
        times = np.stack(
            [
                active * tables.memory_s[layers],
                rows * tables.row_s[layers],
                active * tables.unpack_s[layers],
            ],
            axis=3,
        )[:, :, alike]
        nothing = np.zeros(times.shape[:3])
        fixed = tables.activations_s + tables.attention_s + tables.head_s + tables.overhead_s
        power = self.facts.power
        if power is None:
            watts = UNCALIBRATED_POWER_SHARE * self.facts.tdp_w
            energy: tuple[Line, ...] = (Line(watts, nothing, watts * fixed),)
        else:
            per_byte = power.memory_w / self.facts.bandwidth_bytes_per_s
            per_flop = power.compute_w / self.facts.peak_flops_per_s(
                self.kernel_stack.kernel(FULL_WIDTH).math
            )
            own = (
                per_byte * active * tables.traffic_bytes[layers]
                + per_flop * rows * tables.flops_per_row[layers][:, :, None] * tables.runs
            )
            others = (
                power.base_w * fixed
                + per_byte * tables.resident_traffic_bytes
                + per_flop * tables.resident_flops
            )
            limit = self.facts.tdp_w
            energy = (
                Line(limit, nothing, limit * fixed),
                Line(power.base_w, own[:, :, alike], others),
            )
        return StepBound(
            times=times,
            launch_s=tables.launch_s,
            alike=alike,
            lines={"latency_s": (Line(1.0, nothing, fixed),), "energy_j": energy},
        )

    def _alike(self, menu: Menu) -> NDArray[np.int64]:
        """Return the first format that is stored as each one is, (B,)."""
        formats = stored_formats(self.kernel_stack, menu)
        return np.array([formats.index(fmt) for fmt in formats])

    def _as_stored(self, maps: NDArray[np.integer], menu: Menu) -> NDArray[np.integer]:
        """Return maps with one index for formats that are stored alike: they share a launch."""
        first = self._alike(menu)
        return maps if (first == np.arange(len(first))).all() else first[maps]

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format whose width the device does not have as it is."""
        stored = (menu.formats[index] for index in menu.stored)
        found = ((fmt.key, self._what_lacks(fmt.bits)) for fmt in stored)
        return tuple(f"{key}: {what}" for key, what in found if what)

    def _what_lacks(self, bits: int) -> str:
        stack = self.kernel_stack
        stored, kernel = stack.stored_width(bits), stack.kernel(bits)
        where = f"{self.name}/{self.stack}"
        if kernel.passes > 1:
            part = kernel.bits // kernel.passes
            return (
                f"{where} has no {kernel.bits}-bit arithmetic; stored at {stored} bits, timed as "
                f"{kernel.passes} passes of {part} bits"
            )
        if stored != bits:
            return f"{where} cannot store {bits} bits; stored and timed as {kernel.bits} bits"
        if kernel.bits != bits:
            return (
                f"{where} has no {bits}-bit kernel; stored at {bits} bits, timed as "
                f"{kernel.bits} bits"
            )
        return ""

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return the stack's name and the width that each format's time is modelled at."""
        return {fmt.key: self._modelled(fmt) for fmt in menu.formats}

    def _modelled(self, fmt: Format) -> str:
        if fmt.is_pruned:
            return NOTHING_RUNS
        kernel = self.kernel_stack.kernel(fmt.bits)
        parts = kernel.passes
        width = f"{kernel.bits // parts} bits"
        return f"{self.stack}, modelled at " + (f"{parts} x {width}" if parts > 1 else width)

    def notes(self) -> tuple[str, ...]:
        """Return what a user of the costs should know of this device, one clause each."""
        notes = [] if self.facts.note is None else [self.facts.note]
        width = self.kernel_stack.resident_bits
        if width != FULL_WIDTH:
            notes.append(
                f"attention, routers, shared experts, head and KV cache are costed at {width} "
                f"bits, all that {self.name}/{self.stack} has; what that loses is not measured"
            )
        if self.facts.power is None:
            notes.append(
                f"energy: power not measured, {UNCALIBRATED_POWER_SHARE:g} of the "
                f"{self.facts.tdp_w:g} W limit at all times, give or take "
                f"{_UNCALIBRATED_POWER_ERROR:.0%}"
            )
        if self.assumed:
            notes.append(f"assumed, for want of published figures: {'; '.join(self.assumed)}")
        return tuple(notes)

    def _tables(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        inclusion: NDArray[np.floating] | None,
    ) -> Tables:
        key = None if inclusion is None else np.asarray(inclusion, np.float64).tobytes()
        return build_tables(
            self.facts, self.kernel_stack, spec, menu, workload, key, self.balanced
        )

    def _power_w(self, parts: Breakdown) -> Floats | float:
        """Return mean power, watts: fitted where the file has a fit, else a share of TDP."""
        facts, latency = self.facts, parts.latency_s
        if facts.power is None:
            return UNCALIBRATED_POWER_SHARE * facts.tdp_w
        peak = facts.peak_flops_per_s(self.kernel_stack.kernel(16).math)
        memory = parts.traffic_bytes / latency / facts.bandwidth_bytes_per_s
        compute = parts.flops / latency / peak
        line = facts.power.base_w + facts.power.memory_w * memory + facts.power.compute_w * compute
        clipped: Floats = np.clip(line, facts.idle_w, facts.tdp_w)
        return clipped


def _listed(words: list[str]) -> str:
    """Return "2, 3 and 4"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


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
    return present, added(tables.active) * tables.runs, added(tables.rows) * tables.runs
