"""The variant bank: every expert in every format, quantized once, chosen by an index.

An expert at one width is a *virtual expert*: a layer of E experts and B formats is one MoE layer
of E * B experts, and a bit map only remaps the router's indices (``e * B + format``). Changing
bits costs nothing, and the matrix products are those of transformers' ``grouped_mm``. A pruned
expert is no virtual expert: its tokens are computed for nobody (:mod:`dmpq.pruning`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dmpq.calibration import Calibration
from dmpq.data import Windows
from dmpq.errors import InputError
from dmpq.experts import Experts, run_stacked
from dmpq.formats import Format, Menu
from dmpq.moe import MoEModel
from dmpq.pruning import renormalised
from dmpq.quantization import (
    QuantizedTensor,
    pack_codes,
    quantize,
    quantize_expert,
    stacked,
    unpack_codes,
)
from dmpq.quantization.quantizers import Pair

DEFAULT_BANK_MEMORY: Final = 8 * 2**30


@dataclass(frozen=True, eq=False)
class _Packed:
    """A quantized tensor with its codes packed densely; ``None`` stands for full precision."""

    tensor: QuantizedTensor
    codes: torch.Tensor

    @classmethod
    def of(cls, quantized: QuantizedTensor) -> _Packed:
        bits = quantized.format.bits
        packed = pack_codes(quantized.codes, bits)
        return cls(replace(quantized, codes=quantized.codes.new_empty(len(packed), 0)), packed)

    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's weights, (out, in)."""
        bare = self.tensor[index]
        codes = unpack_codes(self.codes[index], bare.format.bits)
        return replace(bare, codes=codes).dequantize(dtype)


