"""What the cost of every bit map is put together from: computed once per model and workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import FULL_WIDTH, Format, Menu
from dmpq.hw_models.base import BITS_PER_BYTE, Floats, Workload
from dmpq.hw_models.device import Device, Stack
from dmpq.hw_models.resident import (
    FLOPS_PER_WEIGHT,
    activation_values,
    layer_cache_values,
    layer_score_flops,
    layer_weights,
    resident_bytes,
)
from dmpq.hw_models.routing import active_probability, inclusion_probabilities, padded_rows
from dmpq.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Tables:
    """L layers, 2 projections, B formats; seconds are per expert that is certainly active.

    Attributes:
        base: int (N,), position of each expert's layer in a flat (L, B) array.
        active: (N,), probability that a step wakes the expert.
        rows: (N,), expected rows computed, tiles filled up.
        runs: (B,), 1.0, or 0.0 for a pruned expert, which costs nothing.
        stored_bytes: (L, 2, B), memory of one expert.
        traffic_bytes: (L, 2, B), bytes read when it is active.
        memory_s: (L, 2, B), time to read them.
        unpack_s: (L, 2, B), time to dequantize them.
        flops_per_row: (L, 2), operations per row.
        row_s: (L, 2, B), time to compute one row.
        launch_s: (B,), half of a layer's launch: that of one projection.
        activations_s: Time to move what goes into and out of the routed experts, all layers: its
            kernels (activation function, gather, weighted sum) stand between the products.
        attention_s: Time outside routed experts and head, all layers.
        head_s: Time of the head.
        overhead_s: Fixed time.
        resident_traffic_bytes: Bytes read outside the routed experts.
        resident_flops: Operations outside the routed experts.
        resident_bytes: Memory outside the routed experts: other weights, KV cache, activations,
            and what the device's runtime takes.
    """

    base: NDArray[np.int64]
    active: Floats
    rows: Floats
    runs: Floats
    stored_bytes: Floats
    traffic_bytes: Floats
    memory_s: Floats
    unpack_s: Floats
    flops_per_row: Floats
    row_s: Floats
    launch_s: Floats
    activations_s: float
    attention_s: float
    head_s: float
    overhead_s: float
    resident_traffic_bytes: float
    resident_flops: float
    resident_bytes: float


def power_mean(*times: Floats) -> Floats:
    """Return ``(sum of fourth powers)^(1/4)``: a maximum with a rounded corner, in seconds.

    Where memory and compute take equally long, they overlap imperfectly; the exponent is the one
    that fits the measured MoE tables of ``ai-dynamo/aiconfigurator``.
    """
    total = sum(np.square(np.square(t)) for t in times)
    rounded: Floats = np.sqrt(np.sqrt(total))
    return rounded


@lru_cache(maxsize=32)
def build_tables(
    device: Device,
    stack: Stack,
    spec: ModelSpec,
    menu: Menu,
    workload: Workload,
    inclusion: bytes | None,
    balanced: bool = False,
) -> Tables:
    """Return the tables; ``inclusion`` is the float64 array's bytes, so that it can be a key.

    Raises:
        InputError: If ``inclusion`` does not fit the model.
    """
    given = None if inclusion is None else np.frombuffer(inclusion, dtype=np.float64)
    selected = inclusion_probabilities(spec, given)
    kernels = [stack.kernel(f.bits) for f in menu.formats]
    weights = np.array(
        [[np.prod(layer.gate_up_shape), np.prod(layer.down_shape)] for layer in spec.moe_layers],
        dtype=np.float64,
    )
    bandwidth = device.bandwidth_bytes_per_s * np.array([k.memory_efficiency for k in kernels])
    ceilings = [k.dequantized_weights_per_s or np.inf for k in kernels]
    speed = [k.compute_efficiency * device.peak_flops_per_s(k.math) / k.passes for k in kernels]
    read_as = [widened(f, k.bits) for f, k in zip(menu.formats, kernels, strict=True)]
    traffic = _per_layer(spec, read_as, menu)
    flops = weights * FLOPS_PER_WEIGHT
    runs = np.where(menu.pruned, 0.0, 1.0)
    resident = Resident(device, stack, spec, workload)
    return Tables(
        base=spec.layer_of_expert * len(menu),
        active=active_probability(selected, workload.tokens, balanced=balanced),
        rows=padded_rows(selected, workload.tokens, stack.tile_rows, balanced=balanced),
        runs=runs,
        stored_bytes=_per_layer(spec, stored_formats(stack, menu), menu),
        traffic_bytes=traffic,
        memory_s=traffic / bandwidth,
        unpack_s=weights[:, :, None] / np.array(ceilings) * runs,
        flops_per_row=flops,
        row_s=flops[:, :, None] / np.array(speed) * runs,
        launch_s=np.array([k.launch_s * k.passes for k in kernels]) / 2 * runs,
        activations_s=resident.activations_s(),
        attention_s=resident.attention_s(),
        head_s=resident.head_s(),
        overhead_s=(
            spec.num_layers * stack.layer_s + stack.step_s + workload.batch * stack.sequence_s
        ),
        resident_traffic_bytes=(
            resident.layer_bytes().sum() + resident.activation_bytes().sum() + resident.head_bytes
        ),
        resident_flops=resident.layer_flops().sum() + resident.head_flops,
        resident_bytes=resident.memory_bytes(),
    )


def stored_formats(stack: Stack, menu: Menu) -> list[Format]:
    """Return the format that each format of the menu is stored in: its own, or a wider one."""
    return [widened(f, stack.stored_width(f.bits)) for f in menu.formats]


def widened(fmt: Format, bits: int) -> Format:
    """Return a format whose codes take ``bits`` each, its groups as they are.

    A pruned expert stays one.
    """
    if bits == fmt.bits or fmt.is_pruned:
        return fmt
    wide = Format(bits)
    return wide if wide.is_full else Format(bits, fmt.group_size)


def _per_layer(spec: ModelSpec, formats: Sequence[Format], menu: Menu) -> Floats:
    """Return the bytes of one expert's projections in each format, shape (L, 2, B)."""
    menus = [Menu((f,), menu.quantizer, menu.symmetric) for f in formats]
    bits = [
        [
            [m.stored_bits(shape)[0] for m in menus]
            for shape in (layer.gate_up_shape, layer.down_shape)
        ]
        for layer in spec.moe_layers
    ]
    return np.array(bits, dtype=np.float64) / BITS_PER_BYTE


