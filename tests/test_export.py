import fnmatch
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from exports import bitmap_of, spec_of, widths_of

from dmpq.errors import InputError
from dmpq.export import main
from dmpq.exporters import EXPORTERS
from dmpq.exporters.plan import Plan
from dmpq.formats import Menu

MLP = "model.layers.{}.mlp.experts"
OTHERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.shared_expert.gate_proj",
    "model.layers.1.mlp.experts_norm.up_proj",
    "model.layers.10.mlp.experts.1.up_proj",
    "lm_head",
]
MIXED = Menu.parse("2,3,4,8,16", quantizer="rtn", symmetric=True)


def olmoe(menu=MIXED, **options):
    return bitmap_of(spec_of("olmoe", MLP), menu, architecture="OlmoeForCausalLM", **options)


def split_map(menu=MIXED):
    spec = spec_of("olmoe", MLP)
    pairs = np.random.default_rng(1).integers(0, len(menu), (spec.num_experts, 2))
    return bitmap_of(spec, menu, architecture="OlmoeForCausalLM", pairs=pairs)


def by_layer(menu=MIXED, sides=((0, 1), (2, 4))):
    spec = spec_of("olmoe", MLP)
    pairs = np.repeat(np.array(sides), 12, axis=0)
    return bitmap_of(spec, menu, architecture="OlmoeForCausalLM", pairs=pairs)


def document(tool, bitmap):
    return json.loads(EXPORTERS[tool].text(Plan.of(bitmap)))


def gptq_bits(config, name):
    """GPTQModel's ``dynamic_get``, as it is written there: in order, matched from the start."""
    for pattern, override in config["dynamic"].items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return 16
        elif re.match(pattern.removeprefix("+:"), name):
            return override["bits"]
    return config["bits"]


@pytest.mark.parametrize("make", [olmoe, split_map, by_layer])
def test_gptqmodel_gives_every_module_the_map_s_width(make):
    bitmap = make()
    config = document("gptqmodel", bitmap)
    assert {name: gptq_bits(config, name) for name in widths_of(bitmap)} == widths_of(bitmap)
    assert {gptq_bits(config, name) for name in OTHERS} == {16}
    assert config["sym"] is True


def test_gptqmodel_s_patterns_do_not_skip_experts_by_their_names_within_a_layer():
    # It first asks which modules of a layer to look at (7.7.0, filter_not_quantize_module).
    config = document("gptqmodel", split_map())
    assert gptq_bits(config, "mlp.experts.3.gate_proj") == config["bits"]
    assert gptq_bits(config, "self_attn.q_proj") == 16


def test_gptqmodel_s_patterns_of_a_layer_answer_vllm_s_fused_name():
    config = document("gptqmodel", by_layer(sides=((1, 1), (2, 2))))
    assert [gptq_bits(config, MLP.format(layer)) for layer in (0, 1)] == [3, 4]


@pytest.mark.parametrize("make", [olmoe, split_map])
def test_auto_round_names_every_matrix_in_full(make):
    bitmap = make()
    config = document("auto-round", bitmap)
    assert {k: v["bits"] for k, v in config["layer_config"].items()} == widths_of(bitmap)
    assert config["bits"] == 16


def compressed_bits(config, name):
    found = {
        group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for target in group["targets"]
        if re.match(target.removeprefix("re:"), name)
    }
    assert len(found) <= 1
    return found.pop() if found else 16


@pytest.mark.parametrize("make", [olmoe, split_map])
def test_compressed_tensors_targets_are_anchored(make):
    bitmap = make()
    config = document("compressed-tensors", bitmap)
    assert {name: compressed_bits(config, name) for name in widths_of(bitmap)} == widths_of(bitmap)
    assert {compressed_bits(config, name) for name in OTHERS} == {16}


def test_compressed_tensors_targets_modules_and_names_on_disk_of_mixtral():
    bitmap = bitmap_of(spec_of("mixtral", MLP), MIXED, architecture="MixtralForCausalLM")
    config = document("compressed-tensors", bitmap)
    leaves = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, bits in widths_of(bitmap).items():
        parent, _, leaf = name.rpartition(".")
        on_disk = f"{parent.replace('.mlp.', '.block_sparse_moe.')}.{leaves[leaf]}"
        assert compressed_bits(config, name) == compressed_bits(config, on_disk) == bits


def test_llama_cpp_has_a_type_per_tensor():
    menu = Menu.parse("2,3,4,8,16")
    command = EXPORTERS["llama.cpp"].text(Plan.of(by_layer(menu)))
    words = shlex.split(command.replace("\\\n", " "))
    given = [words[i + 1].rpartition("=") for i, w in enumerate(words) if w == "--tensor-type"]

    def type_of(name):
        return [kind for pattern, _, kind in given if re.search(pattern, name)]

    assert type_of("blk.0.ffn_gate_exps.weight") == type_of("blk.0.ffn_up_exps.weight") == ["q2_k"]
    assert type_of("blk.0.ffn_down_exps.weight") == ["q3_k"]
    assert type_of("blk.1.ffn_up_exps.weight") == ["q4_k"]
    assert type_of("blk.1.ffn_down_exps.weight") == ["bf16"]
    assert type_of("blk.10.ffn_up_exps.weight") == type_of("blk.0.attn_q.weight") == []


