"""A uniform container: integers of every width, unchanged, in one wider width for all experts.

``pack-quantized`` of compressed-tensors, symmetric, one config group for all experts. Nothing is
rounded: integers of b bits are integers of c bits, scales stay, and scales of larger groups are
repeated for the common group. Asymmetric integer zero-points lift into b+1 bits, as code minus
zero-point fits there; float zero-points (HQQ's) do not. It saves no memory beyond its own width.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.bitmap import BitMap
from dmpq.checkpoints.tensor_files import TensorInfo
from dmpq.errors import InputError
from dmpq.exporters.base import number_pattern
from dmpq.exporters.compressed_tensors import quantization_config, weights
from dmpq.exporters.names import DOWN, LayerNames
from dmpq.exporters.plan import Plan, leaves_of
from dmpq.exporters.weights import (
    Matrix,
    check_fits,
    matrices,
    quantized,
    save_whole,
    to_bfloat16,
)

if TYPE_CHECKING:
    import torch

    from dmpq.moe import MoEModel
    from dmpq.quantization import QuantizedTensor

NARROWEST, WIDEST = 2, 8
_SHARDS: Final = "*.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def needed_bits(plan: Plan) -> int:
    """Return the narrowest container that holds every integer of a map.

    Raises:
        InputError: If no integer container does: experts at full precision, pruned experts, or
            float zero-points.
    """
    formats = {
        layer.format_of(e, part)
        for layer in plan.layers
        for e in range(len(layer.experts))
        for part in layer.parts
    }
    odd = next((fmt for fmt in sorted(formats) if not fmt.is_quantized), None)
    if odd is not None:
        raise InputError(
            f"The bit map has experts at {odd.bits} bits, which are no integers, and a container "
            "has one width for all experts; search without it in --bits."
        )
    menu = plan.bitmap.menu
    if not menu.symmetric and not menu.method.integer_zero:
        raise InputError(
            f"The bit map's zero-points are floats (quantizer {menu.quantizer}), and a container "
            "holds integers alone; search with --symmetric, or with --quantizer rtn."
        )
    return max(fmt.bits for fmt in formats) + (not menu.symmetric)


def check_container(plan: Plan, bits: int) -> None:
    """Refuse a container that is too narrow, or that no reader has.

    Raises:
        InputError: With the narrowest that would do.
    """
    if not NARROWEST <= bits <= WIDEST:
        raise InputError(f"--container {bits} is no width; give {NARROWEST} to {WIDEST}.")
    needed = needed_bits(plan)
    if needed > bits:
        lifted = "" if plan.symmetric else ", one more than its widest for zero-points"
        remedy = (
            f"give --container {needed}"
            if needed <= WIDEST
            else "search with --symmetric, or without the widest format"
        )
        raise InputError(
            f"--container {bits} is too narrow: the bit map needs {needed} bits{lifted}; {remedy}."
        )
    fused = next((layer.names for layer in plan.layers if layer.names.fused), None)
    if fused is not None:
        raise InputError(
            f"{plan.bitmap.model['architecture']} keeps the experts of a layer in one tensor on "
            f"disk ({fused.disk[0][DOWN]}), and pack-quantized has a tensor per expert; use --to "
            "dequantized."
        )


def write_container(
    bitmap: BitMap, moe: MoEModel, tokenizer: Any, out: Path, *, bits: int
) -> None:
    """Write a compressed-tensors checkpoint; what is not an expert's is bf16.

    Args:
        bitmap: The map.
        moe: The model that it was made for.
        tokenizer: Is written beside the weights.
        out: A new folder.
        bits: Width of the container.

    Raises:
        InputError: If the map does not fit, is of other weights, or ``out`` is there.
    """
    _check_installed()
    plan = Plan.of(bitmap)
    check_container(plan, bits)
    check_fits(bitmap, moe)
    group = _common_group(plan)
    packed = _packed(bitmap, moe, plan, bits=bits, group=group)
    model = to_bfloat16(moe)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _replace_experts(folder, packed)
        _configure(folder, plan, bits=bits, group=group)
        bitmap.write(folder / "bitmap.json")

    save_whole(out, write)


class ContainerPacking:
    """What stands in the place of experts' weights in a file that is written expert by expert.

    Args:
        plan: Of the map.
        bits: Width of the container.

    Raises:
        InputError: If the map does not fit.
    """

    def __init__(self, plan: Plan, *, bits: int) -> None:
        _check_installed()
        check_container(plan, bits)
        self._plan, self._bits, self._group = plan, bits, _common_group(plan)
        disk = [one for layer in plan.layers for one in layer.names.disk]
        self._leaves = {leaf for parts in disk for leaf in parts.values()}

    def tensors(self, name: str, info: TensorInfo) -> dict[str, TensorInfo] | None:
        """Return what stands in the place of a tensor; ``None`` where it is no expert's."""
        import torch

        leaf = name.removesuffix(".weight")
        if leaf not in self._leaves:
            return None
        rows, columns = info.shape
        packed = _entry(torch.zeros(1, columns, dtype=torch.int16), torch.ones(1, 1), self._bits)
        words = packed["weight_packed"].shape[1]
        return {
            f"{leaf}.weight_packed": TensorInfo(torch.int32, (rows, words)),
            f"{leaf}.weight_scale": TensorInfo(torch.float32, (rows, columns // self._group)),
            f"{leaf}.weight_shape": TensorInfo(torch.int64, (2,)),
        }

    def values(self, matrix: Matrix) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a matrix becomes: names in a file, and values."""
        made = _packed_matrix(self._plan, matrix, bits=self._bits, group=self._group)
        for leaf, kinds in made.items():
            for kind, values in kinds.items():
                yield f"{leaf}.{kind}", values

    def finish(self, folder: Path) -> None:
        """Say in a folder's configuration how its experts are stored; sort its index."""
        _configure(folder, self._plan, bits=self._bits, group=self._group)
        if (folder / _INDEX).exists():
            whole = json.loads((folder / _INDEX).read_text("utf-8"))
            (folder / _INDEX).write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def _check_installed() -> None:
    if find_spec("compressed_tensors") is None:
        raise InputError(
            "--container writes through compressed-tensors, which is not installed; pip install "
            "compressed-tensors."
        )


def _configure(folder: Path, plan: Plan, *, bits: int, group: int) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = _one_group(plan, bits=bits, group=group)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _common_group(plan: Plan) -> int:
    return math.gcd(
        *(
            layer.group_of(e, part)
            for layer in plan.layers
            for e in range(len(layer.experts))
            for part in layer.parts
        )
    )


def _packed(
    bitmap: BitMap, moe: MoEModel, plan: Plan, *, bits: int, group: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Return name on disk → what stands there instead of ``.weight``."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for number, _, expert, side, fmt, weight in matrices(bitmap, moe):
        own = Matrix(number, expert, side, fmt, weight)
        result |= _packed_matrix(plan, own, bits=bits, group=group)
    return result


def _packed_matrix(
    plan: Plan, matrix: Matrix, *, bits: int, group: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Return name on disk → what stands there instead of ``.weight``, of one matrix."""
    layer, weight = plan.layers[matrix.layer], matrix.weight
    parts = layer.parts[-1:] if matrix.side else layer.parts[:-1]
    made = quantized(weight, matrix.fmt, plan.bitmap)
    integers = _integers(made, matrix.fmt.bits)
    scales = _scales(made, weight.shape[-1], group)
    rows = len(integers) // len(parts)
    result = {}
    for index, part in enumerate(parts):
        own = slice(index * rows, (index + 1) * rows)
        leaf = layer.names.disk[matrix.expert][part]
        result[leaf] = _entry(integers[own], scales[own], bits)
    return result


def _integers(made: QuantizedTensor, bits: int) -> torch.Tensor:
    """Return signed integers whose products with the scales are the weights, int16 (out, in)."""
    codes = made.codes.short()
    if made.zero is None:
        centred: torch.Tensor = codes - 2 ** (bits - 1)
        return centred
    groups = made.zero.shape[-1]
    zeros = made.zero.short().repeat_interleave(codes.shape[-1] // groups, -1)
    integers: torch.Tensor = codes - zeros
    return integers


def _scales(made: QuantizedTensor, in_features: int, group: int) -> torch.Tensor:
    """Return scales of the common group, fp32: products are rounded once, as ours are."""
    times = in_features // made.scale.shape[-1] // group
    scales: torch.Tensor = made.scale.float().repeat_interleave(times, -1)
    return scales


def _entry(integers: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    low, high = int(integers.min()), int(integers.max())
    if not -half <= low <= high < half:
        raise InputError(
            f"Integers from {low} to {high} do not fit a container of {bits} bits; give a wider "
            "--container."
        )
    return {
        "weight_packed": pack_to_int32(integers.to(torch.int8).contiguous(), bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(integers.shape, dtype=torch.int64),
    }


def _replace_experts(folder: Path, packed: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put packed tensors into the saved shards where the experts' weights were."""
    from safetensors.torch import load_file, save_file

    placed: dict[str, str] = {}
    for shard in sorted(folder.glob(_SHARDS)):
        tensors = load_file(shard)
        for name in [n for n in tensors if n.removesuffix(".weight") in packed]:
            del tensors[name]
            leaf = name.removesuffix(".weight")
            tensors |= {f"{leaf}.{kind}": value for kind, value in packed[leaf].items()}
            placed |= {f"{leaf}.{kind}": shard.name for kind in packed[leaf]}
        save_file(tensors, shard, metadata={"format": "pt"})
    assert len(placed) == 3 * len(packed), "an expert's weight was saved under another name"
    index = folder / _INDEX
    if index.exists():
        whole = json.loads(index.read_text("utf-8"))
        kept = {
            name: shard
            for name, shard in whole["weight_map"].items()
            if name.removesuffix(".weight") not in packed
        }
        whole["weight_map"] = dict(sorted({**kept, **placed}.items()))
        index.write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def _one_group(plan: Plan, *, bits: int, group: int) -> dict[str, Any]:
    """Return the configuration of one group that every expert's matrix is in, and nothing else."""
    targets: dict[str, None] = {}
    for layer in plan.layers:
        for parent, leaves in _names(layer.names, layer.parts):
            numbers = number_pattern(range(len(layer.experts)))
            targets[f"re:^{re.escape(parent)}\\.{numbers}\\.({'|'.join(leaves)})$"] = None
    return quantization_config(
        {
            "group_0": {
                "targets": list(targets),
                "weights": weights(bits, group, symmetric=True),
                "format": "pack-quantized",
            }
        }
    )


def _names(names: LayerNames, parts: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    return [
        (names.path, leaves_of(names.modules[0], parts)),
        (names.disk_parent, leaves_of(names.disk[0], parts)),
    ]
