"""NLLB-MoE (arXiv 2207.04672, section 6.2): up to two experts a token, a module per expert.

The experts of transformers 5.23 read the router's mask of first choices as expert numbers, so
that every token runs on experts 0 and 1 whatever was selected. Here tokens run on the experts that
the router selects, as in the paper, in fairseq and in transformers 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts, sources_apart, stack
from dmpq.experts import dispatch

_CHOICES: Final = 2


class NllbExperts(StackedExperts):
    """Feed-forward experts ``fc2(act(fc1(x)))`` with biases.

    Biases are read from the model's own modules at each forward: they are few, and stay there when
    the matrices are packed.
    """

    has_bias = True
    kept: float = 1.0
    """Share of an output that is kept, where training dropped the rest of the tokens."""
    modules_apart: Sequence[Any] = ()
    """The model's own experts."""

    @property
    def up_proj_bias(self) -> torch.Tensor:
        """(E, width)."""
        return torch.stack([expert.fc1.bias for expert in self.modules_apart])

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """(E, hidden)."""
        return torch.stack([expert.fc2.bias for expert in self.modules_apart])

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
    children = dict(list(module.named_children())[: module.num_experts])
    experts: list[Any] = list(children.values())
    adapted = NllbExperts(
        stack([expert.fc1.weight for expert in experts]),
        stack([expert.fc2.weight for expert in experts]),
        act_fn=experts[0].act,
        gated=False,
        sources=sources_apart(children, "fc1", "fc2"),
    )
    adapted.modules_apart = experts
    adapted.kept = 1 - module.moe_token_dropout
    return adapted
