"""Pruned experts: what a token gets of a layer some of whose experts are left out.

The router stays as it is. A token that selects a pruned expert gets nothing from it, and the
weights of the selected experts that remain are scaled up, so that their sum is what it was; a
token all of whose experts are pruned gets nothing from the routed experts. Masking the router
before its top-k, as in a checkpoint that lacks the experts (SEER-MoE, arXiv 2404.05089), would
select the next expert instead: another choice, which changes what the router says.
"""

from __future__ import annotations

import torch


def renormalised(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return routing weights with those of pruned experts moved to the ones that remain.

    Rows without a pruned expert keep their bits.

    Args:
        weights: (T, K), of the experts that each token selects, not negative.
        kept: bool (T, K), which of them remain.

    Returns:
        (T, K), of the dtype of ``weights``; zeros for pruned experts.
    """
    remaining = weights.masked_fill(~kept, 0.0)
    whole, rest = (w.sum(-1, keepdim=True, dtype=torch.float32) for w in (weights, remaining))
    # Where nothing remains, a division by zero would make NaN of the gradient.
    divisor = torch.where(rest > 0, rest, 1.0)
    moved = (remaining / divisor * whole).to(weights.dtype)
    return torch.where(kept.all(-1, keepdim=True), weights, moved)


def pruning_error(
    output: torch.Tensor, own: torch.Tensor, share: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Return how a layer's routed output changes when one expert is pruned, (T, H).

    Args:
        output: (T, H), the routed output of the tokens that select the expert.
        own: (T, H), what the expert adds to it, routing weight included.
        share: (T,), the expert's routing weight.
        others: (T,), the summed routing weights of the tokens' other experts.
    """
    grown = torch.where(others > 0, share / others, 0.0)
    return grown[:, None] * (output - own) - own
