"""Experts that run as a bit map would quantize them, and learn through it.

Rounding has no gradient, so the straight-through estimator (Bengio et al., arXiv 1308.3432) takes
it as the identity: weights in full precision are kept, quantized for every forward each at its own
width, and moved by the gradient of what was quantized. A group's range is either found anew from
the weights by the map's own quantizer, so that the trained checkpoint under the same map is what
was trained, to the bit; or learned beside them, as in LSQ (Esser et al., arXiv 1902.08153,
section 2.1) with the zero-point as in LSQ+ (Bhalgat et al., arXiv 2004.09576, equations 2-3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dmpq.adapters.stacked import StackedExperts
from dmpq.errors import InputError
from dmpq.experts import Experts, run_stacked
from dmpq.formats import Format, Menu
from dmpq.moe import MoEModel
from dmpq.pruning import renormalised
from dmpq.quantization import QuantizedTensor, quantize
from dmpq.quantization.ranges import round_to_codes
from dmpq.training.precision import autocast_dtype

LEARNED_RANGES: Final = "learned_ranges"
"""Name of the module inside an experts container that holds them."""
_SMALLEST_SCALE: Final = 2.0**-24
"""As :mod:`dmpq.quantization.ranges` has it."""


def own_weights(experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate+up and down weights (E, out, in) that pass gradients to the model's own."""
    pair = experts.parameters
    if experts.module.is_transposed:
        return pair[0].mT, pair[1].mT
    return pair


def run_weights(
    experts: Experts,
    weights: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    routing: torch.Tensor,
    *,
    gaps: bool = False,
) -> torch.Tensor:
    """Run a layer on given weights, in autocast's type where that is on.

    Args:
        experts: The container.
        weights: Gate+up and down, (E, out, in) each.
        hidden: (T, H).
        index: int64 (T, K).
        routing: (T, K), routing weights.
        gaps: Whether the index E stands for no expert.

    Returns:
        (T, H), of the dtype of ``hidden``.
    """
    dtype = autocast_dtype(hidden.device) or weights[0].dtype
    up, down = (experts.laid_out(weight.to(dtype)) for weight in weights)
    view = experts.stacked(up, down, gaps=gaps)
    return run_stacked(view, hidden.to(dtype), index, routing).to(hidden.dtype)


@dataclass(eq=False)
class _Known:
    """Ranges of some experts' matrices, found a while ago."""

    scale: torch.Tensor
    zero: torch.Tensor | None


