"""Experts that stay packed in memory, each in its own format, and are dequantized where they run.

Experts of one format stand together: a projection of a container is a stack of codes, scales and
zero-points per format, or of weights where the format is the checkpoint's own precision. A pruned
expert has no place in any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn
from torch.nn import functional

from dmpq.checkpoints.tensor_files import TensorInfo
from dmpq.errors import InputError
from dmpq.experts import Experts, run_stacked
from dmpq.formats import COMPENSATOR_BITS, Format, Menu, compensator_format
from dmpq.pruning import renormalised
from dmpq.quantization import QuantizedTensor, pack_codes, unpack_codes
from dmpq.spec import MoELayer

CHILD: Final = "packed"
"""Name of the module inside an experts container."""
SIDES: Final = ("gate_up", "down")
WEIGHT: Final = "weight"
_FACTORS: Final = ("left", "right")
"""A compensator's, in the order of :attr:`dmpq.quantization.QuantizedTensor.compensator`."""
_RUN: Final = 8
"""Codes that fill whole bytes at every width."""
_MOST_DEQUANTIZED: Final = 256 << 20
"""Bytes of weights that are dequantized at once."""


@dataclass(frozen=True)
class PackedLayer:
    """Which format each expert of a layer has, and what is stored for it.

    Attributes:
        layer: The layer's geometry.
        menu: Formats on offer.
        keys: Menu keys of the experts' gate+up, and of their down.
        dtype: Of weights in the checkpoint's own precision.
    """

    layer: MoELayer
    menu: Menu
    keys: tuple[tuple[str, ...], tuple[str, ...]]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for out, inputs in (self.layer.gate_up_shape, self.layer.down_shape):
            for width in (inputs, out) if self.menu.method.rank else (inputs,):
                if width % _RUN:
                    raise InputError(
                        f"{self.layer.path} has matrices of {out} by {inputs}, and {width} is no "
                        f"multiple of {_RUN}, so that codes do not fill bytes; such a model "
                        "cannot be packed."
                    )

    def members(self, side: int) -> dict[str, list[int]]:
        """Return the experts of each format that stores something, in order."""
        found: dict[str, list[int]] = {}
        for fmt in self.menu.formats:
            experts = [e for e, key in enumerate(self.keys[side]) if key == fmt.key]
            if experts and not fmt.is_pruned:
                found[fmt.key] = experts
        return found

    @property
    def pruned(self) -> tuple[bool, ...]:
        """Whether each expert is left out."""
        return tuple(Format.parse(key).is_pruned for key in self.keys[0])

    def parts(self, side: int, key: str, count: int) -> dict[str, TensorInfo]:
        """Return what is stored of so many experts in a format."""
        out, inputs = (self.layer.gate_up_shape, self.layer.down_shape)[side]
        fmt, rank = Format.parse(key), self.menu.method.rank
        if fmt.is_full:
            return {WEIGHT: TensorInfo(self.dtype, (count, out, inputs))}
        parts = _matrix_parts((out, inputs), fmt, self.menu, count)
        if rank:
            for name, width in zip(_FACTORS, (out, inputs), strict=True):
                shape, own = (rank, width), compensator_format(width)
                found = _matrix_parts(shape, own, self.menu, count)
                parts |= {f"{name}_{part}": info for part, info in found.items()}
        return parts

    def tensors(self) -> dict[str, TensorInfo]:
        """Return every tensor of the layer by its name in the checkpoint."""
        return {
            tensor_name(self.layer.path, side, key, part): info
            for side in range(len(SIDES))
            for key, experts in self.members(side).items()
            for part, info in self.parts(side, key, len(experts)).items()
        }


def tensor_name(path: str, side: int, key: str, part: str) -> str:
    """Return a stored tensor's name: the container, the projection, the format, the part."""
    return f"{path}.{CHILD}.{SIDES[side]}.{key}.{part}"


