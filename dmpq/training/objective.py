"""What a training makes small: the task's loss, a teacher's logits, balanced routers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dmpq.batches import Batch
from dmpq.experts import run_stacked
from dmpq.moe import MoEModel, TextModel
from dmpq.training.routing import Routers, balance_loss, z_loss


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The weights of the terms; a term of weight 0 is not computed.

    Attributes:
        labels: Of the cross-entropy with the right answers, nats.
        distillation: Of the KL from the teacher's distribution to the model's, nats (Hinton et
            al., arXiv 1503.02531, at temperature 1).
        balance: Of Switch's load-balancing loss (arXiv 2101.03961), 1 when balanced.
        z: Of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5).
        routers: Of the mean squared error of router logits to the teacher's, on the experts that
            the teacher ranks highest, twice as many as it selects (EAC-MoE, arXiv 2508.01625,
            which takes 8 of 16 and 20 of 64).
    """

    labels: float = 1.0
    distillation: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    routers: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a full-precision model is run beside."""
        return self.distillation > 0 or self.routers > 0

    @property
    def needs_routers(self) -> bool:
        """Whether router logits are read."""
        return self.balance > 0 or self.z > 0 or self.routers > 0


class Objective:
    """The loss of a batch.

    Args:
        model: In training.
        terms: The weights.
        teacher: Full precision, frozen; needed where a term asks for it.
    """

    def __init__(
        self, model: TextModel, terms: LossTerms, *, teacher: MoEModel | None = None
    ) -> None:
        self.model = model
        self.terms = terms
        self._teacher = teacher
        self._routers = Routers(model.model) if terms.needs_routers else None
        self._teachers = Routers(teacher.model) if teacher and terms.routers else None
        self._top_k = _top_ks(model)
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, a scalar in nats."""
        with ExitStack() as watching:
            logged: list[torch.Tensor] = []
            if self._routers is not None:
                logged = watching.enter_context(self._routers.recording())
            logits = batch.logits(self.model)
        parts: dict[str, torch.Tensor] = {}
        if self.terms.labels:
            parts["labels"] = batch.loss(logits, reduction="mean")
        if self.terms.needs_teacher:
            parts |= self._taught(batch, logits, logged)
        if self.terms.balance:
            parts["balance"] = balance_loss(logged, self._top_k, mask=self._masks(batch))
        if self.terms.z:
            parts["z"] = z_loss(logged, mask=self._masks(batch))
        for name, value in parts.items():
            self._sums[name] += float(value.detach())
        self._count += 1
        total = [getattr(self.terms, name) * value for name, value in parts.items()]
        return torch.stack(total).sum()

    def means(self) -> dict[str, float]:
        """Return the mean of each term since the last call, unweighted, and begin anew."""
        found = {name: value / max(self._count, 1) for name, value in self._sums.items()}
        self._sums, self._count = defaultdict(float), 0
        return found

    def _taught(
        self, batch: Batch, logits: torch.Tensor, logged: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert self._teacher is not None
        with torch.no_grad(), own_experts(self._teacher), ExitStack() as watching:
            theirs: list[torch.Tensor] = []
            if self._teachers is not None:
                theirs = watching.enter_context(self._teachers.recording())
            right = functional.log_softmax(batch.logits(self._teacher), -1)
        parts: dict[str, torch.Tensor] = {}
        if self.terms.distillation:
            own = functional.log_softmax(logits, -1)
            parts["distillation"] = functional.kl_div(
                own, right, reduction="batchmean", log_target=True
            )
        if self.terms.routers:
            pairs = zip(logged, theirs, strict=True)
            errors = [_ranked_error(mine, other, self._top_k) for mine, other in pairs]
            parts["routers"] = torch.stack(errors).mean()
        return parts

    def _masks(self, batch: Batch) -> Sequence[torch.Tensor]:
        """Return which tokens of each layer are no padding."""
        ones = torch.ones(batch.ids.shape, dtype=torch.bool, device=batch.ids.device).flatten()
        marked = getattr(batch, "mask", None)
        if marked is not None:
            ones = marked.flatten() == 1
        assert self._routers is not None
        return [ones] * len(self._routers.paths)


def _ranked_error(mine: torch.Tensor, other: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the mean squared error on the experts that the teacher ranks highest."""
    ranked = other.topk(min(2 * top_k, other.shape[-1])).indices
    return functional.mse_loss(mine.gather(1, ranked), other.gather(1, ranked))


def _top_ks(model: TextModel) -> int:
    """Return how many experts a token selects; 1 for a model without any."""
    return model.spec.moe_layers[0].top_k if isinstance(model, MoEModel) else 1


@contextmanager
def own_experts(model: TextModel) -> Iterator[None]:
    """Run a model's experts in full precision while the block lasts; of a dense one, nothing."""
    if not isinstance(model, MoEModel):
        yield
        return

    def forward(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return run_stacked(module, *inputs)

    with model.experts_forward([forward] * len(model.containers)):
        yield
