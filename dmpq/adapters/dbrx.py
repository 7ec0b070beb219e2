"""DBRX: all experts' rows in three matrices, ``w1`` (gate), ``v1`` (up) and ``w2`` (down)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts
from dmpq.experts import Source, dispatch


class DbrxExperts(StackedExperts):
    """Gated experts without biases, (in, out).

    Down weights share their memory with the model's; gate and up stand apart there, so that
    together they are a copy.
    """

    def family_forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run hidden (B, L, H) on experts (B * L, K) with weights (B * L, K)."""
        hidden, index, weights = inputs
        return dispatch(self, hidden.flatten(0, -2), index, weights).view_as(hidden)


def adapt(model: nn.Module, path: str) -> StackedExperts:
    """Return the experts of the container at a path."""
    module: Any = model.get_submodule(path)
    count, width = module.num_experts, module.ffn_hidden_size
    gate, up, down = (
        matrix.data.view(count, width, module.hidden_size)
        for matrix in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
    )
    return DbrxExperts(
        torch.cat([gate, up], 1).mT.contiguous(),
        down,
        act_fn=module.mlp.activation_fn,
        gated=True,
        transposed=True,
        sources=tuple(_sources(start, start + width) for start in range(0, count * width, width)),
    )


def _sources(start: int, stop: int) -> tuple[Source, Source]:
    """Return where an expert stands, its rows given; those of ``w2`` are columns of its down."""
    return (
        Source((("mlp.w1", start, stop), ("mlp.v1", start, stop)), False),
        Source((("mlp.w2", start, stop),), True),
    )
