"""GPTQ: against its textbook twin, against RTN, and what happens without inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.quantization import gptq, inverse_factor, quantize
from dmpq.quantization.ranges import round_to_codes, rtn_range, stored_range


def correlated(*, seed, columns=64, tokens=256, rows=24):
    """Return weights (rows, columns) and inputs (tokens, columns) of decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= torch.arange(1, columns + 1) ** -0.5
    return weight, torch.randn(tokens, columns, generator=generator) @ mixing.mT


def textbook(weight, hessian, fmt, *, symmetric, damping=0.01):
    """Optimal brain quantization in column order, the inverse updated explicitly (section 3.1)."""
    h = hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    left, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    group = fmt.group_along(weight.shape[1])
    for column in range(weight.shape[1]):
        if column % group == 0:
            window = left[:, column : column + group].float()
            scale, zero = stored_range(
                *rtn_range(window, fmt.bits, group, symmetric), symmetric=symmetric
            )
        code = round_to_codes(left[:, column : column + 1].float(), scale, zero, fmt.bits)
        shift = 2 ** (fmt.bits - 1) if zero is None else zero.double()
        back = ((code.double() - shift) * scale.double())[:, 0]
        error = (left[:, column] - back) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        result[:, column] = back
        row = inverse[column].clone()
        inverse -= row[:, None] * row / row[column]
        inverse[column, :] = inverse[:, column] = 0
        left[:, : column + 1] = 0  # done with: never read again
    return result


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("key", ["2g16", "3g32", "4", "8g16"])
def test_it_is_optimal_brain_quantization_in_column_order(key, symmetric):
    fmt = Format.parse(key)
    for seed in range(3):
        weight, inputs = correlated(seed=seed)
        hessian = inputs.mT.double() @ inputs.double()
        quick = gptq(weight, inverse_factor(hessian), fmt, symmetric=symmetric).dequantize()
        slow = textbook(weight, hessian, fmt, symmetric=symmetric)
        assert (quick - slow).abs().max() < 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("key", ["2g32", "3", "4g16", "8"])
def test_without_correlation_it_is_rtn(key, symmetric):
    weight, _ = correlated(seed=0, columns=128)
    fmt, menu = Format.parse(key), Menu.parse(key, quantizer="rtn", symmetric=symmetric)
    expected = quantize(weight, fmt, menu)
    for hessian in (3.0 * torch.eye(128), torch.zeros(128, 128)):
        found = gptq(weight, inverse_factor(hessian), fmt, symmetric=symmetric)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert (found.zero is None) == symmetric
        assert symmetric or torch.equal(found.zero, expected.zero)


@settings(deadline=None, max_examples=30)
@given(
    key=st.sampled_from(["2g16", "2g64", "3g32", "4g16", "8g64"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_outputs_are_never_worse_than_those_of_rtn(key, symmetric, seed):
    weight, inputs = correlated(seed=seed)
    fmt, menu = Format.parse(key), Menu.parse(key, quantizer="rtn", symmetric=symmetric)

    def error(restored):
        return float(((weight - restored.dequantize()) @ inputs.mT).norm())

    found = gptq(weight, inverse_factor(inputs.mT @ inputs), fmt, symmetric=symmetric)
    assert error(found) <= error(quantize(weight, fmt, menu)) * (1 + 1e-6)


def test_zero_points_are_integers_that_fit_their_bits():
    weight, inputs = correlated(seed=1)
    zero = gptq(weight, inverse_factor(inputs.mT @ inputs), Format(3, 16), symmetric=False).zero
    assert torch.equal(zero, zero.round())
    assert 0 <= zero.min() <= zero.max() <= 7


def test_an_input_that_is_never_seen_changes_nothing_else():
    weight, inputs = correlated(seed=2)
    inputs[:, 5] = 0
    found = gptq(weight, inverse_factor(inputs.mT @ inputs), Format(4, 64), symmetric=False)
    assert torch.isfinite(found.dequantize()).all()
    step = found.scale.float()
    assert ((found.dequantize() - weight)[:, 5:6].abs() <= 1.5 * step).all()


def test_the_factor_is_of_the_damped_inverse():
    _, inputs = correlated(seed=3)
    hessian = inputs.mT.double() @ inputs.double()
    factor = inverse_factor(hessian, damping=0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor @ damped, torch.eye(64, dtype=torch.float64))


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(torch.full((4, 4), float("nan")))


def test_without_calibration_it_is_refused():
    with pytest.raises(InputError, match="'gptq' needs calibration text"):
        quantize(torch.ones(4, 16), Format(4, 16), Menu.parse("4", quantizer="gptq"))
