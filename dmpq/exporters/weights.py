"""The quantized weights behind a map, and what every checkpoint shares that is written of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpq.bitmap import BitMap
from dmpq.errors import InputError
from dmpq.exporters.plan import pairs_of
from dmpq.formats import Format

if TYPE_CHECKING:
    import torch

    from dmpq.moe import Experts, MoEModel
    from dmpq.quantization import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of an expert, and what it is to become.

    Attributes:
        layer: Ordinal of the layer.
        expert: Index there.
        side: 0 for gate+up, 1 for down.
        fmt: Its format.
        weight: fp32 (out, in).
    """

    layer: int
    expert: int
    side: int
    fmt: Format
    weight: torch.Tensor


def check_fits(bitmap: BitMap, moe: MoEModel) -> None:
    """Refuse a map of other weights, or one that the checkpoint alone does not determine.

    Raises:
        InputError: With what differs.
    """
    if moe.fingerprint != bitmap.model["fingerprint"]:
        raise InputError(
            f"The bit map was made for weights {bitmap.model['fingerprint'][:12]}..., "
            f"{moe.name} has {moe.fingerprint[:12]}...; give the right --model."
        )
    bitmap.to_assignment(moe.spec)
    if bitmap.menu.method.calibrated:
        raise InputError(
            f"The bit map's quantizer {bitmap.menu.quantizer!r} needs calibration text, and here "
            "weights are made anew from the checkpoint alone; use python -m dmpq.apply, or a map "
            "of rtn or hqq."
        )
    if bitmap.menu.pruned[pairs_of(bitmap)].any():
        raise InputError(
            "The bit map prunes experts (0 bits), which ordinary checkpoints cannot leave out: "
            "their routing weight would be lost; search without 0 in --bits."
        )


def matrices(
    bitmap: BitMap, moe: MoEModel
) -> Iterator[tuple[int, Experts, int, int, Format, torch.Tensor]]:
    """Yield (layer, container, expert, side, format, weight (out, in)) of every matrix.

    Side 0 is gate+up and 1 down.
    """
    pairs, start = pairs_of(bitmap), 0
    for layer, experts in enumerate(moe.containers):
        for expert in range(experts.num_experts):
            for side, weights in enumerate((experts.gate_up, experts.down)):
                fmt = bitmap.menu.formats[pairs[start + expert, side]]
                yield layer, experts, expert, side, fmt, weights[expert]
        start += experts.num_experts


def quantized(weight: torch.Tensor, fmt: Format, bitmap: BitMap) -> QuantizedTensor:
    """Return a matrix (out, in) in a format of the map, as the bank makes it."""
    from dmpq.quantization import quantize

    return quantize(weight, fmt, bitmap.menu)


def save_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it is whole or not there: aside first, then renamed.

    Args:
        out: The folder; must not exist, or be empty.
        write: Fills the folder that it is given.

    Raises:
        InputError: If there is something at ``out``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give a new folder with --out, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write(aside)
        aside.chmod(0o755)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def to_bfloat16(moe: MoEModel) -> Any:
    """Return the model with its parameters in bfloat16, but for those that it keeps in fp32."""
    import torch

    model = moe.model
    own = vars(type(model))
    kept = [
        *(own.get("_keep_in_fp32_modules") or ()),
        *(own.get("_keep_in_fp32_modules_strict") or ()),
    ]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model
