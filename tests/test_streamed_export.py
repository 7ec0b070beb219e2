"""Checkpoints for other tools, written expert by expert: the bytes of the loaded model's."""

import pytest
import torch
from conftest import build
from exports import bitmap_of
from families import build_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.errors import InputError
from dmpq.export import main
from dmpq.exporters.container import ContainerPacking, write_container
from dmpq.exporters.dequantized import write_dequantized
from dmpq.exporters.plan import Plan
from dmpq.exporters.streamed import StreamedExport
from dmpq.formats import Menu
from dmpq.moe import load_model, reference_path

FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model of a family with the reference's tokenizer, once; returns the folder."""
    made = {}

    def save(family, dtype=torch.bfloat16):
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(family) / family
            build(family).to(dtype).save_pretrained(folder)
            AutoTokenizer.from_pretrained(reference_path()).save_pretrained(folder)
            made[family, dtype] = folder
        return made[family, dtype]

    return save


def a_map(folder, menu):
    moe, tokenizer = load_model(str(folder))
    bitmap = bitmap_of(
        moe.spec, menu, architecture=type(moe.model).__name__, fingerprint=moe.fingerprint
    )
    return moe, tokenizer, bitmap


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dequantized_one_is_the_loaded_model_s_to_the_byte(family, saved, tmp_path):
    moe, tokenizer, bitmap = a_map(saved(family), Menu.parse("2g16,3g8,16"))
    StreamedExport(bitmap, Checkpoint(str(saved(family)))).write(tmp_path / "streamed")
    write_dequantized(bitmap, moe, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("family", ["dbrx", "llama4_text", "nllb-moe", "switch_transformers"])
def test_experts_apart_are_written_whole_or_refused_by_name(family, tmp_path):
    build_tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(tmp_path / "model")
    moe, tokenizer, bitmap = a_map(tmp_path / "model", Menu.parse("2g8,16"))
    streamed = StreamedExport(bitmap, Checkpoint(str(tmp_path / "model")))
    if family != "llama4_text":  # whose experts stand in one tensor, as the interface has them
        with pytest.raises(InputError, match="written expert by expert; leave --max-mem"):
            streamed.write(tmp_path / "streamed")
        assert not (tmp_path / "streamed").exists()
        return
    streamed.write(tmp_path / "streamed")
    write_dequantized(bitmap, moe, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_rounded_alike(dtype, saved, tmp_path):
    folder = saved("olmoe", dtype)
    moe, tokenizer, bitmap = a_map(folder, Menu.parse("2g16,16"))
    StreamedExport(bitmap, Checkpoint(str(folder))).write(tmp_path / "streamed")
    write_dequantized(bitmap, moe, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "keys", "quantizer", "symmetric", "bits"),
    [
        ("olmoe", "2g16,3g8,4g16", "hqq", True, 4),
        ("mixtral", "2g16,3g16", "rtn", False, 4),
        ("qwen3_moe", "2g8,4g16", "rtn", False, 8),
    ],
)
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_container_is_the_loaded_model_s_to_the_byte(
    family, keys, quantizer, symmetric, bits, shard, saved, tmp_path, monkeypatch
):
    pytest.importorskip("compressed_tensors")
    menu = Menu.parse(keys, quantizer=quantizer, symmetric=symmetric)
    moe, tokenizer, bitmap = a_map(saved(family), menu)
    packing = ContainerPacking(Plan.of(bitmap), bits=bits)
    source = Checkpoint(str(saved(family)))
    StreamedExport(bitmap, source, packing, shard).write(tmp_path / "streamed")
    save = type(moe.model).save_pretrained
    monkeypatch.setattr(
        type(moe.model), "save_pretrained", lambda own, out: save(own, out, max_shard_size=shard)
    )
    write_container(bitmap, moe, tokenizer, tmp_path / "whole", bits=bits)
    shards = list((tmp_path / "whole").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard == "20KB")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_the_command_keeps_to_a_limit_of_memory(saved, tmp_path, capsys):
    folder, out = saved("olmoe"), tmp_path / "out"
    moe, tokenizer, bitmap = a_map(folder, Menu.parse("2g16,16"))
    bitmap.write(tmp_path / "bitmap.json")
    command = [tmp_path / "bitmap.json", "--to", "dequantized", "--model", folder, "--out", out]
    assert "--max-memory allows 0.00" in refused(capsys, *command, "--max-memory", "0.001")
    assert "give a positive number" in refused(capsys, *command, "--max-memory", "nan")
    assert not out.exists()
    assert main([*map(str, command), "--max-memory", "0.2"]) == 0
    assert "experts' dequantized" in capsys.readouterr().out
    write_dequantized(bitmap, moe, tokenizer, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert "is there already" in refused(capsys, *command, "--max-memory", "0.2")
    said = refused(capsys, tmp_path / "bitmap.json", "--to", "gptqmodel", "--max-memory", "1")
    assert "has a meaning only with a checkpoint" in said


def test_damage_that_shows_only_in_an_expert_leaves_nothing(saved, tmp_path):
    folder = tmp_path / "model"
    build("olmoe").save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "experts.3.down_proj" in name)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(str(folder))
    bitmap = bitmap_of(
        source.moe.spec,
        Menu.parse("2g16,16"),
        architecture="OlmoeForCausalLM",
        fingerprint=source.fingerprint(),
    )
    with pytest.raises(InputError, match="that are not finite"):
        StreamedExport(bitmap, source).write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
