import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmpq.formats import Format, Menu
from dmpq.quantization import pack_codes, quantize, unpack_codes


@given(bits=st.integers(1, 8), groups=st.integers(1, 6), seed=st.integers(0, 999))
def test_packing_is_the_stream_of_bits_lowest_first_without_a_gap(bits, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, 8 * groups), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    oracle = np.packbits(stream.reshape(2, 3, -1), axis=-1, bitorder="little")
    assert np.array_equal(packed.numpy(), oracle)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_packing_refuses_a_length_it_cannot_hold():
    with pytest.raises(ValueError, match="not a multiple of 8"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), 3)


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_falls_with_bits_and_rises_with_group_size(quantizer, symmetric):
    weight = torch.randn(4, 32, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    menu = Menu.parse("2,3,4,8", quantizer=quantizer, symmetric=symmetric)

    def error(fmt: Format) -> float:
        return float((quantize(weight, fmt, menu).dequantize() - weight).square().mean())

    by_width = [error(Format(b)) for b in (2, 3, 4, 8)]
    assert by_width == sorted(by_width, reverse=True)
    assert error(Format(3, 32)) < error(Format(3, 128))


def test_hqq_beats_rtn_at_two_bits():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    errors = {
        name: float(
            (quantize(weight, Format(2), Menu.parse("2", quantizer=name)).dequantize() - weight)
            .square()
            .mean()
        )
        for name in ("rtn", "hqq")
    }
    assert errors["hqq"] < errors["rtn"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_within_half_a_step_of_the_weights(symmetric):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    menu = Menu.parse("4", quantizer="rtn", symmetric=symmetric)
    quantized = quantize(weight, Format(4, 32), menu)
    step = quantized.scale.float().repeat_interleave(32, -1)
    # Symmetric codes end one short on the positive side; float16 rounds scale and zero-point.
    slack = 1.02 if symmetric else 0.52
    assert ((quantized.dequantize() - weight).abs() <= slack * step).all()


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
def test_each_matrix_is_quantized_on_its_own(quantizer):
    weight = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(2))
    menu = Menu.parse("3", quantizer=quantizer)
    together = quantize(weight, Format(3, 32), menu).dequantize()
    alone = quantize(weight[1], Format(3, 32), menu).dequantize()
    assert torch.equal(together[1], alone)


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.5])
def test_constant_groups_stay_finite(quantizer, value):
    weight = torch.full((4, 32), value)
    restored = quantize(weight, Format(2, 32), Menu.parse("2", quantizer=quantizer)).dequantize()
    assert torch.isfinite(restored).all()
