"""Calibration, the bank that GPTQ fills with it, and that a map made with it can be made again."""

import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from dmpq.bank import Bank
from dmpq.calibration import Calibration, activations, balanced_windows
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import run_stacked
from dmpq.quantization import quantize_expert
from dmpq.quantizer import Quantizer

MENU = Menu.parse("2g16,4g16,16", quantizer="gptq")


def record(moe, token_ids, text="gptq"):
    return Calibration(moe, token_ids.numpy(), Quantizer.parse(text))


def uniform(moe, fmt):
    return np.full((1, moe.spec.num_experts), fmt)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_inputs_make_the_layer_s_outputs(family, tiny, token_ids):
    moe = tiny(family)
    layer = record(moe, token_ids).layers[-1]
    experts, expert = layer.experts, 3
    one = torch.zeros(len(layer.hidden), 1, dtype=torch.int64)
    up, down = experts.gate_up[expert, None], experts.down[expert, None]
    whole = run_stacked(
        experts.stacked(up, down, only=expert), layer.hidden, one, torch.ones(one.shape)
    )
    by_hand = activations(experts, expert, layer.hidden) @ experts.down[expert].mT
    if experts.module.has_bias:
        by_hand = by_hand + experts.module.down_proj_bias[expert]
    assert torch.allclose(by_hand, whole, atol=1e-5)


@pytest.mark.parametrize("affinity", [False, True])
def test_hessians_are_sums_over_the_expert_s_own_tokens(affinity, tiny, token_ids):
    layer = record(tiny(), token_ids.repeat(4, 1)).layers[0]
    expert = int(torch.bincount(layer.index.flatten()).argmax())
    width = layer.experts.gate_up.shape[2]
    expected, share = torch.zeros(width, width, dtype=torch.float64), 0.0
    count = 0
    for token, (chosen, weights) in enumerate(zip(layer.index, layer.weights, strict=True)):
        for slot in range(len(chosen)):
            if chosen[slot] == expert:
                x = layer.hidden[token].double()
                weight = float(weights[slot]) if affinity else 1.0
                expected += weight * x[:, None] * x
                share, count = share + weight, count + 1
    assert count >= width  # so that no other token stands in
    found, _ = layer.hessians(expert, affinity=affinity)
    assert torch.allclose(found, expected * count / share)


def test_an_expert_without_tokens_is_calibrated_by_its_layer(tiny, token_ids):
    layer = record(tiny(), token_ids).layers[0]
    layer.index[layer.index == 5] = 4
    found, _ = layer.hessians(5, affinity=True)
    width, everyone = found.shape[0], layer.hidden.double()
    assert torch.allclose(found, width / len(everyone) * everyone.mT @ everyone)


def test_who_has_too_few_tokens_is_said(tiny, token_ids):
    notes = record(tiny(), token_ids[:1]).notes()
    assert "gptq is calibrated on 16 tokens" in notes[0]
    assert "16 of 16 experts have fewer calibration tokens than the 32 inputs" in notes[1]
    assert len(record(tiny(), token_ids.repeat(60, 1)).notes()) == 1


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_bank_holds_what_quantize_expert_makes(family, tiny, token_ids):
    moe = tiny(family)
    dense, packed = (
        Bank(moe, MENU, calibration=token_ids.numpy(), memory_bytes=size) for size in (math.inf, 0)
    )
    again = record(moe, token_ids.flip(0))  # the windows' order makes no difference
    for ordinal, (one, other) in enumerate(zip(dense.layers, packed.layers, strict=True)):
        own = one.experts.gate_up[2], one.experts.down[2]
        for place in range(2):
            pair = (MENU.formats[place],) * 2
            made = quantize_expert(own, pair, MENU, factors=again.factors(ordinal, 2))
            for side in (0, 1):
                expected = made[side].dequantize(own[side].dtype)
                assert torch.equal(one.variant(2, place)[side], expected)
                assert torch.equal(other.variant(2, place)[side], expected)


def test_it_beats_rtn_on_the_text_that_calibrates(tiny, token_ids):
    moe = tiny()
    text = token_ids.numpy()
    rtn = Menu.parse("2g16,4g16,16", quantizer="rtn")
    banks = Bank(moe, rtn), Bank(moe, MENU, calibration=text)
    for fmt in (0, 1):
        worse, better = (
            ModelEvaluator(bank, text, label="t").evaluate(uniform(moe, fmt)).kl[0]
            for bank in banks
        )
        assert better < worse


def test_full_precision_stays_exact(tiny, token_ids):
    moe = tiny()
    bank = Bank(moe, MENU, calibration=token_ids.numpy())
    answer = ModelEvaluator(bank, token_ids.numpy(), label="t").evaluate(uniform(moe, 2))
    assert answer.kl[0] == 0


def test_journals_do_not_mix_quantizers_or_their_calibrations(tiny, token_ids):
    text, keys = token_ids.numpy(), set()
    for name, calibration in (
        ("rtn", None),
        ("hqq+lr2", None),
        ("gptq", text),
        ("gptq", text[:4]),
        ("gptq,affinity", text),
    ):
        bank = Bank(tiny(), Menu.parse("4g16", quantizer=name), calibration=calibration)
        keys.add(ModelEvaluator(bank, text, label="t").text_key)
    assert len(keys) == 5


def test_balanced_windows_use_experts_more_evenly_than_any_few_others(tiny, token_ids):
    everything = record(tiny(), token_ids).layers
    chosen = balanced_windows(everything, 12, 3)

    def spread(windows):
        total = 0.0
        for layer in everything:
            index = layer.index.reshape(12, -1)[torch.from_numpy(windows)]
            counts = torch.bincount(index.flatten(), minlength=8).double()
            total += float((counts / counts.sum()).std(correction=0))
        return total

    rng = np.random.default_rng(0)
    others = [spread(rng.permutation(12)[:3]) for _ in range(20)]
    assert spread(chosen) < np.mean(others)
    assert record(tiny(), token_ids, "gptq,tokens=48,balanced").tokens == 48


def test_fewer_tokens_are_whole_windows(tiny, token_ids):
    assert record(tiny(), token_ids, "gptq,tokens=17").tokens == 32


@pytest.mark.parametrize(
    ("quantizer", "windows", "message"),
    [
        ("gptq", None, "'gptq' needs calibration text, and has none"),
        ("gptq,tokens=193", 12, "asks for more tokens than the calibration text has .192."),
        ("hqq", 12, "'hqq' is not calibrated, and calibration text is given"),
    ],
)
def test_text_that_does_not_suit_is_refused(quantizer, windows, message, tiny, token_ids):
    calibration = None if windows is None else token_ids.numpy()[:windows]
    with pytest.raises(InputError, match=message):
        Bank(tiny(), Menu.parse("4g16", quantizer=quantizer), calibration=calibration)
