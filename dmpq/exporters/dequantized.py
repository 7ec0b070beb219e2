"""A bf16 checkpoint whose experts hold their dequantized weights: any engine loads it.

Nothing is saved in memory. What is kept is the map's loss, so that any engine or benchmark can
judge it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpq.bitmap import BitMap
from dmpq.exporters.weights import check_fits, matrices, quantized, save_whole, to_bfloat16

if TYPE_CHECKING:
    from dmpq.moe import MoEModel


def write_dequantized(bitmap: BitMap, moe: MoEModel, tokenizer: Any, out: Path) -> None:
    """Write the checkpoint in the family's original layout; ``moe``'s weights are replaced.

    Args:
        bitmap: The map.
        moe: The model that it was made for.
        tokenizer: Is written beside the weights.
        out: A new folder.

    Raises:
        InputError: If the map is of other weights, prunes experts, or ``out`` is there.
    """
    import torch

    check_fits(bitmap, moe)
    with torch.no_grad():
        for _, experts, expert, side, fmt, weight in matrices(bitmap, moe):
            if fmt.is_quantized:
                made = quantized(weight, fmt, bitmap).dequantize(weight.dtype)
                experts.put(moe.model, expert, side, made)
    model = to_bfloat16(moe)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bitmap.write(folder / "bitmap.json")

    save_whole(out, write)
