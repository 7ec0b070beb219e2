"""What a step handles besides the routed experts: matrices, KV cache, scores, memory.

Counted here alone, from the geometry; each hardware model adds its own widths and speeds.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from dmpq.hw_models.base import Floats, Workload
from dmpq.spec import ModelSpec

Shape = tuple[int, int]

FLOPS_PER_WEIGHT: Final = 2
VALUE_BYTES: Final = 2
"""Bytes of a cached or passed value at full width."""


def resident_matrices(spec: ModelSpec) -> Counter[Shape]:
    """Return the matrices that every token passes in all layers, (out, in) → how often."""
    matrices = Counter[Shape]()
    for shape in attention_matrices(spec):
        matrices[shape] += spec.num_layers
    matrices.update(block_matrices(spec))
    return matrices


def attention_matrices(spec: ModelSpec) -> tuple[Shape, ...]:
    """Return the matrices of a layer's attention, (out, in).

    Queries, keys and values are one matrix, as engines fuse them. Latent attention, of which the
    geometry tells only the number of weights, counts as one matrix of as many.
    """
    if spec.cache_values:
        return (attention_shape(spec),)
    return attention_shape(spec), (spec.hidden_size, spec.num_attention_heads * spec.head_dim)


def block_matrices(spec: ModelSpec) -> Counter[Shape]:
    """Return routers, shared experts and dense blocks of all layers, (out, in) → how often."""
    hidden, matrices = spec.hidden_size, Counter[Shape]()
    for layer in spec.moe_layers:
        matrices[layer.num_experts, hidden] += 1
        if shared := layer.shared_intermediate_size:
            matrices[(2 if layer.gated else 1) * shared, hidden] += 1
            matrices[hidden, shared] += 1
    dense, width = spec.num_layers - len(spec.moe_layers), spec.dense_intermediate_size
    if dense and width:
        matrices[(2 if spec.gated else 1) * width, hidden] += dense
        matrices[hidden, width] += dense
    return matrices


def layer_weights(spec: ModelSpec) -> dict[str, Floats]:
    """Return the weights that every token passes in each layer: what they are → (num_layers,).

    Attention includes the layer's norms. Layers without experts come last, wherever they stand.
    """
    routers, shared, dense = np.zeros((3, spec.num_layers))
    for i, layer in enumerate(spec.moe_layers):
        routers[i] = layer.num_experts * spec.hidden_size
        shared[i] = layer.resident_parameters - routers[i]
    dense[len(spec.moe_layers) :] = spec.dense_block_parameters
    return {
        "attention": np.full(spec.num_layers, float(spec.attention_parameters_per_layer)),
        "routers": routers,
        "shared experts": shared,
        "dense blocks": dense,
    }


def attention_shape(spec: ModelSpec) -> Shape:
    """Return the shape of a layer's queries, keys and values together, (out, in)."""
    if spec.cache_values:
        return round(spec.attention_parameters_per_layer / spec.hidden_size), spec.hidden_size
    heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
    return heads * spec.head_dim, spec.hidden_size


def head_shape(spec: ModelSpec) -> Shape:
    """Return the output head's shape, (out, in); it sees the last token of each sequence."""
    return spec.vocab_size, spec.hidden_size


def windows(spec: ModelSpec) -> Floats:
    """Return how many tokens back each layer sees, (num_layers,); infinite without a window.

    Layers with a window come first, wherever they stand.
    """
    reach = np.full(spec.num_layers, np.inf)
    reach[: spec.windowed_layers] = spec.sliding_window
    return reach


def layer_cache_values(spec: ModelSpec, workload: Workload) -> Floats:
    """Return the numbers in the KV cache of each layer, (num_layers,)."""
    tokens = np.minimum(workload.context, windows(spec))
    return workload.batch * tokens * spec.cache_values_per_token


def cache_bytes(spec: ModelSpec, workload: Workload, *, value_bytes: float = VALUE_BYTES) -> float:
    """Return the bytes of the KV cache, all layers."""
    return float(layer_cache_values(spec, workload).sum() * value_bytes)


def context_seen(spec: ModelSpec, workload: Workload) -> Floats:
    """Return the tokens that a token attends to in each layer, on average, (num_layers,).

    In decode all that are cached; in prefill all before it, which is half of the prompt where no
    window ends earlier.
    """
    seen = np.minimum(workload.context, windows(spec))
    return seen if workload.phase == "decode" else seen * (1 - seen / (2 * workload.context))


def score_widths(spec: ModelSpec, workload: Workload) -> tuple[int, int]:
    """Return a query head's widths in the products with keys and with values.

    Latent attention multiplies with what is cached in decode, its up-projections absorbed into
    those of queries and outputs; in prefill it makes keys and values first (DeepSeek-V2, arXiv
    2405.04434, section 2.1).
    """
    if spec.cache_values and workload.phase == "decode":
        return spec.cache_values, spec.cache_values - spec.rotated_values
    return spec.key_dim or spec.head_dim, spec.value_dim or spec.head_dim


def layer_score_flops(spec: ModelSpec, workload: Workload) -> Floats:
    """Return the operations of each layer's attention over the context, (num_layers,)."""
    pairs = workload.tokens * context_seen(spec, workload)
    return FLOPS_PER_WEIGHT * pairs * spec.num_attention_heads * sum(score_widths(spec, workload))


def score_flops(spec: ModelSpec, workload: Workload) -> float:
    """Return the operations of attention over the context, all layers."""
    return float(layer_score_flops(spec, workload).sum())


def score_heads(spec: ModelSpec, workload: Workload) -> int:
    """Return the heads of the keys and values that queries meet: one where they are latent."""
    if not spec.cache_values:
        return spec.num_key_value_heads
    return 1 if workload.phase == "decode" else spec.num_attention_heads


def score_rows(spec: ModelSpec, workload: Workload) -> int:
    """Return how many queries share what is read of the cache: rows of the products of attention.

    In decode, the query heads of one key-value head; in prefill, the whole prompt.
    """
    if workload.phase == "prefill":
        return workload.context
    return max(1, spec.num_attention_heads // score_heads(spec, workload))


def activation_values(spec: ModelSpec, workload: Workload) -> Floats:
    """Return the numbers into and out of the routed experts' products, per MoE layer, (L,)."""
    values = [
        workload.tokens
        * layer.top_k
        * (2 * layer.hidden_size + (3 if layer.gated else 2) * layer.intermediate_size)
        for layer in spec.moe_layers
    ]
    return np.array(values, dtype=np.float64)


def resident_bytes(
    spec: ModelSpec,
    workload: Workload,
    *,
    weight_bytes: float | None = None,
    value_bytes: float = VALUE_BYTES,
) -> float:
    """Return memory outside the routed experts: other weights, KV cache, activations.

    Args:
        spec: Geometry of the model.
        workload: What a step is.
        weight_bytes: Bytes of a weight; ``None`` for the checkpoint's.
        value_bytes: Bytes of a cached or passed value.
    """
    weights = spec.other_parameters * (spec.dtype_bytes if weight_bytes is None else weight_bytes)
    activations = activation_values(spec, workload).max() * value_bytes
    return float(weights + cache_bytes(spec, workload, value_bytes=value_bytes) + activations)
