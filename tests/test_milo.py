"""Low-rank compensators: their residual, their bits, and that a bank holds what they restore."""

import math

import numpy as np
import pytest
import torch
from factories import make_spec

from dmpq.bank import Bank
from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.quantization import pack_codes, quantize

WEIGHT = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.02


def residual(quantizer, fmt):
    menu = Menu.parse(fmt.key, quantizer=quantizer)
    return float((quantize(WEIGHT, fmt, menu).dequantize() - WEIGHT).norm())


@pytest.mark.parametrize("base", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_residual_falls_with_the_rank(base, bits):
    fmt = Format(bits, 32)
    errors = [residual(name, fmt) for name in (base, *(f"{base}+lr{r}" for r in (2, 8, 24)))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("quantizer", ["rtn+lr3", "hqq+lr8"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_its_bits_are_those_that_are_stored(quantizer, symmetric):
    fmt = Format(3, 32)
    menu = Menu.parse("3g32", quantizer=quantizer, symmetric=symmetric)

    def stored(tensor):
        zero_bits = 16 if menu.method.name == "hqq" else tensor.format.bits
        zeros = 0 if tensor.zero is None else tensor.zero.numel() * zero_bits
        packed = pack_codes(tensor.codes, tensor.format.bits).numel() * 8
        return packed + tensor.scale.numel() * 16 + zeros

    found = quantize(WEIGHT[0], fmt, menu)
    assert [f.codes.shape for f in found.compensator] == [
        (menu.method.rank, 48),
        (menu.method.rank, 64),
    ]
    total = stored(found) + sum(map(stored, found.compensator))
    assert menu.stored_bits((48, 64)).tolist() == [total]
    effective = menu.effective_bits(64, out_features=48)[0]
    assert effective == pytest.approx(total / WEIGHT[0].numel())


def test_sixteen_bits_and_pruned_experts_carry_none():
    menu = Menu.parse("0,2,16", quantizer="hqq+lr8")
    none = Menu.parse("0,2,16")
    difference = menu.stored_bits((64, 128)) - none.stored_bits((64, 128))
    rows = 8 * (64 * 3 + 32) + 8 * (128 * 3 + 2 * 32)
    assert difference.tolist() == [0, rows, 0]


def test_weights_that_overflow_the_scales_are_refused():
    with pytest.raises(InputError, match=r"Weights of up to 1e\+08 overflow the scales"):
        quantize(1e8 * torch.eye(8), Format(4), Menu.parse("4", quantizer="hqq+lr2"))


def test_a_rank_above_the_matrix_s_is_refused():
    menu = Menu.parse("2", quantizer="hqq+lr49")
    with pytest.raises(InputError, match="rank 49 does not suit a matrix of 48 by 64"):
        menu.stored_bits((48, 64))
    with pytest.raises(InputError, match="at most 48"):
        quantize(WEIGHT[0], Format(2), menu)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_packed_and_dense_banks_hold_the_same_weights(family, tiny, token_ids):
    menu = Menu.parse("2g16,3g16,16", quantizer="hqq+lr2")
    dense, packed = (Bank(tiny(family), menu, memory_bytes=size) for size in (math.inf, 0))
    for one, other in zip(dense.layers, packed.layers, strict=True):
        for fmt in range(2):
            pairs = zip(one.variant(3, fmt), other.variant(3, fmt), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_each_matrix_is_compensated_on_its_own():
    menu = Menu.parse("3g32", quantizer="hqq+lr4")
    together = quantize(WEIGHT, Format(3, 32), menu)
    alone = quantize(WEIGHT[1], Format(3, 32), menu)
    assert torch.equal(together.dequantize()[1], alone.dequantize())
    assert torch.equal(together[1].dequantize(), alone.dequantize())


def test_widths_rank_by_cost_with_their_compensators():
    bits = Menu.parse("2,3,4,8,16", quantizer="rtn+lr8").stored_bits((256, 128))
    assert (np.diff(bits) > 0).all()


@pytest.mark.parametrize("hardware", ["a100", "cpu"])
def test_predicted_memory_counts_the_factors(hardware):
    spec = make_spec()
    menus = [Menu.parse("4,8,16", quantizer=name) for name in ("hqq", "hqq+lr4")]
    maps = np.random.default_rng(0).integers(0, 3, (5, spec.num_experts))
    model = load_hardware(hardware)
    plain, more = (model.cost(spec, menu, maps, Workload()).memory_bytes for menu in menus)
    stored = [model.stored_bits(spec, menu).sum(1) for menu in menus]
    extra = np.take_along_axis(stored[1] - stored[0], maps.T, axis=1).sum(0) / 8
    assert (extra > 0).all()
    assert np.allclose(more - plain, extra)
