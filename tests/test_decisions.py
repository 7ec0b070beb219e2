"""What shares one format: every expert and projection once, sums and means by decision."""

import numpy as np
import pytest
from factories import make_spec

from dmpq.decisions import Decisions
from dmpq.spec import ModelSpec, MoELayer

SPEC = ModelSpec(
    name="uneven",
    model_type="olmoe",
    hidden_size=64,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
    tie_word_embeddings=False,
    dense_intermediate_size=0,
    moe_layers=(MoELayer("a", 2, 1, 64, 32), MoELayer("b", 3, 1, 64, 16, gated=False)),
)
LAYERS = [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("serve", "layers", "weights"),
    [
        ("expert", LAYERS, [6144, 6144, 2048, 2048, 2048]),
        ("projection", np.repeat(LAYERS, 2), [4096, 2048] * 2 + [1024] * 6),
        ("layer", [0, 1], [12288, 6144]),
    ],
)
def test_decisions_cover_layers_of_different_sizes(serve, layers, weights):
    decisions = Decisions(SPEC, serve)
    assert decisions.count == len(weights)
    np.testing.assert_array_equal(decisions.layers, layers)
    np.testing.assert_array_equal(decisions.weights, weights)


@pytest.mark.parametrize("serve", ["expert", "projection", "layer"])
def test_sums_and_means_are_those_of_a_loop(serve):
    decisions = Decisions(SPEC, serve)
    values = np.random.default_rng(0).random((5, 2, 3))
    sums = np.zeros((decisions.count, 3))
    for expert in range(5):
        for half in (0, 1):
            sums[decisions.of_projection[expert, half]] += values[expert, half]
    np.testing.assert_allclose(decisions.summed(values), sums, rtol=1e-15)
    experts = values[:, 0]
    expected = {
        "expert": experts,
        "projection": np.repeat(experts, 2, axis=0),
        "layer": np.stack([experts[:2].mean(0), experts[2:].mean(0)]),
    }
    np.testing.assert_allclose(decisions.mean(experts), expected[serve], rtol=1e-15)


def test_expand():
    layers = Decisions(make_spec(), "layer")
    np.testing.assert_array_equal(layers.expand(np.array([[1, 4]])), [[1] * 8 + [4] * 8])
    maps = np.arange(32)[None] % 5
    np.testing.assert_array_equal(Decisions(make_spec(), "projection").expand(maps), maps)
