"""What a step handles besides the routed experts: matrices, KV cache, scores, memory."""

from __future__ import annotations

from collections import Counter
from typing import Final

from dmpq.hw_models.base import Workload
from dmpq.spec import ModelSpec

Shape = tuple[int, int]

CACHE_BYTES: Final = 2
ACTIVATION_BYTES: Final = 2


def resident_matrices(spec: ModelSpec) -> Counter[Shape]:
    """Return the matrices that every token passes in all layers, (out, in) → how often.

    Queries, keys and values are one matrix, as engines fuse them. Latent attention, of which the
    geometry tells only the number of weights, counts as one matrix of as many.
    """
    hidden, matrices = spec.hidden_size, Counter[Shape]()
    matrices[attention_shape(spec)] += spec.num_layers
    if not spec.cache_values:
        matrices[hidden, spec.num_attention_heads * spec.head_dim] += spec.num_layers
    for layer in spec.moe_layers:
        matrices[layer.num_experts, hidden] += 1
        if shared := layer.shared_intermediate_size:
            matrices[(2 if layer.gated else 1) * shared, hidden] += 1
            matrices[hidden, shared] += 1
    if dense := spec.num_layers - len(spec.moe_layers):
        matrices[2 * spec.dense_intermediate_size, hidden] += dense
        matrices[hidden, spec.dense_intermediate_size] += dense
    return matrices


def attention_shape(spec: ModelSpec) -> Shape:
    """Return the shape of a layer's queries, keys and values together, (out, in)."""
    if spec.cache_values:
        return round(spec.attention_parameters_per_layer / spec.hidden_size), spec.hidden_size
    heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
    return heads * spec.head_dim, spec.hidden_size


def head_shape(spec: ModelSpec) -> Shape:
    """Return the output head's shape, (out, in); it sees the last token of each sequence."""
    return spec.vocab_size, spec.hidden_size


def cache_bytes(spec: ModelSpec, workload: Workload) -> int:
    """Return the bytes of the KV cache, all layers."""
    values = workload.batch * workload.context * spec.cache_values_per_token * spec.num_layers
    return values * CACHE_BYTES


def score_flops(spec: ModelSpec, workload: Workload) -> float:
    """Return the operations of attention over the context, all layers; half of it in prefill."""
    seen = workload.context if workload.phase == "decode" else workload.context / 2
    pairs = workload.tokens * seen
    return 4.0 * pairs * spec.num_attention_heads * spec.head_dim * spec.num_layers


def score_rows(spec: ModelSpec, workload: Workload) -> int:
    """Return how many queries share what is read of the cache: rows of the products of attention.

    In decode, the query heads of one key-value head; in prefill, the whole prompt.
    """
    if workload.phase == "prefill":
        return workload.context
    return max(1, spec.num_attention_heads // spec.num_key_value_heads)


def resident_bytes(spec: ModelSpec, workload: Workload) -> float:
    """Return memory outside the routed experts: other weights, KV cache, activations."""
    activations = max(
        workload.tokens
        * layer.top_k
        * (2 * layer.hidden_size + 3 * layer.intermediate_size)
        * ACTIVATION_BYTES
        for layer in spec.moe_layers
    )
    weights = spec.other_parameters * spec.dtype_bytes
    return float(weights + cache_bytes(spec, workload) + activations)
