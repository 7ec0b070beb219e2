"""Dense storage of low-bit codes: eight codes of b bits in b bytes, at any width."""

from __future__ import annotations

import torch


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
    if codes.shape[-1] % 8:
        raise ValueError(f"The number of codes, {codes.shape[-1]}, is not a multiple of 8.")
    if bits == 8:
        return codes.clone()
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes[..., None] >> places & 1).flatten(-2).unflatten(-1, (-1, 8))
    packed: torch.Tensor = (stream << _bit_places(codes.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_codes`; uint8 (..., in * bits / 8) to uint8 (..., in)."""
    if bits == 8:
        return packed.clone()
    stream = (packed[..., None] >> _bit_places(packed.device) & 1).flatten(-2)
    places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    codes: torch.Tensor = (stream.unflatten(-1, (-1, bits)) << places).sum(-1, dtype=torch.uint8)
    return codes


def _bit_places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
