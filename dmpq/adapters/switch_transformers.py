"""Switch Transformers (arXiv 2101.03961, section 2.1): one expert a token, a module per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmpq.adapters.stacked import StackedExperts, sources_apart, stack
from dmpq.experts import dispatch


class SwitchExperts(StackedExperts):
    """Feed-forward experts ``wo(act(wi(x)))`` without biases."""

    def family_forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run hidden (T, H) on one-hot selections (T, 1, E) with weights (T, 1).

        A token beyond its expert's capacity selects nobody: it is given expert 0 at weight 0.
        """
        hidden, selections, weights = inputs
        return dispatch(self, hidden, selections.argmax(-1), weights * selections.sum(-1))


def adapt(model: nn.Module, path: str) -> StackedExperts:
    """Return the experts of the container at a path."""
    children: dict[str, Any] = dict(model.get_submodule(path).named_children())
    experts = list(children.values())
    return SwitchExperts(
        stack([expert.wi.weight for expert in experts]),
        stack([expert.wo.weight for expert in experts]),
        act_fn=experts[0].act,
        gated=False,
        sources=sources_apart(children, "wi", "wo"),
    )
