"""Training the digits models, and the five ways to balance their experts that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from digits_data import Digits, Split
from digits_models import EXPERTS, TOP_K, SparseMoE, feed_forward
from torch import nn
from torch.nn import functional

from dmpq.training.routing import balance_loss, utilisation

Balance = Callable[[torch.Tensor], torch.Tensor]
"""From a batch's router logits (T, E) to what is added to the loss, a scalar."""

BATCH: Final = 128
LEARNING_RATE: Final = 3e-3
"""Of the first batch, falling to 0 by the last; chosen by the held-out images, with seed 0."""
ENTROPY_WEIGHT: Final = 0.1
SWITCH_WEIGHT: Final = 0.01
"""Of Switch Transformers (arXiv 2101.03961, section 2.2)."""


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Return the entropy of shares that sum to 1, in nats; ln E where all are alike."""
    return torch.special.entr(shares).sum()


def count_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of how often each expert is selected: counts, which have no gradient."""
    counts = utilisation([logits], TOP_K)[0].float()
    return entropy(counts / counts.sum())


def probability_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the router's mean probabilities over a batch, which has a gradient."""
    return entropy(logits.softmax(-1).mean(0))


BALANCES: Final[dict[str, Balance | None]] = {
    "none": None,
    "report": lambda logits: ENTROPY_WEIGHT * count_entropy(logits),
    "report's sign": lambda logits: ENTROPY_WEIGHT * probability_entropy(logits),
    "entropy rewarded": lambda logits: -ENTROPY_WEIGHT * probability_entropy(logits),
    "Switch": lambda logits: SWITCH_WEIGHT * balance_loss([logits], TOP_K),
}
"""What is added to the cross-entropy, by name."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model after training.

    Attributes:
        model: As after its best epoch on held-out images.
        epoch: That epoch, from 1.
        heldout_accuracy: After each epoch.
    """

    model: nn.Module
    epoch: int
    heldout_accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """How well a model knows some images.

    Attributes:
        accuracy: Share of right answers.
        loss: Mean cross-entropy, nats.
    """

    accuracy: float
    loss: float


def train_feed_forward(digits: Digits, *, seed: int, epochs: int) -> Trained:
    """Return a trained baseline."""
    torch.manual_seed(seed)
    model = feed_forward(digits.train.images.shape[1])

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(images), labels)

    return _train(model, loss, digits, seed=seed, epochs=epochs)


def train_moe(digits: Digits, balance: Balance | None, *, seed: int, epochs: int) -> Trained:
    """Return a trained MoE; every balance begins with the same weights and sees the same batches.

    Args:
        digits: The data.
        balance: What is added to the cross-entropy; ``None`` for nothing.
        seed: Of the weights, and of the order of images.
        epochs: At most; the best on held-out images is kept.
    """
    torch.manual_seed(seed)
    model = SparseMoE(digits.train.images.shape[1])

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        answers, logits = model.routed(images)
        right = functional.cross_entropy(answers, labels)
        return right if balance is None else right + balance(logits)

    return _train(model, loss, digits, seed=seed, epochs=epochs)


def _train(
    model: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    digits: Digits,
    *,
    seed: int,
    epochs: int,
) -> Trained:
    data, order = digits.train, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    steps = epochs * math.ceil(len(data) / BATCH)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    accuracies: list[float] = []
    best = deepcopy(model.state_dict())
    for _ in range(epochs):
        for batch in torch.randperm(len(data), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss(data.images[batch], data.labels[batch]).backward()
            optimizer.step()
            decay.step()
        accuracy = score(model, digits.heldout).accuracy
        if accuracy > max(accuracies, default=-1.0):
            best = deepcopy(model.state_dict())
        accuracies.append(accuracy)
    model.load_state_dict(best)
    return Trained(model.eval(), accuracies.index(max(accuracies)) + 1, tuple(accuracies))


@torch.no_grad()
def score(model: Callable[[torch.Tensor], torch.Tensor], split: Split) -> Score:
    """Return a model's accuracy and loss, all images in one batch."""
    answers = model(split.images)
    right = (answers.argmax(-1) == split.labels).double().mean()
    return Score(float(right), float(functional.cross_entropy(answers, split.labels)))


@torch.no_grad()
def expert_shares(model: SparseMoE, split: Split) -> list[float]:
    """Return each expert's share of the selections, E numbers that sum to 1."""
    counts = utilisation([model.routed(split.images)[1]], TOP_K)[0].double()
    return (counts / counts.sum()).tolist()


def evenness(shares: list[float]) -> float:
    """Return the entropy of shares divided by that of even ones: 1 even, 0 all on one expert."""
    return float(entropy(torch.tensor(shares, dtype=torch.float64))) / math.log(EXPERTS)


def router_gradients(model: SparseMoE, images: torch.Tensor) -> dict[str, float | None]:
    """Return the largest gradient of each balance at the router's weights, ``None`` for none.

    Args:
        model: The MoE.
        images: (T, pixels), the batch.
    """
    found: dict[str, float | None] = {}
    for name, balance in BALANCES.items():
        if balance is not None:
            added = balance(model.routed(images)[1])
            if added.requires_grad:
                (gradient,) = torch.autograd.grad(added, model.router.weight)
                found[name] = float(gradient.abs().max())
            else:
                found[name] = None
    return found


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Return by how much two models' weights differ at most."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