@dataclass(frozen=True)
class Resident:
    """The part of a step that no bit map changes, at the stack's resident width."""

    device: Device
    stack: Stack
    spec: ModelSpec
    workload: Workload

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight: the checkpoint's, or fewer where the device has no such width."""
        own = self.spec.dtype_bytes
        return own if self.stack.resident_bits == FULL_WIDTH else min(own, self.value_bytes)

    @property
    def value_bytes(self) -> float:
        """Bytes of a cached or passed value: 2, or what the device's arithmetic takes."""
        return self.stack.resident_bits / BITS_PER_BYTE

    def _weights(self) -> Floats:
        """Weights per layer, (num_layers,)."""
        total: Floats = np.sum(list(layer_weights(self.spec).values()), axis=0)
        return total

    def layer_bytes(self) -> Floats:
        """Bytes moved per layer: weights and KV cache."""
        cache = layer_cache_values(self.spec, self.workload) * self.value_bytes
        return self._weights() * self.weight_bytes + cache

    def activation_bytes(self) -> Floats:
        """Bytes of the routed experts' activations, moved once, per MoE layer, (L,)."""
        return activation_values(self.spec, self.workload) * self.value_bytes

    def layer_flops(self) -> Floats:
        """Operations per layer: weights, and scores over the context."""
        weights = FLOPS_PER_WEIGHT * self.workload.tokens * self._weights()
        return weights + layer_score_flops(self.spec, self.workload)

    @property
    def head_bytes(self) -> float:
        """Bytes of the head."""
        return float(self.spec.embedding_parameters * self.weight_bytes)

    @property
    def head_flops(self) -> float:
        """Operations of the head: the last token of each sequence."""
        return float(FLOPS_PER_WEIGHT * self.workload.batch * self.spec.embedding_parameters)

    def _time(self, moved: Floats, flops: Floats) -> float:
        return float(power_mean(moved / self.bandwidth, flops / self.speed).sum())

    @property
    def speed(self) -> float:
        """Operations per second that these layers reach."""
        stack = self.stack
        peak = self.device.peak_flops_per_s(stack.kernel(stack.resident_bits).math)
        return peak * stack.dense_compute_efficiency

    @property
    def bandwidth(self) -> float:
        """Bandwidth that these layers reach, bytes per second."""
        return self.device.bandwidth_bytes_per_s * self.stack.dense_memory_efficiency

    def activations_s(self) -> float:
        """Return time to move the routed experts' activations."""
        return float(self.activation_bytes().sum()) / self.bandwidth

    def attention_s(self) -> float:
        """Return time of all layers without their routed experts."""
        return self._time(self.layer_bytes(), self.layer_flops())

    def head_s(self) -> float:
        """Return time of the head."""
        return self._time(np.array([self.head_bytes]), np.array([self.head_flops]))

    def memory_bytes(self) -> float:
        """Return memory of the other weights, the KV cache, the activations and the runtime."""
        own = resident_bytes(
            self.spec,
            self.workload,
            weight_bytes=self.weight_bytes,
            value_bytes=self.value_bytes,
        )
        return own + (self.device.runtime_bytes or 0.0)
