"""Tensors and types of our llama-quantize command, against the names that ``gguf`` gives them."""

import itertools
import re
import shlex

import numpy as np
import pytest
from exports import bitmap_of, spec_of

from dmpq.exporters import EXPORTERS
from dmpq.exporters.plan import Plan
from dmpq.formats import Menu

gguf = pytest.importorskip("gguf")

MLP, SPARSE = "model.layers.{}.mlp.experts", "model.layers.{}.block_sparse_moe.experts"
# Family, containers, and its architecture in llama.cpp.
FAMILIES = [
    ("olmoe", MLP, "OLMOE"),
    ("mixtral", MLP, "LLAMA"),
    ("qwen2_moe", MLP, "QWEN2MOE"),
    ("qwen3_moe", MLP, "QWEN3MOE"),
    ("qwen3_next", MLP, "QWEN3NEXT"),
    ("deepseek_v2", MLP, "DEEPSEEK2"),
    ("deepseek_v3", MLP, "DEEPSEEK2"),
    ("glm4_moe", MLP, "GLM4_MOE"),
    ("ernie4_5_moe", MLP, "ERNIE4_5_MOE"),
    ("hunyuan_v1_moe", MLP, "HUNYUAN_MOE"),
    ("dots1", MLP, "DOTS1"),
    ("afmoe", MLP, "AFMOE"),
    ("phimoe", MLP, "PHIMOE"),
    ("minimax_m2", MLP, "MINIMAXM2"),
    ("jamba", "model.layers.{}.feed_forward.experts", "JAMBA"),
    ("lfm2_moe", "model.layers.{}.feed_forward.experts", "LFM2MOE"),
]
RENAMED = {"lfm2_moe"}
"""Families whose converter renames their matrices before it looks in its table."""
MENU = Menu.parse("2g32,3g32,4g32,8g32,16", symmetric=True)
PAIRS = np.repeat([(0, 1), (2, 4)], 12, axis=0)


def overrides(family, containers):
    """Return pattern → type of the command's options."""
    bitmap = bitmap_of(spec_of(family, containers), MENU, architecture="Unknown", pairs=PAIRS)
    words = shlex.split(EXPORTERS["llama.cpp"].text(Plan.of(bitmap)).replace("\\\n", " "))
    options = [b for a, b in itertools.pairwise(words) if a == "--tensor-type"]
    return dict(option.rsplit("=", 1) for option in options)


@pytest.mark.parametrize(("family", "containers", "architecture"), FAMILIES)
def test_each_tensor_of_experts_is_named_once_and_no_other(family, containers, architecture):
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture]]
    names = {
        gguf.TENSOR_NAMES[tensor].format(bid=layer) + ".weight"
        for tensor in known
        for layer in range(2)
    }
    found = {
        name: kind
        for pattern, kind in overrides(family, containers).items()
        for name in names
        if re.search(pattern, name)
    }
    assert found == {
        f"blk.{layer}.ffn_{part}_exps.weight": kind
        for layer, kinds in enumerate((("q2_k", "q2_k", "q3_k"), ("q4_k", "q4_k", "bf16")))
        for part, kind in zip(("gate", "up", "down"), kinds, strict=True)
    }


@pytest.mark.parametrize(
    ("family", "containers", "architecture"),
    [family for family in FAMILIES if family[0] not in RENAMED],
)
def test_names_on_disk_become_those_of_the_command(family, containers, architecture):
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
    bitmap = bitmap_of(spec_of(family, containers), MENU, architecture="Unknown", pairs=PAIRS)
    for number, layer in enumerate(Plan.of(bitmap).layers):
        for part, name in layer.names.disk[7].items():
            merged = name.replace(".7.", ".")  # as its converter joins experts
            assert table.get_name(merged) == f"blk.{number}.ffn_{part}_exps"


def test_types_are_types_of_gguf():
    kinds = set(overrides("olmoe", MLP).values()) | {"q8_0"}
    assert kinds == {"q2_k", "q3_k", "q4_k", "bf16", "q8_0"}
    assert kinds <= {kind.name.lower() for kind in gguf.GGMLQuantizationType}
