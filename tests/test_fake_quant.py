"""Experts that run quantized and learn through it."""

import numpy as np
import pytest
import torch
from conftest import build

from dmpq.bank import Bank
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.moe import MoEModel
from dmpq.training.fake_quant import FakeQuantizedModel, TrainedExperts, own_weights

KEYS = "0,2,3g16,4,8,16"
FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def random_map(moe, menu, seed=0, *, apart=False):
    """Return formats (N, 2) that hold every format of the menu."""
    rng = np.random.default_rng(seed)
    experts = moe.spec.num_experts
    both = np.resize(np.arange(len(menu)), experts)
    rng.shuffle(both)
    pairs = np.stack([both, both], 1)
    if apart:
        whole = ~menu.pruned[both]
        pairs[whole, 1] = rng.choice(menu.stored, whole.sum())
    return pairs


def bank_logits(moe, menu, formats, ids):
    bank = Bank(moe, menu)
    with torch.no_grad(), bank.attached():
        bank.choose(formats[None])
        return moe.logits(ids)


@pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_as_the_bank_does_to_the_bit(family, quantizer, token_ids):
    moe = MoEModel(build(family), name="tiny")
    menu = Menu.parse(KEYS, quantizer=quantizer)
    learner = FakeQuantizedModel(moe, menu)
    for apart in (False, True):
        formats = random_map(moe, menu, apart=apart)
        learner.choose(formats)
        with torch.no_grad(), moe.experts_forward(learner.forwards):
            found = moe.logits(token_ids)
        assert torch.equal(found, bank_logits(moe, menu, formats, token_ids))


def test_a_gradient_recorded_changes_nothing(token_ids):
    moe = MoEModel(build("olmoe"), name="tiny")
    menu = Menu.parse(KEYS)
    learner = FakeQuantizedModel(moe, menu)
    learner.choose(random_map(moe, menu))
    moe.model.requires_grad_(True)
    with moe.experts_forward(learner.forwards):
        logits = moe.logits(token_ids)
        with torch.no_grad():
            assert torch.equal(moe.logits(token_ids), logits)


def test_gradients_are_those_of_the_quantized_weights(token_ids):
    """The oracle: a model that has the quantized weights, whose gradients go to the weights."""
    moe, oracle = (MoEModel(build("olmoe"), name="tiny") for _ in range(2))
    menu = Menu.parse("2,4,16")
    learner = FakeQuantizedModel(moe, menu)
    learner.choose(random_map(moe, menu))
    with torch.no_grad():
        for layer, experts in zip(learner.layers, oracle.containers, strict=True):
            for mine, other in zip(layer.weights(), experts.parameters, strict=True):
                other.copy_(mine)
    for one, forwards in (
        (moe, learner.forwards),
        (oracle, [TrainedExperts(experts) for experts in oracle.containers]),
    ):
        one.model.requires_grad_(True)
        with one.experts_forward(forwards):
            one.logits(token_ids).square().mean().backward()
    pairs = zip(moe.model.named_parameters(), oracle.model.parameters(), strict=True)
    for (name, mine), other in pairs:
        assert torch.equal(mine.grad, other.grad), name
        assert mine.grad.abs().sum() > 0, name


