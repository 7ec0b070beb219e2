"""Simulated accelerators: a hardware model whose times are a systolic array's cycles.

A product takes ``max(cycles / clock, bytes / bandwidth)``: its operands are fetched while the one
before is computed. Cycles come from a simulator (:mod:`dmpq.hw_models.scale_sim`), bytes from
:mod:`dmpq.hw_models.traffic`. An expert's products count as often as a step wakes it, with as many
tokens as it is then expected to get, rounded up to a whole token. Nothing is shared between
experts, so that the cost of a map is the sum of its experts'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import Format, Menu
from dmpq.hw_models.accelerator import Accelerator
from dmpq.hw_models.base import BITS_PER_BYTE, NOTHING_RUNS, Cost, Floats, Workload
from dmpq.hw_models.bounds import StepBound, additive
from dmpq.hw_models.maps import checked_maps, summed
from dmpq.hw_models.resident import (
    attention_matrices,
    block_matrices,
    context_seen,
    head_shape,
    resident_bytes,
    score_heads,
    score_widths,
)
from dmpq.hw_models.routing import active_probability, inclusion_probabilities, padded_rows
from dmpq.hw_models.scale_sim import Layer, ScaleSim, scale_sim_version
from dmpq.hw_models.traffic import Product, offchip_bytes
from dmpq.spec import ModelSpec

Simulator = Callable[[int, int, int], Layer]
"""(tokens, inputs, outputs) of a product → its cycles and accesses."""

_JOULES_PER_PJ: Final = 1e-12


@dataclass(frozen=True)
class SystolicModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` that simulates an accelerator.

    Attributes:
        facts: The accelerator.
        simulate: Counts the cycles of a product; called once per shape.
    """

    facts: Accelerator
    simulate: Simulator
    deterministic: bool = True

    @classmethod
    def of(cls, facts: Accelerator) -> SystolicModel:
        """Return the accelerator under SCALE-Sim.

        Raises:
            InputError: If SCALE-Sim is not installed, with how to install it.
        """
        scale_sim_version()
        return cls(facts, ScaleSim(facts.array_rows, facts.array_columns, facts.dataflow))

    @property
    def name(self) -> str:
        """Name of the accelerator."""
        return self.facts.name

    @property
    def device(self) -> str:
        """The accelerator in words."""
        return self.facts.description

    @property
    def stack(self) -> str:
        """Name of what stands in for kernels: the simulator."""
        return "scale-sim"

    @property
    def calibrated(self) -> bool:
        """Nothing simulated was fitted on a device."""
        return False

    @property
    def source(self) -> str:
        """How the figures were made, and which of the accelerator's are assumed."""
        return "; ".join(("simulated with SCALE-Sim", *self.notes()))

    @property
    def capacity_bytes(self) -> float:
        """Off-chip memory."""
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
        """Return the cost of bit maps; see :meth:`dmpq.hw_models.HardwareModel.cost`.

        Raises:
            InputError: If the assignments do not fit the model or the menu, or SCALE-Sim is needed
                and not installed.
        """
        maps = checked_maps(assignments, spec, menu)
        tables = self._tables(spec, menu, workload, inclusion)
        return Cost(
            latency_s=summed(tables.seconds, maps) + tables.resident_s,
            memory_bytes=summed(tables.stored_bytes, maps) + tables.resident_bytes,
            energy_j=summed(tables.joules, maps) + tables.resident_j,
        )

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return seconds per expert, projection and format, (N, 2, B): here exactly additive."""
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
            tables.seconds, tables.joules, other_s=tables.resident_s, other_j=tables.resident_j
        )

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits of each expert's projections in memory, (N, 2, B)."""
        one = [
            Menu((self.facts.stored_as(f),), menu.quantizer, menu.symmetric) for f in menu.formats
        ]
        return np.concatenate([spec.stored_bits(menu) for menu in one], axis=2)

    def notes(self) -> tuple[str, ...]:
        """Return which of the accelerator's figures are assumed."""
        return (f"assumed: {', '.join(self.facts.assumed)}",) if self.facts.assumed else ()

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format that is not stored, or not multiplied, as it is."""
        notes = []
        for fmt in (menu.formats[index] for index in menu.stored):
            bits, passes = self.facts.stored_as(fmt).bits, self.facts.passes(fmt.bits)
            if bits != fmt.bits:
                notes.append(
                    f"{fmt.key}: {self.name} stores no {fmt.bits}-bit weights; stored and timed "
                    f"as {bits} bits"
                )
            elif passes > 1:
                widest = self.facts.weight_bits[-1]
                notes.append(
                    f"{fmt.key}: {self.name} multiplies weights of {widest} bits; timed as "
                    f"{passes} planes of {widest} bits, one after the other"
                )
        return tuple(notes)

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return the simulator, and the widths of weights that it multiplies for each format."""
        return {fmt.key: self._simulated(fmt) for fmt in menu.formats}

    def _simulated(self, fmt: Format) -> str:
        if fmt.is_pruned:
            return NOTHING_RUNS
        bits, passes = self.facts.stored_as(fmt).bits, self.facts.passes(fmt.bits)
        if passes == 1:
            return f"SCALE-Sim, simulated at {bits} bits"
        return f"SCALE-Sim, simulated at {passes} x {self.facts.weight_bits[-1]} bits"

    def _tables(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        inclusion: NDArray[np.floating] | None,
    ) -> _Tables:
        key = None if inclusion is None else np.asarray(inclusion, np.float64).tobytes()
        return _build_tables(self.facts, self.simulate, spec, menu, workload, key)


