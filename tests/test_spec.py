"""Geometries: parameter counts against published totals, families, round trips."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.spec import GEOMETRIES, ModelSpec, load_geometry

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "vocab_size": 102400,
}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
}


def total(spec):
    return spec.expert_parameters + spec.other_parameters


@pytest.mark.parametrize(
    ("name", "parameters", "experts"),
    [
        ("olmoe-1b-7b", 6_919_161_856, 1024),
        ("mixtral-8x7b", 46_702_792_704, 256),
        ("qwen3-30b-a3b", 30_532_122_624, 6144),
    ],
)
def test_shipped_geometries_count_as_published(name, parameters, experts):
    spec = load_geometry(name)
    assert total(spec) == parameters
    assert spec.num_experts == experts


@pytest.mark.parametrize(
    ("config", "parameters", "moe_layers"),
    [
        (DEEPSEEK_V3, 671.0264e9, 58),
        (DEEPSEEK_V2_LITE, 15.706484224e9, 26),
        (QWEN2_MOE, 14.315784192e9, 24),
    ],
)
def test_other_families_count_as_published(config, parameters, moe_layers):
    spec = ModelSpec.from_config(config, name="model")
    assert total(spec) == pytest.approx(parameters, rel=1e-5)
    assert len(spec.moe_layers) == moe_layers


def test_latent_attention_caches_its_rank():
    spec = ModelSpec.from_config(DEEPSEEK_V3, name="model")
    assert spec.cache_values_per_token == 512 + 64
    assert load_geometry("mixtral-8x7b").cache_values_per_token == 2 * 8 * 128


def test_latent_attention_keeps_its_inner_widths():
    spec = ModelSpec.from_config(DEEPSEEK_V3, name="model")
    assert (spec.key_dim, spec.value_dim, spec.rotated_values) == (128 + 64, 128, 64)
    with pytest.raises(InputError, match="may not be more than all"):
        replace(spec, rotated_values=577)


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        ({"model_type": "mixtral", "sliding_window": None}, 0),
        ({"model_type": "mixtral", "sliding_window": 128}, 5),
        ({"model_type": "gpt_oss", "sliding_window": 128}, 3),
        ({"model_type": "qwen2_moe", "sliding_window": 128}, 0),
        ({"model_type": "qwen2_moe", "sliding_window": 128, "use_sliding_window": True}, 3),
        (
            {
                "model_type": "qwen2_moe",
                "sliding_window": 128,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            1,
        ),
        ({"model_type": "qwen3_moe", "sliding_window": 128, "use_sliding_window": False}, 0),
        ({"model_type": "dots1", "sliding_window": 128, "max_window_layers": 3}, 2),
        (
            {
                "model_type": "any",
                "sliding_window": 128,
                "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
            },
            4,
        ),
    ],
)
def test_windows_follow_the_config(config, windowed):
    spec = ModelSpec.from_config(QWEN2_MOE | {"num_hidden_layers": 5} | config, name="model")
    assert spec.windowed_layers == windowed
    assert spec.sliding_window == (128 if windowed else 0)


def test_windows_of_another_model_keep_their_share_of_the_layers():
    spec = load_geometry("olmoe-1b-7b")
    other = replace(
        load_geometry("mixtral-8x7b"), num_layers=32, sliding_window=128, windowed_layers=16
    )
    taken = spec.with_widths_of(other)
    assert (taken.sliding_window, taken.windowed_layers) == (128, 8)
    assert spec.with_widths_of(replace(other, windowed_layers=1)).windowed_layers == 1
    for wrong in ({"windowed_layers": 33}, {"windowed_layers": 0}, {"sliding_window": 0}):
        with pytest.raises(InputError, match="give both or neither"):
            replace(other, **wrong)


@pytest.mark.parametrize("ours", [True, False])
def test_dense_blocks_have_a_gate_where_experts_have(ours):
    spec = ModelSpec.from_config(DEEPSEEK_V3, name="model")
    layers = tuple(replace(layer, gated=ours) for layer in spec.moe_layers)
    found = replace(spec, moe_layers=layers)
    assert found.dense_block_parameters == (3 if ours else 2) * 7168 * 18432


@pytest.mark.parametrize(
    ("extra", "sparse"),
    [
        ({"mlp_only_layers": [0]}, [1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"first_k_dense_replace": 3}, [3]),
        ({"moe_layer_freq": [0, 1, 0, 1]}, [1, 3]),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, [1, 2]),
    ],
)
def test_sparse_layers_follow_the_config(extra, sparse):
    config = {**QWEN2_MOE, "num_hidden_layers": 4, **extra}
    spec = ModelSpec.from_config(config, name="model")
    assert [layer.path for layer in spec.moe_layers] == [
        f"model.layers.{i}.mlp.experts" for i in sparse
    ]


def test_paths_of_a_loaded_model_and_nested_configs_win():
    config = {"model_type": "outer", "text_config": QWEN2_MOE}
    spec = ModelSpec.from_config(config, name="model", paths=["a.experts", "b.experts"])
    assert [layer.path for layer in spec.moe_layers] == ["a.experts", "b.experts"]
    assert spec.model_type == "qwen2_moe"
    assert spec.dense_intermediate_size == 5632


@pytest.mark.parametrize("name", GEOMETRIES)
def test_json_round_trip(name):
    spec = load_geometry(name)
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_stored_bits_are_those_of_the_menu():
    spec, menu = load_geometry("olmoe-1b-7b"), Menu()
    stored = spec.stored_bits(menu)
    assert stored.shape == (1024, 2, 5)
    weights = np.array([2 * 1024 * 2048, 1024 * 2048])
    np.testing.assert_array_equal(stored[5], weights[:, None] * [2.25, 3.25, 4.25, 8.25, 16])
    assert np.bincount(spec.layer_of_expert).tolist() == [64] * 16


def test_widths_of_another_model():
    small = ModelSpec.from_config(
        {
            "model_type": "olmoe",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 4096,
        },
        name="small",
    )
    olmoe = load_geometry("olmoe-1b-7b")
    spec = small.with_widths_of(olmoe)
    assert spec.name == "small at olmoe-1b-7b's widths"
    assert (spec.num_layers, spec.num_experts, spec.vocab_size) == (4, 64, 4096)
    assert spec.moe_layers[0].gate_up_shape == olmoe.moe_layers[0].gate_up_shape
    assert spec.attention_parameters_per_layer == olmoe.attention_parameters_per_layer
    assert [x.path for x in spec.moe_layers] == [x.path for x in small.moe_layers]


def test_geometry_from_a_file_or_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_MOE))
    assert load_geometry(str(tmp_path)) == load_geometry(str(tmp_path / "config.json"))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"num_experts": 8}', "{}", "\x00"])
def test_bad_config_files_end_in_one_sentence(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_geometry(str(file))
    assert "\n" not in str(caught.value)


def test_unknown_geometry_gets_a_hint():
    with pytest.raises(InputError, match="did you mean 'olmoe-1b-7b'"):
        load_geometry("olmoe-1b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "16"}, "of type int"),
        ({"num_layers": True}, "of type int"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"moe_layers": []}, "0 MoE layers"),
        ({"moe_layers": 3}, "not a list"),
        ({"moe_layers": [3]}, "not a JSON object"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
    ],
)
def test_bad_geometries_are_refused(change, message):
    data = {**load_geometry("olmoe-1b-7b").to_json(), **change}
    with pytest.raises(InputError, match=message):
        ModelSpec.from_json(data)
