"""What the tokens that select an expert say of it: sums from which a profile is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.experts import Experts, run_stacked
from dmpq.formats import Menu
from dmpq.pruning import pruning_error

STATISTICS: Final = ("weight_norm", "kurtosis", "outlier_ratio", "max_row_variance")
"""What :func:`weight_statistics` returns, by the names of a profile."""


_KEPT: Final = ("hits", "routing_weight", "contribution", "output_error", "proxy")


class Variants(Protocol):
    """One layer's experts in every format; :class:`dmpq.bank.LayerBank` is such."""

    @property
    def experts(self) -> Experts:
        """The layer's container."""

    @property
    def menu(self) -> Menu:
        """Formats on offer."""

    def variant(self, expert: int, fmt: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's matrices in a format; ``None`` for the checkpoint's own."""


@dataclass(frozen=True)
class Seen:
    """What the t tokens that select an expert saw in one forward and backward pass.

    Attributes:
        hidden: (t, H), what the expert reads.
        weight: (t,), its routing weight.
        others: (t,), the summed routing weights of the tokens' other experts.
        output: (t, H), what the layer's routed experts give together.
        slope: (t, H), gradient of the loss with respect to that.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    others: torch.Tensor
    output: torch.Tensor
    slope: torch.Tensor


@dataclass
class ExpertSums:
    """Sums over tokens, (N,) or (N, B)."""

    hits: NDArray[np.int64]
    routing_weight: NDArray[np.float64]
    contribution: NDArray[np.float64]
    output_error: NDArray[np.float64]
    proxy: NDArray[np.float64]
    side_proxy: NDArray[np.float64] | None
    nll: float = 0.0
    predicted: int = 0
    tokens: int = 0

    @classmethod
    def zeros(cls, experts: int, formats: int, *, apart: bool) -> ExpertSums:
        """Return sums over no token.

        Args:
            experts: N.
            formats: B.
            apart: Whether errors of gate+up alone and of down alone are wanted too.
        """
        return cls(
            hits=np.zeros(experts, np.int64),
            routing_weight=np.zeros(experts),
            contribution=np.zeros(experts),
            output_error=np.zeros((experts, formats)),
            proxy=np.zeros((experts, formats)),
            side_proxy=np.zeros((experts, 2, formats)) if apart else None,
        )

    def rows(self, own: slice) -> dict[str, NDArray[Any]]:
        """Return some experts' sums by name; gate+up and down apart are not among them."""
        return {name: getattr(self, name)[own] for name in _KEPT}

    def set_rows(self, own: slice, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Set some experts' sums to what :meth:`rows` returned."""
        for name in _KEPT:
            getattr(self, name)[own] = arrays[name]

    def add(self, row: int, layer: Variants, expert: int, seen: Seen) -> None:
        """Add what some tokens say of one expert.

        Args:
            row: Of the expert in all layers.
            layer: Its layer.
            expert: Its index there.
            seen: Of the tokens that select it.
        """
        hidden, weight, slope = seen.hidden, seen.weight, seen.slope
        self.hits[row] += len(hidden)
        if not len(hidden):
            return
        self.routing_weight[row] += float(weight.double().sum())
        magnitude = (slope * weight[:, None]).abs().mean(-1)
        self.contribution[row] += float(magnitude.double().sum())
        full = layer.variant(expert, None)
        exact = _one_expert(layer, expert, full, hidden, weight)
        for fmt, found in enumerate(layer.menu.formats):
            if found.is_full:
                continue
            up, down = layer.variant(expert, fmt)
            if found.is_pruned:
                error = pruning_error(seen.output, exact, weight, seen.others)
            else:
                error = _one_expert(layer, expert, (up, down), hidden, weight) - exact
            self.output_error[row, fmt] += float(error.square().sum(dtype=torch.float64))
            self.proxy[row, fmt] += _damage(error, slope)
            if self.side_proxy is not None:
                for side, pair in enumerate(((up, full[1]), (full[0], down))):
                    error = _one_expert(layer, expert, pair, hidden, weight) - exact
                    self.side_proxy[row, side, fmt] += _damage(error, slope)


def _damage(error: torch.Tensor, slope: torch.Tensor) -> float:
    """Return the summed squared product of output errors and loss gradients, both (T, H)."""
    return float((error * slope).square().sum(dtype=torch.float64))


def _one_expert(
    layer: Variants,
    expert: int,
    matrices: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return one expert's weighted output, (T, H), with such gate+up and down weights."""
    up, down = matrices
    view = layer.experts.stacked(up[None], down[None], only=expert)
    index = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    return run_stacked(view, hidden, index, weight[:, None])


def weight_statistics(up: torch.Tensor, down: torch.Tensor) -> tuple[float, float, float, float]:
    """Return an expert's weight norm, excess kurtosis, outlier ratio and largest row variance.

    Args:
        up: (out, in), gate and up.
        down: (out, in).
    """
    # In 64 bits an expert is large: one copy of it, and one more, at a time.
    outlier = max(_outlier_ratio(matrix) for matrix in (up, down))
    row_variance = up.double().var(dim=1, unbiased=False).max()
    flat = torch.cat([up.double().flatten(), down.double().flatten()])
    norm = float(flat.norm())
    centred = flat.sub_(flat.mean())
    variance = centred.square().mean()
    # An expert of zeros, pruned before it came here, has neither tails nor outliers.
    kurtosis = centred.pow_(4).mean() / variance.square() - 3 if variance > 0 else 0.0
    return norm, float(kurtosis), outlier, float(row_variance)


def _outlier_ratio(matrix: torch.Tensor) -> float:
    sizes = matrix.abs().double()
    return float(sizes.max() / sizes.mean()) if sizes.any() else 1.0
