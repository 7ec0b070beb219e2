"""Round to nearest, and half-quadratic quantization (HQQ).

The scale search is torchao's; codes are then rounded against the scales and zero-points as they
are stored (float16), so that what is evaluated is what a checkpoint would hold.
"""

from __future__ import annotations

import torch
from torchao.quantization import MappingType, choose_qparams_affine
from torchao.quantization.quant_primitives import (
    _choose_qparams_and_quantize_affine_hqq,
    _choose_qparams_and_quantize_scale_only_hqq,
)

from dmpq.formats import Format, Menu
from dmpq.quantization.tensor import QuantizedTensor

_SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16: a group of equal weights must not divide by zero."""


def quantize(weight: torch.Tensor, fmt: Format, menu: Menu) -> QuantizedTensor:
    """Quantize matrices with the menu's quantizer.

    Args:
        weight: (..., out, in), floating point; each matrix is quantized on its own.
        fmt: Width and group size; the group is never wider than ``in``.
        menu: Says which quantizer, and whether codes are symmetric around zero.

    Returns:
        The quantized tensor, with the leading dimensions of ``weight``.

    Raises:
        InputError: If the group size does not divide ``in``.
    """
    group = fmt.group_along(weight.shape[-1])
    matrices = weight.detach().float().reshape(-1, *weight.shape[-2:])
    search = {"rtn": _rtn_range, "hqq": _hqq_range}[menu.quantizer]
    found = [search(matrix, fmt.bits, group, menu.symmetric) for matrix in matrices]
    lead = weight.shape[:-2]
    scale = torch.stack([s for s, _ in found]).clamp_min(_SMALLEST_SCALE).half()
    zero = None if menu.symmetric else torch.stack([z for _, z in found]).half()
    codes = _round(matrices, scale, zero, fmt.bits)
    return QuantizedTensor(
        codes.unflatten(0, lead) if lead else codes[0],
        scale.unflatten(0, lead) if lead else scale[0],
        zero if zero is None else zero.unflatten(0, lead) if lead else zero[0],
        fmt,
    )


def _round(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    grouped = weight.unflatten(-1, (scale.shape[-1], -1)) / scale.float()[..., None]
    shift = 2 ** (bits - 1) if zero is None else zero.float()[..., None]
    codes: torch.Tensor = (grouped + shift).round().clamp(0, 2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def _rtn_range(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map each group's range onto the codes: the textbook min-max rule."""
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        block_size=(1, group),
        target_dtype=torch.int32,
        quant_min=low,
        quant_max=high,
        scale_dtype=torch.float32,
    )
    return scale.view(len(weight), -1), zero.float().view(len(weight), -1)


def _hqq_range(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search scale or zero-point by half-quadratic splitting (Badri and Shaji 2023)."""
    if symmetric:
        half = 2 ** (bits - 1)
        _, scale = _choose_qparams_and_quantize_scale_only_hqq(
            weight, [1, group], qmin=-half, qmax=half - 1
        )
        return scale, torch.zeros_like(scale)
    _, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight,
        nbits=bits,
        group_size=group,
        compute_dtype=torch.float32,
        device=str(weight.device),
        raw_output=True,
    )
    return scale, zero
