"""The menu's quantizer, applied to matrices or to an expert.

Scale searches are torchao's; codes are then rounded against the scales and zero-points as they
are stored (float16), so that what is evaluated is what a checkpoint would hold.
"""

from __future__ import annotations

import torch

from dmpq.errors import InputError
from dmpq.formats import Format, Menu, compensator_format
from dmpq.quantization.gptq import gptq
from dmpq.quantization.milo import compensated
from dmpq.quantization.ranges import hqq_range, round_to_codes, rtn_range, stored_range
from dmpq.quantization.tensor import QuantizedTensor, stacked

Pair = tuple[torch.Tensor, torch.Tensor]


def quantize(
    weight: torch.Tensor, fmt: Format, menu: Menu, *, factor: torch.Tensor | None = None
) -> QuantizedTensor:
    """Quantize matrices with the menu's quantizer.

    Args:
        weight: (..., out, in), floating point; each matrix is quantized on its own.
        fmt: Width and group size; the group is never wider than ``in``.
        menu: Says which quantizer, and whether codes are symmetric around zero.
        factor: float64 (in, in), of :func:`~dmpq.quantization.gptq.inverse_factor`: what the one
            matrix (out, in) is calibrated by. GPTQ needs it, and no other quantizer reads it.

    Returns:
        The quantized tensor, with the leading dimensions of ``weight``.

    Raises:
        InputError: If the group size does not divide ``in``, if a compensator's rank is above
            that of a matrix, or if GPTQ is not calibrated.
    """
    method = menu.method
    if method.calibrated:
        if factor is None:
            raise InputError(
                f"The quantizer {menu.quantizer!r} needs calibration text, and has none; give "
                "the bank its windows, or use rtn or hqq."
            )
        return gptq(weight, factor, fmt, symmetric=menu.symmetric)
    if method.rank and weight.ndim > 2:
        return stacked([quantize(one, fmt, menu) for one in weight])
    if method.rank:
        return compensated(
            weight.detach().float(),
            method.rank,
            lambda matrix: _in_groups(matrix, fmt, menu),
            lambda rows: _in_groups(rows, compensator_format(rows.shape[1]), menu),
        )
    return _in_groups(weight, fmt, menu)


def quantize_expert(
    weights: Pair,
    formats: tuple[Format, Format],
    menu: Menu,
    *,
    factors: Pair | None = None,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Quantize one expert: what a bank holds of it, to the bit, and what a checkpoint stores.

    Args:
        weights: Gate and up (or up alone), (out, in), and down, (out, in).
        formats: Of gate and up, and of down; quantized ones.
        menu: Says which quantizer, and whether codes are symmetric around zero.
        factors: What calibrates the two, of :meth:`dmpq.calibration.Calibration.factors`; for
            GPTQ alone.

    Returns:
        Both projections.

    Raises:
        InputError: As :func:`quantize`.
    """
    up, down = factors or (None, None)
    return (
        quantize(weights[0], formats[0], menu, factor=up),
        quantize(weights[1], formats[1], menu, factor=down),
    )


def _in_groups(weight: torch.Tensor, fmt: Format, menu: Menu) -> QuantizedTensor:
    """Quantize (..., out, in) group by group, without calibration and compensators."""
    group = fmt.group_along(weight.shape[-1])
    matrices = weight.detach().float().reshape(-1, *weight.shape[-2:])
    search = hqq_range if menu.method.name == "hqq" else rtn_range
    found = [search(matrix, fmt.bits, group, menu.symmetric) for matrix in matrices]
    scale, zero = stored_range(
        torch.stack([s for s, _ in found]),
        torch.stack([z for _, z in found]),
        symmetric=menu.symmetric,
    )
    codes = round_to_codes(matrices, scale, zero, fmt.bits)
    lead = weight.shape[:-2]
    return QuantizedTensor(
        codes.unflatten(0, lead) if lead else codes[0],
        scale.unflatten(0, lead) if lead else scale[0],
        zero if zero is None else zero.unflatten(0, lead) if lead else zero[0],
        fmt,
    )
