"""GPTQ: round column by column, and let the columns to come make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, Algorithm 1 with section 3.3's lazy blocks and Cholesky form. The
error is compensated at every width (MC-MoE's code, arXiv 2410.06270, does so above 3 bits only).
A group's scale and zero-point are RTN's for the weights as they stand when the group is reached
(section 4, "grouping"), all errors before them made up for. Columns go in their own order, so that
groups stay contiguous, as every packed format has them.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from dmpq.errors import InputError
from dmpq.formats import Format
from dmpq.quantization.ranges import rtn_range, stored_range
from dmpq.quantization.tensor import QuantizedTensor
from dmpq.quantizer import DEFAULT_DAMPING

_BLOCK: Final = 128
"""Columns whose errors are made up for among themselves before the rest is brought up to date."""


def gptq(
    weight: torch.Tensor, factor: torch.Tensor, fmt: Format, *, symmetric: bool
) -> QuantizedTensor:
    """Quantize one matrix so that its outputs change little on the inputs it is calibrated for.

    Args:
        weight: (out, in), floating point.
        factor: float64 (in, in), of :func:`inverse_factor`.
        fmt: Width and group size; the group is never wider than ``in``.
        symmetric: Whether codes are symmetric around zero.

    Returns:
        The quantized matrix; zero-points are integers.

    Raises:
        InputError: If the group size does not divide ``in``.
    """
    columns = weight.shape[1]
    group = fmt.group_along(columns)
    block = math.gcd(group, _BLOCK)
    left = weight.detach().float().mT.clone(memory_format=torch.contiguous_format)
    upper = factor.to(left.device, torch.float32)
    codes, ranges = torch.empty_like(left), []
    for start in range(0, columns, block):
        stop = start + block
        if start % group == 0:
            window = left[start : start + group].mT
            ranges.append(
                stored_range(*rtn_range(window, fmt.bits, group, symmetric), symmetric=symmetric)
            )
            scale, zero = ranges[-1][0].float()[:, 0], _zero_of(ranges[-1][1], fmt.bits)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            rounded = (left[column] / scale + zero).round_().clamp_(0, 2**fmt.bits - 1)
            error = (left[column] - (rounded - zero) * scale) / upper[column, column]
            left[column + 1 : stop] -= upper[column, column + 1 : stop, None] * error
            codes[column], errors[column - start] = rounded, error
        left[stop:] -= upper[start:stop, stop:].mT @ errors
    zeros = [z for _, z in ranges if z is not None]
    return QuantizedTensor(
        codes.mT.to(torch.uint8).contiguous(),
        torch.cat([s for s, _ in ranges], 1),
        torch.cat(zeros, 1) if zeros else None,
        fmt,
    )


def _zero_of(zero: torch.Tensor | None, bits: int) -> torch.Tensor | float:
    """Return the zero-point of one group, (out,), or the middle code where codes are symmetric."""
    return float(2 ** (bits - 1)) if zero is None else zero.float()[:, 0]


def inverse_factor(hessian: torch.Tensor, *, damping: float = DEFAULT_DAMPING) -> torch.Tensor:
    """Return the upper Cholesky factor U of the inverse Hessian, which is ``U.T @ U``.

    Args:
        hessian: (in, in), the sum of ``x x^T`` over inputs, up to a factor.
        damping: Share of its mean diagonal that is added to the diagonal first.

    Returns:
        float64 (in, in). Without any input, of a matrix of zeros: the identity, by which GPTQ is
        RTN.

    Raises:
        InputError: If the Hessian is not finite.
    """
    h = hessian.double()
    if not torch.isfinite(h).all():
        raise InputError(
            "GPTQ's Hessian holds values that are not finite: the model overflows on the "
            "calibration text; give other text, or use the quantizer hqq."
        )
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    mean = h.diagonal().mean()
    if mean <= 0:
        return eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + damping * mean * eye))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
