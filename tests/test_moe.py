import shutil

import pytest
import torch
from conftest import FAMILIES, build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dmpq.errors import InputError
from dmpq.moe import MoEModel, load_model


@pytest.mark.parametrize("family", FAMILIES)
def test_dispatch_computes_what_grouped_mm_computes(family, token_ids):
    model = build(family)
    model.set_experts_implementation("grouped_mm")
    with torch.inference_mode():
        expected = model(input_ids=token_ids, use_cache=False).logits
        assert torch.equal(MoEModel(model, name=family).logits(token_ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_seen_as_out_by_in(family, tiny):
    moe = tiny(family)
    for layer, experts in zip(moe.spec.moe_layers, moe.containers, strict=True):
        assert tuple(experts.gate_up.shape) == (layer.num_experts, *layer.gate_up_shape)
        assert tuple(experts.down.shape) == (layer.num_experts, *layer.down_shape)
        assert experts.router is not None


def test_early_dense_layers_are_not_moe_layers(tiny):
    assert [layer.path for layer in tiny("deepseek_v3").spec.moe_layers] == [
        "model.layers.1.mlp.experts"
    ]


def test_a_dense_model_is_refused():
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(InputError, match="is a dense model"):
        MoEModel(AutoModelForCausalLM.from_config(config), name="dense")


def test_a_family_outside_the_interface_is_refused():
    config = AutoConfig.for_model(
        "jetmoe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_key_value_heads=1,
        kv_channels=8,
        num_local_experts=4,
    )
    with pytest.raises(InputError, match="family 'jetmoe', which is not supported: its attention"):
        MoEModel(AutoModelForCausalLM.from_config(config), name="jet")


def test_fingerprint_changes_with_one_weight():
    one, other = build("olmoe"), build("olmoe")
    before = MoEModel(one, name="a").fingerprint
    assert before == MoEModel(other, name="b").fingerprint
    changed = build("olmoe")
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj[3, 0, 0] += 1
    assert MoEModel(changed, name="c").fingerprint != before


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_model(str(tmp_path))


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    model = build("olmoe")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from dmpq.moe import reference_path

    shutil.copytree(reference_path(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.experts.3.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks|cannot be read"):
        load_model(str(tmp_path / "model"))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    from dmpq.moe import reference_path

    shutil.copytree(reference_path(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path / "model"))


def test_a_hub_id_without_network_is_refused():
    with pytest.raises(InputError, match="hub has not delivered"):
        load_model("nobody/no-such-model")