class FakeQuantizedExperts:
    """The forward of one container under a map; its signature is the experts interface's.

    Args:
        experts: The container.
        menu: Formats on offer.
        ranges: One of :data:`dmpq.training.config.RANGES`; those that are learned need
            :meth:`learn_ranges` first. Those that are recomputed are kept until :meth:`forget`.
    """

    def __init__(self, experts: Experts, menu: Menu, *, ranges: str = "recomputed") -> None:
        self.experts = experts
        self.menu = menu
        self._learned = ranges == "learned"
        self._known: dict[tuple[int, int], _Known] = {}
        self._choice = np.zeros((experts.num_experts, 2), np.int64)

    @property
    def choice(self) -> NDArray[np.int64]:
        """The formats to run with, menu indices (E, 2) of gate+up and of down."""
        return self._choice

    def choose(self, formats: NDArray[np.integer]) -> None:
        """Set the formats to run with, (E, 2), and find all ranges anew."""
        self._choice = np.array(formats, np.int64)
        self.forget()

    def forget(self) -> None:
        """Find all ranges anew at the next forward."""
        self._known = {}

    def learn_ranges(self) -> None:
        """Make the ranges of the chosen formats parameters, beginning with the quantizer's."""
        child = nn.ParameterDict()
        for side in (0, 1):
            for fmt, members in self._members(side):
                found = self._quantized(side, fmt, members)
                child[f"{side}_{self.menu.keys[fmt]}_scale"] = found.scale.float()
                if found.zero is not None:
                    child[f"{side}_{self.menu.keys[fmt]}_zero"] = found.zero.float()
        self.experts.module.add_module(LEARNED_RANGES, child)

    def drop_ranges(self) -> None:
        """Take learned ranges out of the model again."""
        if LEARNED_RANGES in dict(self.experts.module.named_children()):
            delattr(self.experts.module, LEARNED_RANGES)

    def __call__(
        self, _module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer on what the map makes of its weights."""
        pruned = self.menu.pruned[self._choice[:, 0]]
        if pruned.any():
            own = torch.from_numpy(np.where(pruned, len(pruned), np.arange(len(pruned))))
            index = own.to(index.device)[index]
            routing = renormalised(routing, index < len(pruned))
        gaps = bool(pruned.any())
        return run_weights(self.experts, self.weights(), hidden, index, routing, gaps=gaps)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gate+up and down (E, out, in) as quantized, with gradients straight through."""
        up, down = (self._side(side) for side in (0, 1))
        return up, down

    def quantized(self, expert: int) -> tuple[QuantizedTensor | None, QuantizedTensor | None]:
        """Return both matrices of one expert as a checkpoint stores them; ``None`` for 16 bits."""
        with torch.no_grad():
            up, down = (self._stored(side, expert) for side in (0, 1))
        return up, down

    def _stored(self, side: int, expert: int) -> QuantizedTensor | None:
        fmt = int(self._choice[expert, side])
        if not self.menu.formats[fmt].is_quantized:
            return None
        members = np.flatnonzero(self._choice[:, side] == fmt)
        place = int(np.searchsorted(members, expert))
        if not self._learned:
            return self._quantized(side, fmt, members[place : place + 1])[0]
        scale, zero = self._stored_ranges(side, fmt)
        chosen = None if zero is None else zero[place].half()
        matrix = own_weights(self.experts)[side][expert]
        return _on_grid(matrix, scale[place].half(), chosen, self.menu.formats[fmt])

    def _members(self, side: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Return each quantized format that experts have, and those experts."""
        column = self._choice[:, side]
        return [
            (int(fmt), np.flatnonzero(column == fmt))
            for fmt in np.unique(column)
            if self.menu.formats[fmt].is_quantized
        ]

    def _side(self, side: int) -> torch.Tensor:
        own = own_weights(self.experts)[side]
        result = own
        for fmt, members in self._members(side):
            where = torch.from_numpy(members).to(own.device)
            some = own[where]
            if self._learned:
                seen = self._by_learned_ranges(side, fmt, some)
            else:
                seen = _straight(self._dequantized(side, fmt, members, some.detach()), some)
            result = result.index_copy(0, where, seen)
        return result

    def _dequantized(
        self, side: int, fmt: int, members: NDArray[np.int64], some: torch.Tensor
    ) -> torch.Tensor:
        known = self._known.get((side, fmt))
        if known is not None:
            found = _on_grid(some, known.scale, known.zero, self.menu.formats[fmt])
            return found.dequantize(some.dtype)
        found = self._quantized(side, fmt, members)
        self._known[side, fmt] = _Known(found.scale, found.zero)
        return found.dequantize(some.dtype)

    def _quantized(self, side: int, fmt: int, members: NDArray[np.int64]) -> QuantizedTensor:
        own = own_weights(self.experts)[side]
        some = own[torch.from_numpy(members).to(own.device)].detach()
        return quantize(some, self.menu.formats[fmt], self.menu)

    def _stored_ranges(self, side: int, fmt: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return learned scales and zero-points as they are stored, straight through."""
        key = f"{LEARNED_RANGES}.{side}_{self.menu.keys[fmt]}"
        own = self.experts.module.get_parameter(f"{key}_scale")
        scale = _halved(own.clamp_min(_SMALLEST_SCALE))
        if self.menu.symmetric:
            return scale, None
        zero = self.experts.module.get_parameter(f"{key}_zero")
        if self.menu.method.integer_zero:
            return scale, _rounded(zero.clamp(0, 2 ** self.menu.formats[fmt].bits - 1))
        return scale, _halved(zero)

    def _by_learned_ranges(self, side: int, fmt: int, some: torch.Tensor) -> torch.Tensor:
        bits = self.menu.formats[fmt].bits
        scale, zero = self._stored_ranges(side, fmt)
        per_group = some.shape[-1] // scale.shape[-1]
        calm = 1 / math.sqrt(per_group * (2**bits - 1))  # LSQ, section 2.2
        scale = _calmed(scale, calm)[..., None]
        middle: torch.Tensor | float = 2.0 ** (bits - 1)
        if zero is not None:
            middle = _calmed(zero, calm)[..., None]
        groups = some.unflatten(-1, (-1, per_group))
        codes = _rounded((groups / scale + middle).clamp(0, 2**bits - 1))
        weights: torch.Tensor = ((codes - middle) * scale).flatten(-2)
        return weights


def _straight(rounded: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what was rounded, to the bit, with the gradient of the value itself."""
    return rounded + (value - value.detach())


def _halved(value: torch.Tensor) -> torch.Tensor:
    """Return a value as float16 stores it, straight through."""
    return _straight(value.detach().half().float(), value)


def _rounded(value: torch.Tensor) -> torch.Tensor:
    """Return the nearest whole number, straight through."""
    return _straight(value.detach().round(), value)


def _calmed(value: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a value whose gradient is scaled by a factor."""
    return value.detach() + (value - value.detach()) * factor


def _on_grid(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, fmt: Format
) -> QuantizedTensor:
    codes = round_to_codes(weight.detach().float(), scale, zero, fmt.bits)
    return QuantizedTensor(codes, scale, zero, fmt)


class FakeQuantizedModel:
    """A model whose experts run under one map at a time, learning through it.

    Args:
        moe: The model.
        menu: Formats on offer.
        ranges: As for :class:`FakeQuantizedExperts`.
        refresh: Batches for which recomputed ranges are kept.

    Raises:
        InputError: If the model's or the menu's weights cannot be trained so.
    """

    def __init__(
        self, moe: MoEModel, menu: Menu, *, ranges: str = "recomputed", refresh: int = 1
    ) -> None:
        check_trainable(moe)
        if menu.method.calibrated or menu.method.rank:
            raise InputError(
                f"The map's quantizer {menu.quantizer!r} cannot be trained through: it "
                f"{'is calibrated on text' if menu.method.calibrated else 'has compensators'}; "
                "search a map with --quantizer hqq or rtn."
            )
        self.moe = moe
        self.layers = [FakeQuantizedExperts(one, menu, ranges=ranges) for one in moe.containers]
        self._refresh = refresh

    def begin(self, step: int) -> None:
        """Find ranges anew where a batch's turn has come; a function of its number alone."""
        if step % self._refresh == 0:
            self.forget()

    def forget(self) -> None:
        """Find all ranges anew, so that what runs is what a checkpoint would hold."""
        for layer in self.layers:
            layer.forget()

    def choose(self, formats: NDArray[np.integer]) -> None:
        """Set the formats of all experts, menu indices (N, 2), and find all ranges anew."""
        ends = np.cumsum([layer.experts.num_experts for layer in self.layers])[:-1]
        for layer, own in zip(self.layers, np.split(formats, ends), strict=True):
            layer.choose(own)

    @property
    def forwards(self) -> Sequence[FakeQuantizedExperts]:
        """What :meth:`dmpq.moe.MoEModel.experts_forward` takes."""
        return self.layers


class TrainedExperts:
    """The forward of one container on its own weights, in autocast's type where that is on.

    Args:
        experts: The container.
    """

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def __call__(
        self, _module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer; the signature of the experts interface."""
        return run_weights(self.experts, own_weights(self.experts), hidden, index, routing)


def check_trainable(moe: MoEModel) -> None:
    """Refuse a family whose experts are trained elsewhere than where they run.

    Raises:
        InputError: If it is one of those that have adapters.
    """
    if any(isinstance(experts.module, StackedExperts) for experts in moe.containers):
        raise InputError(
            f"{moe.name} is of family {moe.model.config.model_type!r}, which runs through an "
            "adapter that keeps a copy of its experts, so that they cannot be trained; use a "
            "family of the experts interface (python -m dmpq.models list)."
        )
