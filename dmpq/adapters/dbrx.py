"""DBRX: all experts' rows in three matrices, ``w1`` (gate), ``v1`` (up) and ``w2`` (down)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts
from dmpq.experts import dispatch


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
    gate, up, down = (
        matrix.data.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)
        for matrix in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
    )
    return DbrxExperts(
        torch.cat([gate, up], 1).mT.contiguous(),
        down,
        act_fn=module.mlp.activation_fn,
        gated=True,
        transposed=True,
    )
