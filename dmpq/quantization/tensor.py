"""A quantized weight: codes, scales and zero-points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmpq.formats import Format


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Weights stored as ``(code - zero) * scale`` in groups along the last dimension.

    Attributes:
        codes: uint8 (..., out, in), below ``2**bits``.
        scale: float16 (..., out, groups).
        zero: float16 (..., out, groups); ``None`` where symmetric, whose zero is the middle code.
        format: Width and group size.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    format: Format

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights, (..., out, in), computed in fp32 and cast to ``dtype``."""
        grouped = self.codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        middle = 2 ** (self.format.bits - 1)
        zero = middle if self.zero is None else self.zero.float()[..., None]
        weights: torch.Tensor = (grouped - zero) * self.scale.float()[..., None]
        return weights.flatten(-2).to(dtype)
