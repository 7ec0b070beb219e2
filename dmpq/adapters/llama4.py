"""Llama 4: the routing weight scales an expert's input, and every expert is run on every token.

Unselected experts get zeros and return zeros; here they are not run. The block that calls them
knows the selection, so it is the block that gets another forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts


def adapt(model: nn.Module, path: str) -> StackedExperts:
    """Return the experts of the container at a path, and let its block call them by selection.

    They share their memory with the model's.
    """
    module: Any = model.get_submodule(path)
    block: Any = model.get_submodule(path.rpartition(".")[0])
    vars(block)["forward"] = MethodType(_block_forward, block)
    return StackedExperts(
        module.gate_up_proj.data,
        module.down_proj.data,
        act_fn=module.act_fn,
        gated=True,
        transposed=True,
        scales_input=True,
    )


def _block_forward(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block's routed and shared experts; returns (T, H) and the router's logits (T, E)."""
    hidden = hidden.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    weights, index = scores.topk(block.top_k, dim=1)
    return block.shared_expert(hidden) + block.experts(hidden, index, weights), logits
