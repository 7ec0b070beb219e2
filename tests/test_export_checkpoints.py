import json

import pytest
import torch
from conftest import build
from exports import bitmap_of
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dmpq.console import quiet_libraries
from dmpq.errors import InputError
from dmpq.exporters.container import check_container, write_container
from dmpq.exporters.dequantized import write_dequantized
from dmpq.exporters.plan import Plan
from dmpq.exporters.weights import matrices, quantized
from dmpq.formats import Menu
from dmpq.moe import MoEModel


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def model():
    quiet_libraries()

    def make(family, menu):
        moe = MoEModel(build(family), name=f"tiny-{family}")
        bitmap = bitmap_of(
            moe.spec,
            menu,
            architecture=type(moe.model).__name__,
            fingerprint=moe.fingerprint,
        )
        own = [
            quantized(w, fmt, bitmap).dequantize() if fmt.is_quantized else w.clone()
            for *_, fmt, w in matrices(bitmap, moe)
        ]
        return moe, bitmap, own

    return make


def read_back(folder, bitmap):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moe = MoEModel(loaded, name="read back")
    return moe, [weight for *_, weight in matrices(bitmap, moe)]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_a_dequantized_checkpoint_holds_the_evaluated_weights(family, model, tmp_path):
    moe, bitmap, own = model(family, Menu.parse("2g16,3g8,16"))
    before = {n: p.clone() for n, p in moe.model.named_parameters() if "experts" not in n}
    write_dequantized(bitmap, moe, Tokenizer(), tmp_path / "out")
    back, weights = read_back(tmp_path / "out", bitmap)
    for want, got in zip(own, weights, strict=True):
        torch.testing.assert_close(got, want.bfloat16().float(), rtol=0, atol=0)
    for name, parameter in back.model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, before[name].bfloat16().float(), rtol=0, atol=0)
    names = set()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("model.layers.0.block_sparse_moe.experts.0.w1.weight" in names) == (
        family == "mixtral"
    )


@pytest.mark.parametrize(
    ("family", "keys", "quantizer", "symmetric", "bits"),
    [
        ("olmoe", "2g16,3g8,4g16", "hqq", True, 4),
        ("mixtral", "2g16,3g16", "rtn", False, 4),
        ("qwen3_moe", "2g8,4g16", "rtn", False, 8),
    ],
)
def test_transformers_loads_a_container_to_the_evaluated_weights(
    family, keys, quantizer, symmetric, bits, model, tmp_path
):
    pytest.importorskip("compressed_tensors")
    moe, bitmap, own = model(family, Menu.parse(keys, quantizer=quantizer, symmetric=symmetric))
    write_container(bitmap, moe, Tokenizer(), tmp_path / "out", bits=bits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    _, weights = read_back(tmp_path / "out", bitmap)
    for want, got in zip(own, weights, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_container_in_shards_has_a_whole_index(model, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    moe, bitmap, own = model("olmoe", Menu.parse("2g16,4g16", symmetric=True))
    save = type(moe.model).save_pretrained
    monkeypatch.setattr(
        type(moe.model),
        "save_pretrained",
        lambda self, folder: save(self, folder, max_shard_size="20KB"),
    )
    write_container(bitmap, moe, Tokenizer(), tmp_path / "out", bits=4)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    _, weights = read_back(tmp_path / "out", bitmap)
    for want, got in zip(own, weights, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "quantizer", "symmetric", "bits", "message"),
    [
        ("2g16,4g16", "hqq", False, 8, "zero-points are floats"),
        ("2g16,16", "rtn", True, 8, "at 16 bits"),
        ("0,4g16", "rtn", True, 8, "at 0 bits"),
        ("2g16,4g16", "rtn", False, 4, "give --container 5"),
        ("2g16,8g16", "rtn", False, 8, "search with --symmetric"),
        ("2g16,8g16", "rtn", True, 4, "give --container 8"),
    ],
)
def test_what_does_not_fit_a_container_is_refused(
    keys, quantizer, symmetric, bits, message, model
):
    _, bitmap, _ = model("olmoe", Menu.parse(keys, quantizer=quantizer, symmetric=symmetric))
    with pytest.raises(InputError, match=message):
        check_container(Plan.of(bitmap), bits)


def test_experts_fused_on_disk_have_no_container(model):
    _, bitmap, _ = model("gpt_oss", Menu.parse("2g16,4g16", symmetric=True))
    with pytest.raises(InputError, match="one tensor on disk"):
        check_container(Plan.of(bitmap), 4)


def test_nothing_is_left_where_a_checkpoint_is_refused(model, tmp_path):
    moe, bitmap, _ = model("olmoe", Menu.parse("2g16,4g16"))
    other = bitmap_of(moe.spec, bitmap.menu, architecture="OlmoeForCausalLM")
    with pytest.raises(InputError, match="was made for weights 000000000000"):
        write_dequantized(other, moe, Tokenizer(), tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError, match="is there already"):
        write_dequantized(bitmap, moe, Tokenizer(), tmp_path / "there")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_nothing_is_left_where_writing_fails(model, tmp_path):
    moe, bitmap, _ = model("olmoe", Menu.parse("2g16,4g16"))

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_dequantized(bitmap, moe, Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
