"""Dense storage of low-bit codes: eight codes of b bits in b bytes, at any width."""

from __future__ import annotations

from typing import Final

import torch

_RUN: Final = 8
"""Codes that fill whole bytes at every width."""


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes without a gap.

    Args:
        codes: uint8 (..., in), each below ``2**bits``; ``in`` is a multiple of 8.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 (..., in * bits / 8); bit i of the stream is bit ``i % 8`` of byte ``i // 8``.

    Raises:
        ValueError: If ``in`` is not a multiple of 8.
    """
    if codes.shape[-1] % _RUN:
        raise ValueError(f"The number of codes, {codes.shape[-1]}, is not a multiple of 8.")
    if bits == 8:
        return codes.clone()
    if _RUN % bits == 0:
        return _joined(codes.unflatten(-1, (-1, _RUN // bits)), bits, torch.uint8)
    words = _joined(codes.unflatten(-1, (-1, _RUN)), bits, _word(bits))
    return _split(words, 8, bits)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_codes`; uint8 (..., in * bits / 8) to uint8 (..., in)."""
    if bits == 8:
        return packed.clone()
    if _RUN % bits == 0:
        return _split(packed, bits, _RUN // bits)
    words = _joined(packed.unflatten(-1, (-1, bits)), 8, _word(bits))
    return _split(words, bits, _RUN)


def _word(bits: int) -> torch.dtype:
    """Return an integer that holds eight codes."""
    return torch.int32 if bits * _RUN < 32 else torch.int64


def _joined(parts: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the words that parts of so many bits make, the lowest first; (..., n) to (...)."""
    words = parts[..., 0].to(dtype, copy=True)
    for place in range(1, parts.shape[-1]):
        words |= parts[..., place].to(dtype) << (width * place)
    return words


def _split(words: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Undo :func:`_joined`: uint8 (..., n * count)."""
    parts = torch.empty(*words.shape, count, dtype=torch.uint8, device=words.device)
    for place in range(count):
        parts[..., place] = words >> (width * place) & (2**width - 1)
    return parts.flatten(-2)
