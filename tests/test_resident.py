"""What is not a routed expert: every view of its weights counts the same ones."""

from dataclasses import replace

import numpy as np
import pytest
from factories import make_spec

from dmpq.hw_models import Workload
from dmpq.hw_models.resident import (
    activation_values,
    attention_matrices,
    block_matrices,
    layer_score_flops,
    layer_weights,
    resident_bytes,
    resident_matrices,
)
from dmpq.spec import MoELayer

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
    assert decode == 2 * 2 * 100 * 4 * 64
    assert layer_score_flops(PLAIN, Workload("prefill", 1, 100)) == 100 * decode / 2
