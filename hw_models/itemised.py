"""The analytical model's cost of one map, item by item: computed only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dmpq.formats import Menu
from dmpq.hw_models.base import Floats, Workload
from dmpq.hw_models.device import Device, Stack
from dmpq.hw_models.explanation import Part
from dmpq.hw_models.resident import (
    FLOPS_PER_WEIGHT,
    cache_bytes,
    layer_cache_values,
    layer_score_flops,
    layer_weights,
)
from dmpq.hw_models.tables import Resident, Tables, power_mean
from dmpq.spec import ModelSpec

Sums = tuple[Floats, Floats, Floats]
"""Experts, expected active experts and expected rows of one projection, each (L, B)."""


def expert_parts(tables: Tables, menu: Menu, sums: Sequence[Sums]) -> Iterator[Part]:
    """Yield, for every format that occurs, its experts' part and that of its launches.

    Args:
        tables: Of the model and the workload.
        menu: The formats.
        sums: Of gate+up and of down.
    """
    waits = np.zeros((3, len(menu)))
    traffic, flops, stored, launches = np.zeros((4, len(menu)))
    for p, (present, active, rows) in enumerate(sums):
        waits += shared_time(
            active * tables.memory_s[:, p],
            rows * tables.row_s[:, p],
            active * tables.unpack_s[:, p],
        ).sum(1)
        traffic += (active * tables.traffic_bytes[:, p]).sum(0)
        flops += (rows * tables.flops_per_row[:, p, None]).sum(0)
        stored += (present * tables.stored_bytes[:, p]).sum(0)
        launches += (present > 0).sum(0) * tables.launch_s
    occurring = np.flatnonzero(sum(present.sum(0) for present, _, _ in sums))
    for b in occurring:
        yield Part(
            "experts",
            key=menu.keys[b],
            memory_s=float(waits[0, b]),
            compute_s=float(waits[1, b]),
            unpack_s=float(waits[2, b]),
            traffic_bytes=float(traffic[b]),
            flops=float(flops[b]),
            stored_bytes=float(stored[b]),
        )
    for b in occurring:
        yield Part("launches", key=menu.keys[b], fixed_s=float(launches[b]))


def resident_parts(
    device: Device, stack: Stack, spec: ModelSpec, workload: Workload
) -> Iterator[Part]:
    """Yield the parts that no bit map changes: attention to head, memory, overheads."""
    resident = Resident(device, stack, spec, workload)
    hidden, layers = spec.hidden_size, spec.num_layers
    weights = layer_weights(spec)
    cached = layer_cache_values(spec, workload) * resident.value_bytes
    activations = resident.activation_bytes()
    own, bandwidth, speed = resident.weight_bytes, resident.bandwidth, resident.speed
    moved = {
        **{name: count * own for name, count in weights.items()},
        "KV cache, scores": cached,
    }
    flops = {
        **{name: FLOPS_PER_WEIGHT * workload.tokens * count for name, count in weights.items()},
        "KV cache, scores": layer_score_flops(spec, workload),
    }
    stored = {
        **{name: float(count.sum()) * own for name, count in weights.items()},
        "KV cache, scores": cache_bytes(spec, workload, value_bytes=resident.value_bytes),
    }
    stored["attention"] += hidden * own  # the last norm
    nothing = np.zeros(layers)
    share = shared_time(
        sum(moved.values(), nothing) / bandwidth, sum(flops.values(), nothing) / speed, each=True
    )
    for name, count in stored.items():
        if count:
            yield Part(
                name,
                memory_s=float((moved[name] / bandwidth * share[0]).sum()),
                compute_s=float((flops[name] / speed * share[1]).sum()),
                traffic_bytes=float(moved[name].sum()),
                flops=float(flops[name].sum()),
                stored_bytes=count,
            )
    yield Part(
        "activations",
        memory_s=resident.activations_s(),
        traffic_bytes=float(activations.sum()),
        stored_bytes=float(activations.max()),
    )
    table = resident.head_bytes
    head = shared_time(
        np.array(table / bandwidth),
        np.array(resident.head_flops / speed),
    )
    yield Part(
        "head",
        memory_s=float(head[0]),
        compute_s=float(head[1]),
        traffic_bytes=table,
        flops=resident.head_flops,
        stored_bytes=0.0 if spec.tie_word_embeddings else table,
    )
    yield Part("embedding", stored_bytes=table)
    if device.runtime_bytes:
        yield Part("runtime", stored_bytes=device.runtime_bytes)
    yield Part("layer overhead", fixed_s=layers * stack.layer_s)
    yield Part("step overhead", fixed_s=stack.step_s)
    yield Part("sequence overhead", fixed_s=workload.batch * stack.sequence_s)


def shared_time(*times: Floats, each: bool = False) -> Floats:
    """Return how much of the times' :func:`power_mean` each one accounts for, stacked.

    ``t_i (t_i / t)^3``: its derivative times itself. The mean is homogeneous of degree one, so
    that these sum to it.

    Args:
        times: Of one shape.
        each: Return the derivatives alone, to share them further.
    """
    whole = power_mean(*times)
    ratios = np.stack(
        [np.divide(t, whole, out=np.zeros_like(whole), where=whole > 0) for t in times]
    )
    derivatives: Floats = ratios**3
    return derivatives if each else np.stack(times) * derivatives
