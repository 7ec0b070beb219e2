"""How a group's range is found, how it is stored, and how weights round against it."""

from __future__ import annotations

from typing import Final

import torch
from torchao.quantization import MappingType, choose_qparams_affine
from torchao.quantization.quant_primitives import (
    _choose_qparams_and_quantize_affine_hqq,
    _choose_qparams_and_quantize_scale_only_hqq,
)

_SMALLEST_SCALE: Final = 2.0**-24
"""Smallest positive float16: a group of equal weights must not divide by zero."""


def rtn_range(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map each group's range onto the codes: the textbook min-max rule.

    Args:
        weight: float32 (out, in).
        bits: Width of a code.
        group: Weights per scale; divides ``in``.
        symmetric: Whether codes are symmetric around zero.

    Returns:
        Scale and zero-point (0 where symmetric), float32 (out, groups) each.
    """
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


def hqq_range(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search scale or zero-point by half-quadratic splitting (Badri and Shaji 2023).

    Arguments and result are those of :func:`rtn_range`; zero-points are no integers.
    """
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


def stored_range(
    scale: torch.Tensor, zero: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales and zero-points as they are stored, float16; no zero-point if symmetric."""
    return scale.clamp_min(_SMALLEST_SCALE).half(), None if symmetric else zero.half()


def round_to_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Round against stored ranges, so that what is evaluated is what a checkpoint would hold.

    Args:
        weight: float32 (..., out, in).
        scale: float16 (..., out, groups).
        zero: float16 (..., out, groups); ``None`` where symmetric.
        bits: Width of a code.

    Returns:
        uint8 (..., out, in).
    """
    grouped = weight.unflatten(-1, (scale.shape[-1], -1)) / scale.float()[..., None]
    shift = 2 ** (bits - 1) if zero is None else zero.float()[..., None]
    codes: torch.Tensor = (grouped + shift).round().clamp(0, 2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)