@dataclass(frozen=True, eq=False)
class _Tables:
    """Expected cost of each expert, (N, 2, B), and of everything that no map changes."""

    seconds: Floats
    joules: Floats
    stored_bytes: Floats
    resident_s: float
    resident_j: float
    resident_bytes: float


@lru_cache(maxsize=32)
def _build_tables(
    facts: Accelerator,
    simulate: Simulator,
    spec: ModelSpec,
    menu: Menu,
    workload: Workload,
    inclusion: bytes | None,
) -> _Tables:
    """Return the tables; ``inclusion`` is the float64 array's bytes, so that it can be a key."""
    given = None if inclusion is None else np.frombuffer(inclusion, dtype=np.float64)
    selected = inclusion_probabilities(spec, given)
    active = active_probability(selected, workload.tokens)
    rows = padded_rows(selected, workload.tokens, 1)
    tokens = np.rint(np.divide(rows, active, out=np.zeros_like(rows), where=active > 0))
    shape = spec.num_experts, 2, len(menu)
    seconds, joules, stored = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    price = lru_cache(maxsize=None)(_Price(facts, simulate))
    formats = [facts.stored_as(f) for f in menu.formats]
    for ordinal, layer in enumerate(spec.moe_layers):
        experts = np.flatnonzero(spec.layer_of_expert == ordinal)
        for p, (outputs, inputs) in enumerate((layer.gate_up_shape, layer.down_shape)):
            for b in menu.stored:
                fmt = formats[b]
                one = Menu((fmt,), menu.quantizer, menu.symmetric)
                size = int(one.stored_bits((outputs, inputs))[0]) / BITS_PER_BYTE
                stored[experts, p, b] = size
                for count in np.unique(tokens[experts]):
                    if count:
                        these = experts[tokens[experts] == count]
                        product = Product(int(count), inputs, outputs)
                        time, energy = price(product, size, fmt.bits)
                        seconds[these, p, b] = time * active[these]
                        joules[these, p, b] = energy * active[these]
    resident = [
        (count, price(product, product.weights * bits / BITS_PER_BYTE, bits))
        for count, product, bits in _resident_products(facts, spec, workload)
    ]
    return _Tables(
        seconds=seconds,
        joules=joules,
        stored_bytes=stored,
        resident_s=sum(count * time for count, (time, _) in resident),
        resident_j=sum(count * energy for count, (_, energy) in resident),
        resident_bytes=resident_bytes(
            spec,
            workload,
            weight_bytes=facts.resident_bits / BITS_PER_BYTE,
            value_bytes=facts.activation_bits / BITS_PER_BYTE,
        ),
    )


@dataclass(frozen=True)
class _Price:
    """What one product costs: seconds and joules."""

    facts: Accelerator
    simulate: Simulator

    def __call__(self, product: Product, weight_bytes: float, bits: int) -> tuple[float, float]:
        facts, passes = self.facts, self.facts.passes(bits)
        layer = self.simulate(*product)
        moved = offchip_bytes(facts, product, weight_bytes)
        seconds = max(layer.cycles * passes / facts.clock_hz, moved / facts.bandwidth_bytes_per_s)
        onchip = (
            passes * layer.ifmap_reads * facts.activation_bits / BITS_PER_BYTE
            + layer.filter_reads * weight_bytes / product.weights
            + passes * layer.ofmap_writes * facts.accumulator_bits / BITS_PER_BYTE
            + moved
        )
        dynamic = (
            passes * product.macs * facts.mac_pj
            + onchip * facts.sram_pj_per_byte
            + moved * facts.dram_pj_per_byte
        )
        return seconds, dynamic * _JOULES_PER_PJ + facts.static_w * seconds


def _resident_products(
    facts: Accelerator, spec: ModelSpec, workload: Workload
) -> Iterator[tuple[int, Product, int]]:
    """Yield the products outside the routed experts: how many, which, bits of the second factor.

    Attention is its projections and, per sequence and key-value head, scores and values over the
    cache; a causal prompt sees half of itself. Latent attention is one projection.
    """
    tokens, weights, layers = workload.tokens, facts.resident_bits, spec.num_layers
    for outputs, inputs in attention_matrices(spec):
        yield layers, Product(tokens, inputs, outputs), weights
    heads, (keys, values) = score_heads(spec, workload), score_widths(spec, workload)
    queries = spec.num_attention_heads // heads
    queries *= 1 if workload.phase == "decode" else workload.context
    for tokens_seen, count in Counter(context_seen(spec, workload).tolist()).items():
        seen = math.ceil(tokens_seen)
        for product in (Product(queries, keys, seen), Product(queries, seen, values)):
            yield count * workload.batch * heads, product, facts.activation_bits
    for (outputs, inputs), count in block_matrices(spec).items():
        yield count, Product(tokens, inputs, outputs), weights
    outputs, inputs = head_shape(spec)
    yield 1, Product(workload.batch, inputs, outputs), weights