def test_mlx_has_an_entry_per_matrix_where_the_checkpoint_has_its_experts():
    spec = spec_of("mixtral", MLP)
    pairs = np.repeat([[0, 1], [2, 4]], 12, axis=0)
    bitmap = bitmap_of(spec, MIXED, architecture="MixtralForCausalLM", pairs=pairs)
    config = document("mlx", bitmap)["quantization"]
    block = "model.layers.{}.block_sparse_moe.switch_mlp.{}_proj"
    assert config[block.format(0, "gate")] == {"group_size": 128, "bits": 2}
    assert config[block.format(0, "down")] == {"group_size": 128, "bits": 3}
    assert config[block.format(1, "up")]["bits"] == 4
    assert config[block.format(1, "down")] is False


def test_modelopt_s_last_matching_entry_is_the_layer_s():
    config = document("modelopt", by_layer(sides=((2, 2), (3, 3))))

    def bits(name):
        last = [e for e in config["quant_cfg"] if fnmatch.fnmatch(name, e["quantizer_name"])][-1]
        return last["cfg"]["num_bits"] if last["enable"] else 16

    assert bits("model.layers.0.mlp.experts.3.up_proj.weight_quantizer") == 4
    assert bits("model.layers.1.mlp.experts.11.down_proj.weight_quantizer") == 8
    assert bits("model.layers.0.mlp.experts.3.up_proj.input_quantizer") == 16
    assert bits("lm_head.weight_quantizer") == 16


TORCHAO = """
import json, sys
import torch
from torch import nn
from torchao.core.config import config_from_dict
from torchao.quantization import quantize_

names = json.load(open(sys.argv[2]))
root = nn.Module()
for name in names:
    here = root
    *parents, leaf = name.split(".")
    for part in parents:
        if part not in dict(here.named_children()):
            here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    here.add_module(leaf, nn.Linear(256, 32, bias=False))
quantize_(root, config_from_dict(json.load(open(sys.argv[1]))), filter_fn=None)
bits = {}
for name in names:
    weight = root.get_submodule(name).weight
    kind = getattr(weight, "target_dtype", None)
    bits[name] = 16 if kind is None else int(str(kind).removeprefix("torch.int"))
print(json.dumps(bits))
"""


def test_torchao_quantizes_every_linear_to_the_map_s_width(tmp_path):
    bitmap = split_map()
    config, names = tmp_path / "config.json", tmp_path / "names.json"
    config.write_text(EXPORTERS["torchao"].text(Plan.of(bitmap)))
    names.write_text(json.dumps([*widths_of(bitmap), *OTHERS]))
    done = subprocess.run(
        [sys.executable, "-c", TORCHAO, str(config), str(names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == widths_of(bitmap) | dict.fromkeys(OTHERS, 16)


def test_every_tool_writes_its_file(tmp_path, capsys):
    path, out = tmp_path / "bitmap.json", tmp_path / "out"
    by_layer(sides=((2, 2), (3, 3))).write(path)
    for tool in EXPORTERS:
        assert main([str(path), "--to", tool]) == 0
        shown = capsys.readouterr().out
        assert main([str(path), "--to", tool, "--out", str(out)]) == 0
        assert out.read_text() == shown
        capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to do"),
        (["--to", "gptqmodell"], "did you mean 'gptqmodel'"),
        (["--check", "vlm"], "did you mean 'vllm'"),
        (["--to", "mlx", "--check", "mlx"], "Say what to do"),
        (["--to", "mlx"], "mlx cannot hold this bit map"),
        (["--to", "gptqmodel", "--model", "reference"], "needs no --model"),
        (["--to", "gptqmodel", "--container", "4"], "only with --to compressed-tensors"),
        (["--to", "gptqmodel", "--profile", "x"], "--profile has a meaning only with --check"),
        (["--check", "mlx", "--avg-bits", "0"], "--avg-bits 0.0 makes no sense"),
        (["--check", "mlx", "--profile", "nowhere"], "nowhere"),
        (["--to", "dequantized"], "give --out FOLDER"),
        (["--to", "compressed-tensors", "--container", "4", "--out", "x"], "at 16 bits"),
        (["--to", "compressed-tensors", "--container", "9", "--out", "x"], "give 2 to 8"),
    ],
)
def test_bad_options_end_with_two_and_one_line(tmp_path, capsys, arguments, message):
    path = tmp_path / "bitmap.json"
    olmoe().write(path)
    assert main([str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_pruned_experts_are_refused_by_every_tool(tmp_path, capsys):
    path = tmp_path / "bitmap.json"
    olmoe(Menu.parse("0,4", symmetric=True)).write(path)
    for tool in EXPORTERS:
        assert main([str(path), "--to", tool]) == 2
        assert "cannot hold this bit map" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--to", "--check"])
def test_the_map_is_not_overwritten_by_what_is_made_of_it(option, tmp_path, capsys):
    path = tmp_path / "bitmap.json"
    olmoe(Menu.parse("4", symmetric=True)).write(path)
    before = path.read_bytes()
    assert main([str(path), option, "gptqmodel", "--out", str(path)]) == 2
    assert "is the bit map itself; give another file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_family_without_known_names_is_refused():
    bitmap = olmoe()
    odd = bitmap_of(
        spec_of("ernie4_5_vl_moe", "model.layers.{}.mlp.text_moe.experts"),
        MIXED,
        architecture="Unknown",
    )
    assert Plan.of(bitmap)
    with pytest.raises(InputError, match="named on disk is unknown"):
        Plan.of(odd)


@pytest.mark.parametrize("options", [("--to", "gptqmodel"), ("--check", "vllm")])
def test_compensators_are_refused_where_nothing_holds_them(options, tmp_path, capsys):
    menu = Menu(MIXED.formats, "hqq+lr2")
    olmoe(menu).write(tmp_path / "compensated.json")
    assert main([str(tmp_path / "compensated.json"), *options]) == 2
    said = capsys.readouterr().err
    assert f"{options[1]} has no place for compensators" in said