def test_kept_ranges_round_the_weights_of_now():
    moe = MoEModel(build("olmoe"), name="tiny")
    menu = Menu.parse("2", quantizer="rtn")
    learner = FakeQuantizedModel(moe, menu, refresh=2)
    learner.choose(np.zeros((moe.spec.num_experts, 2), int))
    layer = learner.layers[0]
    moe.model.requires_grad_(True)

    def seen():
        return layer.weights()[0].detach().clone()

    learner.begin(0)
    first = seen()
    own = own_weights(layer.experts)[0]
    with torch.no_grad():
        own.mul_(2)
    learner.begin(1)
    kept = seen()
    assert kept.abs().max() <= first.abs().max() + 1e-6  # the old ranges hold, and clip
    assert not torch.equal(kept, first)  # but codes are those of the new weights
    learner.begin(2)
    assert torch.allclose(seen(), 2 * first, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_ranges_begin_with_the_quantizer_s(quantizer, symmetric, token_ids):
    moe = MoEModel(build("olmoe"), name="tiny")
    menu = Menu.parse("2,4,16", quantizer=quantizer, symmetric=symmetric)
    formats = random_map(moe, menu)
    wanted = bank_logits(moe, menu, formats, token_ids)
    learner = FakeQuantizedModel(moe, menu, ranges="learned")
    learner.choose(formats)
    for layer in learner.layers:
        layer.learn_ranges()
    with torch.no_grad(), moe.experts_forward(learner.forwards):
        found = moe.logits(token_ids)
    # Scales are divided by in another order, so that a weight between two codes may take either.
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    for layer in learner.layers:
        layer.drop_ranges()
    assert not any("learned" in name for name, _ in moe.model.named_parameters())


def test_learned_ranges_have_lsq_s_gradient():
    """LSQ, equation 3: round(v/s) - v/s within the range, the end of the range outside."""
    moe = MoEModel(build("olmoe"), name="tiny")
    menu = Menu.parse("2g16", symmetric=True)
    learner = FakeQuantizedModel(moe, menu, ranges="learned")
    learner.choose(np.zeros((moe.spec.num_experts, 2), int))
    layer = learner.layers[0]
    layer.learn_ranges()
    scale = layer.experts.module.get_parameter("learned_ranges.0_2g16_scale")
    layer.weights()[0].sum().backward()
    own = own_weights(layer.experts)[0].detach()
    steps = scale.detach().half().float()[..., None]
    ratio = own.unflatten(-1, (-1, 16)) / steps
    inside = ((ratio + 2) >= 0) & ((ratio + 2) <= 3)
    slope = torch.where(inside, (ratio + 2).round() - 2 - ratio, (ratio + 2).clamp(0, 3) - 2)
    wanted = slope.sum(-1) / (16 * 3) ** 0.5
    assert torch.allclose(scale.grad, wanted, atol=1e-4)


def test_what_is_stored_is_what_ran(token_ids):
    moe = MoEModel(build("olmoe"), name="tiny")
    menu = Menu.parse("2,4,16")
    for ranges in ("recomputed", "learned"):
        learner = FakeQuantizedModel(moe, menu, ranges=ranges)
        learner.choose(random_map(moe, menu))
        layer = learner.layers[1]
        if ranges == "learned":
            layer.learn_ranges()
            with torch.no_grad():
                for parameter in layer.experts.module.get_submodule("learned_ranges").values():
                    parameter.mul_(1.1)
        with torch.no_grad():
            sides = layer.weights()
        for expert in range(8):
            for side, stored in enumerate(layer.quantized(expert)):
                ran = sides[side][expert]
                if stored is None:
                    assert torch.equal(ran, own_weights(layer.experts)[side][expert])
                else:
                    assert torch.allclose(stored.dequantize(), ran, rtol=0, atol=1e-7)
        layer.drop_ranges()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_experts(dtype, token_ids, monkeypatch):
    """transformers casts inputs to the weights' type, so that FP32 experts would stay in FP32."""
    seen = []
    from dmpq.training import fake_quant

    def noting(view, hidden, *rest):
        seen.append((view.down_proj.dtype, hidden.dtype))
        return run(view, hidden, *rest)

    run = fake_quant.run_stacked
    monkeypatch.setattr(fake_quant, "run_stacked", noting)
    moe = MoEModel(build("olmoe"), name="tiny")
    learner = FakeQuantizedModel(moe, Menu.parse("4"))
    for forwards in (learner.forwards, [TrainedExperts(one) for one in moe.containers]):
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=dtype),
            moe.experts_forward(forwards),
        ):
            moe.logits(token_ids)
    assert set(seen) == {(dtype, dtype)}
    assert len(seen) == 4


def test_a_quantizer_that_is_calibrated_is_refused():
    moe = MoEModel(build("olmoe"), name="tiny")
    for quantizer in ("gptq", "hqq+lr8"):
        with pytest.raises(InputError, match="search a map with --quantizer hqq or rtn"):
            FakeQuantizedModel(moe, Menu.parse("2", quantizer=quantizer))


def test_a_family_with_an_adapter_is_refused():
    from families import build_tiny

    moe = MoEModel(build_tiny("dbrx"), name="tiny-dbrx")
    with pytest.raises(InputError, match="runs through an adapter"):
        FakeQuantizedModel(moe, Menu.parse("2"))
