"""A quantized weight: codes, scales, zero-points, and a compensator where there is one."""

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
        compensator: Factors (..., rank, out) and (..., rank, in), quantized themselves: the first,
            transposed, times the second is added to the weights. ``None`` for no compensator.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    format: Format
    compensator: tuple[QuantizedTensor, QuantizedTensor] | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights, (..., out, in), computed in fp32 and cast to ``dtype``."""
        grouped = self.codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        middle = 2 ** (self.format.bits - 1)
        zero = middle if self.zero is None else self.zero.float()[..., None]
        weights: torch.Tensor = ((grouped - zero) * self.scale.float()[..., None]).flatten(-2)
        if self.compensator is not None:
            left, right = (factor.dequantize() for factor in self.compensator)
            weights = weights + _product(left, right)
        return weights.to(dtype)

    def __getitem__(self, index: int) -> QuantizedTensor:
        """Return one matrix of a stack, along the first dimension."""
        left_right = self.compensator
        return QuantizedTensor(
            self.codes[index],
            self.scale[index],
            None if self.zero is None else self.zero[index],
            self.format,
            None if left_right is None else (left_right[0][index], left_right[1][index]),
        )


def stacked(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Return quantized matrices of one shape and format as one, along a new first dimension."""
    first = tensors[0]
    zeros = [t.zero for t in tensors if t.zero is not None]
    pairs = [t.compensator for t in tensors if t.compensator is not None]
    return QuantizedTensor(
        torch.stack([t.codes for t in tensors]),
        torch.stack([t.scale for t in tensors]),
        torch.stack(zeros) if zeros else None,
        first.format,
        (stacked([left for left, _ in pairs]), stacked([right for _, right in pairs]))
        if pairs
        else None,
    )


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left.mT @ right``, matrix by matrix: a batched product may round differently."""
    if left.ndim == 2:
        return left.mT @ right
    pairs = zip(left, right, strict=True)
    return torch.stack([_product(one, other) for one, other in pairs])