class LayerBank:
    """All variants of one MoE layer, and the experts forward that chooses among them.

    Args:
        experts: The layer's container.
        menu: Formats on offer.
        dense: Keep variants dequantized (fast), or packed and dequantized at each forward.
        factors: Gives what calibrates an expert, by its index in the layer; ``None`` where the
            menu's quantizer is not calibrated.
    """

    def __init__(
        self,
        experts: Experts,
        menu: Menu,
        *,
        dense: bool,
        factors: Callable[[int], Pair] | None = None,
    ) -> None:
        self.experts = experts
        self.menu = menu
        self.selected: torch.Tensor | None = None
        self._choice = np.zeros((1, experts.num_experts, 2), np.int64)
        self._prunes = bool(menu.pruned[0])
        self._virtual_of: torch.Tensor | None = None
        self._place = {index: place for place, index in enumerate(menu.stored)}
        self._packed: list[tuple[_Packed, _Packed] | None] = []
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None
        dtype = experts.down.dtype
        variants: list[tuple[torch.Tensor, torch.Tensor]] = []
        formats = [menu.formats[index] for index in menu.stored]
        quantized = iter(
            _quantized(experts, [f for f in formats if f.is_quantized], menu, factors)
        )
        for fmt in formats:
            if fmt.is_full:
                self._packed.append(None)
                variants.append((experts.gate_up, experts.down))
                continue
            up, down = next(quantized)
            if dense:
                variants.append((up.dequantize(dtype), down.dequantize(dtype)))
            else:
                self._packed.append((_Packed.of(up), _Packed.of(down)))
        if dense:
            up_stack, down_stack = (
                experts.laid_out(torch.stack(tensors, 1).flatten(0, 1))
                for tensors in zip(*variants, strict=True)
            )
            self._dense = (up_stack, down_stack)

    @cached_property
    def _virtual(self) -> SimpleNamespace:
        assert self._dense is not None
        return self.experts.stacked(
            *self._dense, copies=len(self._place), gaps=bool(self.menu.pruned.any())
        )

    def choose(self, formats: NDArray[np.integer]) -> None:
        """Set the formats to run with, (K, E, 2); row block k of the batch gets map k."""
        self._choice = np.asarray(formats, np.int64)
        self._prunes = bool(self.menu.pruned[self._choice].any())
        self._virtual_of = None
        up, down = self._choice[..., 0], self._choice[..., 1]
        if self._dense is not None and np.array_equal(up, down):
            copies = len(self._place)
            nobody = up.shape[1] * copies
            place = np.array([self._place.get(i, nobody) for i in range(len(self.menu))])
            virtual = np.minimum(np.arange(up.shape[1]) * copies + place[up], nobody)
            self._virtual_of = torch.from_numpy(virtual).to(self.experts.down.device)

    def __call__(
        self, _module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer under the chosen formats; the signature of the experts interface."""
        self.selected = index
        choice = self._choice
        if self._virtual_of is not None:
            if len(choice) == 1:
                virtual = self._virtual_of[0][index]
            else:
                rows = index.view(len(choice), -1)
                virtual = self._virtual_of.gather(1, rows).view_as(index)
            return self._run(self._virtual, hidden, virtual, weights)
        blocks = zip(
            choice,
            hidden.chunk(len(choice)),
            index.chunk(len(choice)),
            weights.chunk(len(choice)),
            strict=True,
        )
        return torch.cat([self._run_selected(*block) for block in blocks])

    def _run_selected(
        self,
        choice: NDArray[np.int64],
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        pruned = self.menu.pruned[choice[:, 0]]
        view = self.experts.stacked(*self.select(choice), gaps=bool(pruned.any()))
        own = np.where(pruned, len(pruned), np.arange(len(pruned)))
        return self._run(view, hidden, torch.from_numpy(own).to(index.device)[index], weights)

    def _run(
        self,
        view: SimpleNamespace,
        hidden: torch.Tensor,
        virtual: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        if self._prunes:
            weights = renormalised(weights, virtual < view.num_experts)
        return run_stacked(view, hidden, virtual, weights)

    def select(self, choice: NDArray[np.integer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of one map, (E, out, in) each for gate+up and down; pruned ones 0.

        Args:
            choice: int64 (E, 2), formats of gate+up and of down.
        """
        up, down = (
            self.experts.laid_out(
                torch.stack(
                    [self._variant(e, side, int(f)) for e, f in enumerate(choice[:, side])]
                )
            )
            for side in (0, 1)
        )
        return up, down

    def variant(self, expert: int, fmt: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's gate+up and down weights in a format, or as the checkpoint has them.

        Args:
            expert: Index in the layer.
            fmt: Index on the menu, zeros where that is pruned; ``None`` for the checkpoint's own
                weights.
        """
        if fmt is None:
            return self.experts.gate_up[expert], self.experts.down[expert]
        return self._variant(expert, 0, fmt), self._variant(expert, 1, fmt)

    def _variant(self, expert: int, side: int, fmt: int) -> torch.Tensor:
        full = (self.experts.gate_up, self.experts.down)[side]
        if self.menu.formats[fmt].is_pruned:
            return torch.zeros_like(full[expert])
        place = self._place[fmt]
        if self._dense is not None:
            return self._dense[side][expert * len(self._place) + place]
        packed = self._packed[place]
        return full[expert] if packed is None else packed[side].expert(expert, full.dtype)


def _quantized(
    experts: Experts,
    formats: list[Format],
    menu: Menu,
    factors: Callable[[int], Pair] | None,
) -> Iterator[tuple[QuantizedTensor, QuantizedTensor]]:
    """Yield gate+up and down of all experts of a layer in each quantized format."""
    weights = experts.gate_up, experts.down
    if factors is None:
        for fmt in formats:
            yield quantize(weights[0], fmt, menu), quantize(weights[1], fmt, menu)
        return
    found: list[list[tuple[QuantizedTensor, QuantizedTensor]]] = [[] for _ in formats]
    for expert in range(experts.num_experts):
        own, known = (weights[0][expert], weights[1][expert]), factors(expert)
        for place, fmt in enumerate(formats):
            found[place].append(quantize_expert(own, (fmt, fmt), menu, factors=known))
    for pairs in found:
        yield stacked([up for up, _ in pairs]), stacked([down for _, down in pairs])


class Bank:
    """All variants of all experts of a model.

    Args:
        moe: The model.
        menu: Formats on offer.
        calibration: int64 (windows, length), text that calibrates GPTQ; for no other quantizer.
        memory_bytes: Variants are kept dequantized where they fit into this much memory, else
            packed.
        progress: Called with the number of layers done, and of all layers.

    Raises:
        InputError: If GPTQ has no text or too little of it, or another quantizer is given some.
    """

    def __init__(
        self,
        moe: MoEModel,
        menu: Menu,
        *,
        calibration: Windows | None = None,
        memory_bytes: float = DEFAULT_BANK_MEMORY,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.moe = moe
        self.menu = menu
        self.calibration = _calibration(moe, menu, calibration)
        itemsize = moe.containers[0].down.element_size()
        self.dense = moe.spec.expert_parameters * len(menu.stored) * itemsize <= memory_bytes
        self.layers: list[LayerBank] = []
        for ordinal, experts in enumerate(moe.containers):
            known = self.calibration
            factors = None if known is None else partial(known.factors, ordinal)
            self.layers.append(LayerBank(experts, menu, dense=self.dense, factors=factors))
            if progress is not None:
                progress(len(self.layers), len(moe.containers))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Run the model's experts through the bank while the block lasts."""
        with self.moe.experts_forward(self.layers):
            yield

    def choose(self, formats: NDArray[np.integer]) -> None:
        """Set the formats of all experts for the next forward, (K, N, 2).

        Raises:
            InputError: If a map prunes one projection of an expert and keeps the other.
        """
        self.menu.check_whole(formats)
        start = 0
        for layer in self.layers:
            stop = start + layer.experts.num_experts
            layer.choose(formats[:, start:stop])
            start = stop


def _calibration(moe: MoEModel, menu: Menu, windows: Windows | None) -> Calibration | None:
    if menu.method.calibrated:
        empty = np.empty((0, 1), np.int64)
        return Calibration(moe, empty if windows is None else windows, menu.method)
    if windows is not None:
        raise InputError(
            f"The quantizer {menu.quantizer!r} is not calibrated, and calibration text is given; "
            "leave it out, or use gptq."
        )
    return None
