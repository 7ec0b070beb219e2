"""MiLo: low-rank factors that give back what quantization takes from a matrix.

Huang et al., "MiLo: Efficient Quantized MoE Inference with Mixture of Low-Rank Compensators",
arXiv 2504.02658: the matrix is approximated by ``dequantized + left^T right`` without calibration.
Two steps alternate: quantize the matrix less the factors, and take the factors of the residual by
a truncated singular value decomposition. The factors are stored in 3 bits themselves; here the
residual that decides is the one of the factors as stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch

from dmpq.errors import InputError
from dmpq.formats import check_rank
from dmpq.quantization.tensor import QuantizedTensor

_ROUNDS: Final = 20
_WINDOW: Final = 3
_LEAST_GAIN: Final = 1e-4
"""The paper stops where the mean of the last three residuals falls by less, relative to it."""

Method = Callable[[torch.Tensor], QuantizedTensor]


def compensated(
    weight: torch.Tensor, rank: int, quantize: Method, quantize_factor: Method
) -> QuantizedTensor:
    """Quantize one matrix, with a compensator of a rank.

    Args:
        weight: float32 (out, in).
        rank: Of the compensator, 1 or more.
        quantize: Quantizes (out, in).
        quantize_factor: Quantizes (rank, width) in the format of a factor's rows.

    Returns:
        The round of the smallest residual, in the Frobenius norm.

    Raises:
        InputError: If the rank is above that of the matrix, or the scales overflow.
    """
    check_rank(rank, weight.shape)
    best, least = None, float("inf")
    residuals: list[float] = []
    product = torch.zeros_like(weight)
    for _ in range(_ROUNDS):
        bare = quantize(weight - product)
        residual = weight - bare.dequantize()
        if not torch.isfinite(residual).all():
            raise InputError(
                f"Weights of up to {float(weight.abs().max()):.3g} overflow the scales, which are "
                "float16, so that no compensator can be computed; get the checkpoint again, or "
                "use a quantizer without one."
            )
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        root = s[:rank, None].sqrt()
        factors = (quantize_factor(u[:, :rank].mT * root), quantize_factor(v[:rank] * root))
        found = replace(bare, compensator=factors)
        restored = found.dequantize()
        product = restored - bare.dequantize()
        residuals.append(float((weight - restored).norm()))
        if residuals[-1] < least:
            best, least = found, residuals[-1]
        if _settled(residuals):
            break
    assert best is not None
    return best


def _settled(residuals: list[float]) -> bool:
    if len(residuals) <= _WINDOW:
        return False
    now, before = (sum(part) for part in (residuals[-_WINDOW:], residuals[-_WINDOW - 1 : -1]))
    return before - now < _LEAST_GAIN * before
