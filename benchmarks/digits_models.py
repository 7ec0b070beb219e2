"""The two models of the digits report: a feed-forward network, and a sparse Mixture of Experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from digits_data import CLASSES
from torch import nn
from torch.nn import functional

HIDDEN: Final = 256
INNER: Final = 128
EXPERTS: Final = 10
TOP_K: Final = 2

Dispatch = Callable[["Experts", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""How tokens go through their experts: hidden (T, 256), chosen experts (T, k) and their weights
(T, k) to the weighted sums (T, 128)."""


def feed_forward(pixels: int) -> nn.Sequential:
    """Return the baseline, pixels-256-128-10 with ReLU: 235,146 parameters at 784 pixels."""
    return nn.Sequential(
        nn.Linear(pixels, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, INNER),
        nn.ReLU(),
        nn.Linear(INNER, CLASSES),
    )


class Experts(nn.Module):
    """Ten networks 256-128-128 with a ReLU between, as 3-D parameters.

    Attributes:
        up: fp32 (E, 128, 256), and ``up_bias`` (E, 128).
        down: fp32 (E, 128, 128), and ``down_bias`` (E, 128).
        numbers: int64 (E,), 0, 1 and so on; no weight, and in no file.
    """

    numbers: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = _uniform((EXPERTS, INNER, HIDDEN), HIDDEN)
        self.up_bias = _uniform((EXPERTS, INNER), HIDDEN)
        self.down = _uniform((EXPERTS, INNER, INNER), INNER)
        self.down_bias = _uniform((EXPERTS, INNER), INNER)
        self.register_buffer("numbers", torch.arange(EXPERTS), persistent=False)

    def one(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what one expert makes of rows (R, 256): (R, 128)."""
        inner = functional.linear(rows, self.up[expert], self.up_bias[expert]).relu()
        return functional.linear(inner, self.down[expert], self.down_bias[expert])


class SparseMoE(nn.Module):
    """Pixels-256, then the top 2 of 10 experts 256-128-128, then 128-10.

    The router is a softmax over 10 learned logits of the 256; the weights of the selected two are
    divided by their sum. At 784 pixels there are 698,900 parameters, 2.796 MB in fp32, where the
    report's file has 2.788 MB; an image passes 302,848 multiplications with weights, 1.29 times
    the baseline's.

    Args:
        pixels: Of an image.
        dispatch: How tokens go through experts.
    """

    def __init__(self, pixels: int, dispatch: Dispatch | None = None) -> None:
        super().__init__()
        self.input = nn.Linear(pixels, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Experts()
        self.head = nn.Linear(INNER, CLASSES)
        self.dispatch = dispatch or grouped

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class logits (T, 10) of images (T, pixels)."""
        return self.routed(images)[0]

    def routed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class logits (T, 10), and the router's logits (T, 10)."""
        hidden = self.input(images).relu()
        logits = self.router(hidden)
        best, chosen = logits.topk(TOP_K, dim=-1)
        # The softmax over the selected logits is the softmax over all divided by the selected sum.
        mixed = self.dispatch(self.experts, hidden, chosen, best.softmax(-1))
        return self.head(mixed.relu()), logits


def multiplications(model: nn.Module) -> int:
    """Return an image's products with weights: of the selected experts only."""
    if isinstance(model, SparseMoE):
        dense = sum(one.weight.numel() for one in (model.input, model.router, model.head))
        return dense + TOP_K * (model.experts.up[0].numel() + model.experts.down[0].numel())
    return sum(one.numel() for one in model.parameters() if one.dim() > 1)


def grouped(
    experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Vectorised: tokens sorted by expert, one grouped product per matrix, no Python loop."""
    flat = chosen.flatten()
    expert, order = flat.sort(stable=True)
    token = order // chosen.shape[1]
    ends = torch.searchsorted(expert, experts.numbers, right=True, out_int32=True)
    rows = functional.grouped_mm(hidden[token], experts.up.mT, offs=ends)
    rows = (rows + experts.up_bias[expert]).relu()
    rows = functional.grouped_mm(rows, experts.down.mT, offs=ends) + experts.down_bias[expert]
    rows = rows * weights.flatten()[order, None]
    return rows.new_zeros(len(hidden), rows.shape[1]).index_add(0, token, rows)


def by_expert(
    experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Loop over experts in Python, each on all of its tokens at once."""
    mixed = hidden.new_zeros(len(hidden), INNER)
    for expert in range(EXPERTS):
        token, slot = torch.where(chosen == expert)
        if len(token):
            rows = experts.one(expert, hidden[token]) * weights[token, slot, None]
            mixed = mixed.index_add(0, token, rows)
    return mixed


def by_token(
    experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Loop over tokens and their experts in Python, as the report: slow, obvious, the oracle."""
    mixed = []
    for token, picked in enumerate(chosen.tolist()):
        row = hidden[token : token + 1]
        parts = [weights[token, i] * experts.one(e, row) for i, e in enumerate(picked)]
        mixed.append(torch.stack(parts).sum(0))
    return torch.cat(mixed)


def _uniform(shape: tuple[int, ...], inputs: int) -> nn.Parameter:
    """Return weights drawn as nn.Linear draws them."""
    bound = inputs**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
