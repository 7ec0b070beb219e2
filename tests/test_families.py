"""Tiny models of every family against plain torch: weights written into the model by hand."""

import functools

import numpy as np
import pytest
import torch
from families import FAMILIES, TRANSPOSED, build_tiny

from dmpq.bank import Bank
from dmpq.experts import run_stacked
from dmpq.formats import Menu
from dmpq.moe import MoEModel
from dmpq.quantization import quantize
from dmpq.spec import ModelSpec

MENU = Menu.parse("2g8,3g8,4g8,8g8,16")
FULL = len(MENU) - 1


@functools.cache
def tiny(family):
    return MoEModel(build_tiny(family), name=f"tiny-{family}")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def own_logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def bank_logits(moe, bank, formats, ids):
    bank.choose(formats[None])
    with torch.inference_mode(), bank.attached():
        return moe.logits(ids)


def selected(moe, ids):
    """Return the experts that tokens select, (T, K) of each layer."""
    seen = []

    def noting(module, hidden, index, weights):
        seen.append(index)
        return run_stacked(module, hidden, index, weights)

    with torch.inference_mode(), moe.experts_forward([noting] * len(moe.containers)):
        moe.logits(ids)
    return seen


def reached_experts(moe, ids):
    """Return which experts some token selects, those of all layers on end."""
    found = zip(moe.containers, selected(moe, ids), strict=True)
    hits = [np.bincount(index.flatten(), minlength=c.num_experts) > 0 for c, index in found]
    assert all(layer.any() for layer in hits)
    return np.concatenate(hits)


def own_matrices(moe, family):
    """Yield the two matrices of every expert, (out, in), as views of the model's parameters."""
    for container in moe.containers:
        module = dict(moe.model.named_modules())[container.path]
        parameters = dict(module.named_parameters())
        up = parameters["gate_up_proj" if "gate_up_proj" in parameters else "up_proj"]
        for pair in zip(up.data, parameters["down_proj"].data, strict=True):
            yield [weight.mT if family in TRANSPOSED else weight for weight in pair]


def quantized(weight, fmt):
    whole = quantize(weight[None].clone(), MENU.formats[fmt], MENU)
    return whole.dequantize(weight.dtype)[0]


def by_hand(moe, family, expert, fmt, ids):
    """Return the model's own logits with one expert's weights quantized in its parameters."""
    pair = list(own_matrices(moe, family))[expert]
    kept = [weight.clone() for weight in pair]
    for weight in pair:
        weight.copy_(quantized(weight, fmt))
    try:
        return own_logits(moe.model, ids)
    finally:
        for weight, before in zip(pair, kept, strict=True):
            weight.copy_(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_is_the_model_s_own_forward_to_the_bit(family, ids):
    expected = own_logits(build_tiny(family), ids)
    moe = tiny(family)
    assert torch.isfinite(expected).all()
    assert torch.equal(moe.logits(ids), expected)
    full = np.full((moe.spec.num_experts, 2), FULL)
    assert torch.equal(bank_logits(moe, Bank(moe, MENU), full, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_width_changes_the_one_expert_meant(family, ids):
    moe = tiny(family)
    bank = Bank(moe, MENU)
    own = own_logits(moe.model, ids)
    reached = reached_experts(moe, ids)
    widths = [(e, e % FULL) for e in range(len(reached))]
    first = int(np.flatnonzero(reached)[0])
    widths += [(first, fmt) for fmt in range(FULL) if fmt != first % FULL]
    for expert, fmt in widths:
        formats = np.full((len(reached), 2), FULL)
        formats[expert] = fmt
        got = bank_logits(moe, bank, formats, ids)
        # fp32 sums of the same products; equal rows meet equal weights
        assert torch.allclose(got, by_hand(moe, family, expert, fmt, ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(got, own) == (not reached[expert])


def shared_parameters(moe, path):
    """Count the weights of what all tokens use beside the experts: matrices, no gates or norms."""
    names = ("shared_experts", "shared_expert", "shared_mlp")
    layer, _, block = path.rpartition(".")[0].rpartition(".")
    inside = dict(moe.model.get_submodule(layer).named_children())
    inside |= dict(inside[block].named_children())
    if block.isdigit():  # the experts stand in the layer itself, beside a dense block
        inside = dict(moe.model.get_submodule(f"{layer}.{block}").named_children())
        names = ("mlp",)
    shared = [m for name, m in inside.items() if name in names]
    return sum(p.numel() for m in shared for p in m.parameters() if p.ndim > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_geometry_counts_what_the_model_has(family, ids):
    moe = tiny(family)
    matrices = [weight for pair in own_matrices(moe, family) for weight in pair]
    spec = moe.spec
    assert spec.num_experts == len(matrices) // 2
    assert spec.expert_parameters == sum(weight.numel() for weight in matrices)
    for layer, top_k in zip(spec.moe_layers, selected(moe, ids), strict=True):
        assert layer.top_k == top_k.shape[1]
        shared = (3 if layer.gated else 2) * spec.hidden_size * layer.shared_intermediate_size
        assert shared == shared_parameters(moe, layer.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_alone_tells_the_geometry(family):
    moe = tiny(family)
    config = moe.model.config.to_dict()
    paths = [layer.path for layer in moe.spec.moe_layers]
    assert ModelSpec.from_config(config, name=moe.name, paths=paths) == moe.spec
