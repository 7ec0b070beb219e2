"""Tools that cannot live beside dmpq's own libraries, run on tiny models with our configuration.

Each needs an interpreter that has the tool, named by a variable of the environment; see the skip's
reason. They run in processes of their own: a loaded AutoRound checkpoint spoils later loads.
"""

import json
import os
import subprocess

import numpy as np
import pytest
from exports import bitmap_of, spec_of, widths_of

from dmpq.exporters import EXPORTERS
from dmpq.exporters.plan import Plan
from dmpq.formats import Menu

MLP = "model.layers.{}.mlp.experts"
ARCHITECTURES = {"olmoe": "OlmoeForCausalLM", "mixtral": "MixtralForCausalLM"}

MODEL = """
import json, sys, tempfile
from pathlib import Path
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

family, path = sys.argv[1:3]
config = json.load(open(path))
sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=64, pad_token_id=0,
             intermediate_size=64, num_experts_per_tok=2)
sizes["num_experts" if family == "olmoe" else "num_local_experts"] = 12
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
words = Tokenizer(WordLevel({str(i): i for i in range(256)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
out = tempfile.mkdtemp()

def shapes():
    found = {}
    for file in Path(out).rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {k: opened.get_slice(k).get_shape() for k in opened.keys()}
    return found

def report(kind, dim):
    stored = shapes()
    bits = {}
    for name, shape in stored.items():
        leaf, _, what = name.rpartition(".")
        if what == kind:
            bits[leaf] = shape[dim] * 32 // 64
        elif what == "weight" and leaf.endswith("_proj"):
            bits[leaf] = 16
    print("\\nBITS " + json.dumps(bits))
"""
AUTO_ROUND = (
    MODEL
    + """
from auto_round import AutoRound
AutoRound(model, tokenizer, iters=0, disable_opt_rtn=True, disable_model_free=True,
          device_map="cpu", **config).quantize_and_save(out, format="auto_round")
report("qweight", 0)
"""
)
LLM_COMPRESSOR = (
    MODEL
    + """
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
source = tempfile.mkdtemp()
model.save_pretrained(source)
tokenizer.save_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source)
linearize_moe(model)
recipe = QuantizationModifier(config_groups=config["config_groups"], ignore=config["ignore"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(out, save_compressed=True)
report("weight_packed", 1)
"""
)
GPTQMODEL = (
    MODEL
    + """
from gptqmodel import GPTQModel, QuantizeConfig
source = tempfile.mkdtemp()
model.save_pretrained(source)
tokenizer.save_pretrained(source)
loaded = GPTQModel.load(source, QuantizeConfig(**config))
rows = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0))
loaded.quantize([{"input_ids": r[None], "attention_mask": torch.ones(1, 64, dtype=torch.long)}
                 for r in rows], batch_size=1)
loaded.save(out)
report("qweight", 0)
"""
)
MODELOPT = (
    MODEL
    + """
import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.nn import TensorQuantizer
for entry in config["quant_cfg"]:
    blocks = entry.get("cfg", {}).get("block_sizes")
    if blocks is not None:
        blocks[-1] = blocks.pop("-1")
model.set_experts_implementation("eager")
rows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
mtq.quantize(model, config, lambda m: m(rows))
leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
bits = {}
for name, module in model.named_modules():
    if name.endswith(".experts"):
        for tensor, parts in leaves.items():
            for expert, weight in enumerate(module.get_parameter(tensor)):
                own = module.get_submodule(f"{tensor}_weight_quantizers.{expert}")
                if own.is_enabled:
                    for block in own(weight).detach().view(-1, 32)[:64]:
                        assert len(block.unique()) <= 2**own.num_bits
                width = own.num_bits if own.is_enabled else 16
                bits |= {f"{name}.{expert}.{part}": width for part in parts}
    elif name.endswith("_proj"):
        own = [q for q in module.modules() if isinstance(q, TensorQuantizer) and q.is_enabled]
        bits[name] = min([q.num_bits for q in own], default=16)
print("\\nBITS " + json.dumps(bits))
"""
)
MLX = """
import json, sys, tempfile
from pathlib import Path
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

family, path = sys.argv[1:3]
entry = json.load(open(path))
config = dict(model_type=family, vocab_size=256, hidden_size=64, num_hidden_layers=2,
              num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
              num_experts=12, num_local_experts=12, num_experts_per_tok=2, rms_norm_eps=1e-5,
              norm_topk_prob=False, rope_theta=1e4, tie_word_embeddings=False)
mx.random.seed(0)
kind, arguments = _get_classes(config)
own = entry["quantization"]
model, _ = quantize_model(kind(arguments.from_dict(config)), config, own["group_size"],
                          own["bits"], quant_predicate=lambda name, module: own.get(name, False))
out = Path(tempfile.mkdtemp())
save_model(out, model)
save_config(config | entry, out / "config.json")
loaded, _ = load_model(out)
assert mx.isfinite(loaded(mx.array([[1, 2, 3]]))).all()
bits = {}
for name, module in loaded.named_modules():
    head, _, leaf = name.rpartition(".")
    if leaf.endswith("_proj"):
        weight = module.weight
        width = weight.shape[-1] * 32 // 64 if weight.dtype == mx.uint32 else 16
        block, switched, _ = head.partition(".switch_mlp")
        experts = [f"{block}.experts.{e}." for e in range(12)] if switched else [head + "."]
        bits |= {before + leaf: width for before in experts}
print("\\nBITS " + json.dumps(bits))
"""