def _matrix_parts(
    shape: tuple[int, int], fmt: Format, menu: Menu, count: int
) -> dict[str, TensorInfo]:
    """Return what is stored of so many quantized matrices (out, in)."""
    out, inputs = shape
    groups = inputs // fmt.group_along(inputs)
    parts = {
        "codes": TensorInfo(torch.uint8, (count, out, inputs * fmt.bits // 8)),
        "scale": TensorInfo(torch.float16, (count, out, groups)),
    }
    if menu.symmetric:
        return parts
    if menu.method.integer_zero:
        runs = -(-out * groups // _RUN)
        return parts | {"zero": TensorInfo(torch.uint8, (count, runs * fmt.bits))}
    return parts | {"zero": TensorInfo(torch.float16, (count, out, groups))}


def stored_parts(
    weight: torch.Tensor, quantized: QuantizedTensor | None, menu: Menu
) -> dict[str, torch.Tensor]:
    """Return what is stored of one expert's matrix: its parts, or itself where not quantized.

    Args:
        weight: (out, in), the matrix as the checkpoint has it.
        quantized: The same, quantized; ``None`` to keep it.
        menu: Says how zero-points are stored.
    """
    if quantized is None:
        return {WEIGHT: weight}
    bits = quantized.format.bits
    parts = {"codes": pack_codes(quantized.codes, bits), "scale": quantized.scale}
    if quantized.zero is not None:
        zero = quantized.zero
        parts["zero"] = _packed_zeros(zero, bits) if menu.method.integer_zero else zero
    for name, factor in zip(_FACTORS, quantized.compensator or (), strict=False):
        own = stored_parts(weight, factor, menu)
        parts |= {f"{name}_{part}": values for part, values in own.items()}
    return parts


def _packed_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack a matrix's zero-points, which are codes, as one stream."""
    flat = zero.flatten().to(torch.uint8)
    return pack_codes(functional.pad(flat, (0, -len(flat) % _RUN)), bits)


def read_parts(parts: Mapping[str, torch.Tensor], fmt: Format) -> QuantizedTensor:
    """Undo :func:`stored_parts` of a quantized matrix."""
    scale, zero = parts["scale"], parts.get("zero")
    if zero is not None and not zero.is_floating_point():
        flat = unpack_codes(zero, fmt.bits)[: scale.numel()]
        zero = flat.reshape(scale.shape).half()
    factors = []
    for name in _FACTORS:
        own = {
            part.removeprefix(f"{name}_"): values
            for part, values in parts.items()
            if part.startswith(f"{name}_")
        }
        if own:
            width = own["codes"].shape[-1] * 8 // COMPENSATOR_BITS
            factors.append(read_parts(own, compensator_format(width)))
    pair = (factors[0], factors[1]) if factors else None
    return QuantizedTensor(unpack_codes(parts["codes"], fmt.bits), scale, zero, fmt, pair)


class _Stack(nn.Module):
    """Experts of one format: their stored parts as buffers."""

    def __init__(self, fmt: Format, parts: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        self.fmt = fmt
        for name, info in parts.items():
            self.register_buffer(name, torch.empty(info.shape, dtype=info.dtype))

    def weights(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's weights, (out, in)."""
        own = {name: buffer[place] for name, buffer in self.named_buffers()}
        if self.fmt.is_full:
            return own[WEIGHT].to(dtype)
        return read_parts(own, self.fmt).dequantize(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move, but never cast: in another float type scales would be other scales."""
        if self.fmt.is_full:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class PackedExperts(nn.Module):
    """The weights of a container's experts, each in its own format.

    Args:
        packed: The layer.
    """

    def __init__(self, packed: PackedLayer) -> None:
        super().__init__()
        self.layout = packed
        self._places: list[dict[int, tuple[str, int]]] = []
        for side, name in enumerate(SIDES):
            members = packed.members(side)
            stacks = {
                key: _Stack(Format.parse(key), packed.parts(side, key, len(experts)))
                for key, experts in members.items()
            }
            self.add_module(name, nn.ModuleDict(stacks))
            self._places.append(
                {e: (key, i) for key, experts in members.items() for i, e in enumerate(experts)}
            )

    def weights(self, expert: int, side: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's dequantized weights, (out, in); it must not be pruned."""
        key, place = self._places[side][expert]
        stack = cast(nn.ModuleDict, self.get_submodule(SIDES[side]))[key]
        return cast(_Stack, stack).weights(place, dtype)

    def run(
        self, experts: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer, dequantizing the experts that tokens select.

        Args:
            experts: The container; its own weights are not read.
            hidden: (T, H).
            index: int64 (T, K).
            weights: (T, K).

        Returns:
            (T, H), in the dtype of ``hidden``.
        """
        pruned = self.layout.pruned
        count = len(pruned)
        if any(pruned):
            kept = torch.tensor([not one for one in pruned], device=index.device)
            weights = renormalised(weights, kept[index])
        chosen = [e for e in index.unique().tolist() if e < count and not pruned[e]]
        output: torch.Tensor | None = None
        for chunk in self._chunks(chosen, hidden.dtype):
            # The interface counts the rows of one expert alone by torch.histc of one bin, which
            # takes those of nobody as well, and products of more rows round otherwise.
            alone = len(chunk) == 1 and bool((index != chunk[0]).any())
            some = chunk * 2 if alone else chunk
            place = torch.full((count + 1,), len(some), dtype=index.dtype)
            place[some] = torch.arange(len(some), dtype=index.dtype)
            own = place.to(index.device)[index.clamp(max=count)]
            up, down = (
                experts.laid_out(torch.stack([self.weights(e, side, hidden.dtype) for e in some]))
                for side in (0, 1)
            )
            view = experts.stacked(up, down, only=some, gaps=bool((own == len(some)).any()))
            part = run_stacked(view, hidden, own, weights)
            output = part if output is None else output + part
        return torch.zeros_like(hidden) if output is None else output

    def _chunks(self, experts: Sequence[int], dtype: torch.dtype) -> Iterator[list[int]]:
        """Yield experts in lots of few enough dequantized bytes."""
        layer = self.layout.layer
        each = layer.expert_parameters // layer.num_experts * dtype.itemsize
        step = max(1, _MOST_DEQUANTIZED // each)
        for start in range(0, len(experts), step):
            yield list(experts[start : start + step])
