"""What is not a routed expert: its matrices, cache and memory; every view counts the same."""

from dataclasses import replace

import numpy as np
import pytest
from benches import TINY
from factories import make_spec

from dmpq.formats import Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.hw_models.resident import (
    activation_values,
    attention_matrices,
    block_matrices,
    cache_bytes,
    context_seen,
    head_shape,
    layer_cache_values,
    layer_score_flops,
    layer_weights,
    resident_bytes,
    resident_matrices,
    score_flops,
    score_heads,
    score_rows,
    score_widths,
)
from dmpq.spec import GEOMETRIES, MoELayer, load_geometry

MENU = Menu()
PLAIN = replace(make_spec(layers=3), num_key_value_heads=2)
SHARED = replace(
    PLAIN,
    moe_layers=(
        MoELayer("a", 8, 2, 256, 128, shared_intermediate_size=96),
        MoELayer("b", 8, 2, 256, 128, gated=False, shared_intermediate_size=64),
    ),
    dense_intermediate_size=512,
    tie_word_embeddings=True,
)


def weights_of(matrices):
    return sum(rows * columns * count for (rows, columns), count in matrices.items())


@pytest.mark.parametrize("spec", [PLAIN, SHARED], ids=["plain", "shared, ungated, dense"])
def test_matrices_layers_and_the_whole_count_the_same_weights(spec):
    layers = layer_weights(spec)
    norms = 2 * spec.hidden_size * spec.num_layers
    assert {values.shape for values in layers.values()} == {(spec.num_layers,)}
    attention = dict.fromkeys(attention_matrices(spec), spec.num_layers)
    assert weights_of(attention) + norms == layers["attention"].sum()
    whole = sum(values.sum() for values in layers.values())
    assert weights_of(block_matrices(spec)) == whole - layers["attention"].sum()
    assert weights_of(resident_matrices(spec)) == whole - norms
    tables = spec.embedding_parameters * (1 if spec.tie_word_embeddings else 2)
    assert whole + tables + spec.hidden_size == spec.other_parameters


def test_a_dense_block_of_no_width_has_no_matrices():
    spec = replace(PLAIN, num_layers=4)
    assert block_matrices(spec) == block_matrices(PLAIN)


def test_memory_follows_both_widths():
    workload = Workload("prefill", batch=2, context=10)
    cache = 2 * 10 * 2 * 2 * 64 * 3
    activations = 20 * 2 * (2 * 256 + 3 * 256)
    np.testing.assert_array_equal(activation_values(PLAIN, workload), [activations] * 3)
    for weight, value in ((2, 2), (1, 2), (0.5, 4)):
        found = resident_bytes(PLAIN, workload, weight_bytes=weight, value_bytes=value)
        assert found == PLAIN.other_parameters * weight + (cache + activations) * value
    assert resident_bytes(PLAIN, workload) == resident_bytes(PLAIN, workload, weight_bytes=2)


def test_a_prompt_attends_to_half_of_itself():
    decode = layer_score_flops(PLAIN, Workload("decode", batch=1, context=100))
    np.testing.assert_array_equal(decode, [2 * 2 * 100 * 4 * 64] * 3)
    np.testing.assert_array_equal(
        layer_score_flops(PLAIN, Workload("prefill", 1, 100)), 100 * decode / 2
    )


def test_a_window_ends_what_is_cached_and_seen():
    spec = replace(PLAIN, sliding_window=30, windowed_layers=2)
    decode, prefill = Workload("decode", 2, 100), Workload("prefill", 2, 100)
    np.testing.assert_array_equal(context_seen(spec, decode), [30, 30, 100])
    each = np.minimum(np.arange(100) + 0.5, 30).mean()  # a token sees half of itself
    np.testing.assert_allclose(context_seen(spec, prefill), [each, each, 50])
    np.testing.assert_array_equal(layer_cache_values(spec, prefill), [2 * 30 * 256] * 2 + [51200])
    assert cache_bytes(spec, decode) == 2 * (2 * 2 * 30 * 256 + 51200)
    wide = replace(spec, sliding_window=100)
    for workload in (decode, prefill):
        np.testing.assert_array_equal(context_seen(wide, workload), context_seen(PLAIN, workload))


def test_latent_attention_scores_over_the_cache_in_decode_and_per_head_in_prefill():
    # DeepSeek-V3: 128 heads; a token caches 512 + 64, and a head has keys of 128 + 64.
    spec = replace(
        TINY,
        num_attention_heads=128,
        num_key_value_heads=128,
        cache_values=576,
        rotated_values=64,
        key_dim=192,
        value_dim=128,
    )
    decode, prefill = Workload("decode", 1, 100), Workload("prefill", 1, 100)
    assert score_widths(spec, decode) == (576, 512)
    assert score_widths(spec, prefill) == (192, 128)
    assert layer_score_flops(spec, decode)[0] == 2 * 100 * 128 * (576 + 512)
    assert layer_score_flops(spec, prefill)[0] == 2 * 100 * 50 * 128 * (192 + 128)
    assert (score_heads(spec, decode), score_heads(spec, prefill)) == (1, 128)
    assert (score_rows(spec, decode), score_rows(spec, prefill)) == (128, 100)


def test_ungated_experts_pass_two_widths_inside():
    found = activation_values(SHARED, Workload(batch=5))
    np.testing.assert_array_equal(found, 5 * 2 * np.array([2 * 256 + 3 * 128, 2 * 256 + 2 * 128]))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("workload", [Workload(), Workload("prefill", 2, 300)], ids=str)
def test_memory_is_that_of_the_analytical_model(geometry, workload):
    spec = load_geometry(geometry)
    maps = np.zeros((1, spec.num_experts), int)
    parts = load_hardware("a100").breakdown(spec, MENU, maps, workload)
    assert resident_bytes(spec, workload) == parts.resident_bytes


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_resident_matrices_hold_the_resident_weights(geometry):
    spec = load_geometry(geometry)
    held = sum(count * out * columns for (out, columns), count in resident_matrices(spec).items())
    head = np.prod(head_shape(spec))
    outside = spec.other_parameters - (1 if spec.tie_word_embeddings else 2) * head
    assert held == pytest.approx(outside, rel=1e-3)  # norms and biases are no matrices


def test_latent_attention_counts_as_one_matrix_of_as_many_weights():
    spec = replace(TINY, attention_parameters=6400, cache_values=40)
    assert resident_matrices(spec)[100, 64] == 3
    assert cache_bytes(spec, Workload(batch=2, context=10)) == 2 * 10 * 40 * 3 * 2


def test_queries_that_share_a_part_of_the_cache():
    assert score_rows(TINY, Workload(batch=8)) == 2
    assert score_rows(TINY, Workload("prefill", 8, 300)) == 300


def test_scores_read_the_whole_context_in_decode_and_half_in_prefill():
    decode = score_flops(TINY, Workload(batch=1, context=100))
    assert decode == 3 * 4 * 100 * 64
    assert score_flops(TINY, Workload("prefill", 1, 100)) == decode * 50