def run(variable, script, tool, family, menu, tmp_path, pairs=None):
    """Return module → bits as the tool stored it, and the map's; of mixed widths by default."""
    interpreter = os.environ.get(variable)
    if not interpreter:
        pytest.skip(f"{variable} names no interpreter that has {tool}")
    bitmap = bitmap_of(
        spec_of(family, MLP),
        menu,
        architecture=ARCHITECTURES[family],
        pairs=np.random.default_rng(1).integers(0, len(menu), (24, 2)) if pairs is None else pairs,
    )
    config = tmp_path / "config.json"
    config.write_text(EXPORTERS[tool].text(Plan.of(bitmap)))
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [interpreter, "-c", script, family, str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=clean | {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("BITS "))
    return json.loads(line.removeprefix("BITS ")), widths_of(bitmap)


def as_modules(found, family):
    """Return names as of modules: Mixtral's are saved under their block's name on disk."""
    parent = "block_sparse_moe" if family == "mixtral" else "mlp"
    leaves = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {
        f"{head.replace(f'.{parent}.', '.mlp.')}.{leaves.get(leaf, leaf)}": bits
        for head, _, leaf in (name.rpartition(".") for name in found)
        for bits in [found[f"{head}.{leaf}"]]
    }


def compare(found, wanted, family):
    found = as_modules(found, family)
    assert {name: found.get(name) for name in wanted} == wanted
    others = found.keys() - wanted.keys()
    assert any("self_attn" in name for name in others)
    assert {found[name] for name in others} == {16}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_auto_round_stores_the_map_s_widths(family, tmp_path):
    menu = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
    variable = "DMPQ_AUTOROUND_PYTHON"
    compare(*run(variable, AUTO_ROUND, "auto-round", family, menu, tmp_path), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_llm_compressor_stores_the_map_s_widths(family, tmp_path):
    menu = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
    variable = "DMPQ_LLMCOMPRESSOR_PYTHON"
    compare(*run(variable, LLM_COMPRESSOR, "compressed-tensors", family, menu, tmp_path), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_gptqmodel_stores_the_map_s_widths(family, tmp_path):
    menu = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
    variable = "DMPQ_GPTQMODEL_PYTHON"
    compare(*run(variable, GPTQMODEL, "gptqmodel", family, menu, tmp_path), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("widths", [(0, 3), (2, 4)])
def test_modelopt_uses_the_map_s_widths(family, widths, tmp_path):
    menu = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
    pairs = np.repeat(widths, 12)[:, None].repeat(2, 1)  # one format a layer
    variable = "DMPQ_MODELOPT_PYTHON"
    compare(*run(variable, MODELOPT, "modelopt", family, menu, tmp_path, pairs), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("widths", [((0, 3), (2, 4)), ((4, 1), (0, 0))])
def test_mlx_stores_the_map_s_widths(family, widths, tmp_path):
    menu = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
    pairs = np.repeat(widths, 12, axis=0)  # one format a layer's gate and up, one its down
    compare(*run("DMPQ_MLX_PYTHON", MLX, "mlx", family, menu, tmp_path, pairs), family)
