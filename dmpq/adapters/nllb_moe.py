"""NLLB-MoE (arXiv 2207.04672, section 6.2): up to two experts a token, a module per expert.

The experts of transformers 5.23 read the router's mask of first choices as expert numbers, so
that every token runs on experts 0 and 1 whatever was selected. Here tokens run on the experts that
the router selects, as in the paper, in fairseq and in transformers 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts, stack
from dmpq.experts import dispatch

_CHOICES = 2


class NllbExperts(StackedExperts):
    """Feed-forward experts ``fc2(act(fc1(x)))`` with biases."""

    kept: float = 1.0
    """Share of an output that is kept, where training dropped the rest of the tokens."""

    def family_forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run hidden (T, H) by routing weights (T, E), at most two of them not 0.

        A token with one choice, or beyond an expert's capacity, has others at weight 0.
        """
        hidden, _, weights = inputs
        weights, index = weights.topk(min(_CHOICES, self.num_experts), dim=-1)
        return dispatch(self, hidden, index, weights * self.kept)


def adapt(model: nn.Module, path: str) -> StackedExperts:
    """Return the experts of the container at a path."""
    module: Any = model.get_submodule(path)
    experts = list(module.children())[: module.num_experts]
    up, down = ([getattr(expert, name) for expert in experts] for name in ("fc1", "fc2"))
    adapted = NllbExperts(
        stack([linear.weight for linear in up]),
        stack([linear.weight for linear in down]),
        act_fn=experts[0].act,
        gated=False,
        biases=(stack([linear.bias for linear in up]), stack([linear.bias for linear in down])),
    )
    adapted.kept = 1 - module.moe_token_dropout
    return adapted
