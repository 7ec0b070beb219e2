"""What a model in training is worth on held-out text or examples."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn import functional

from dmpq.batches import Batch
from dmpq.errors import InputError
from dmpq.moe import MoEModel, TextModel
from dmpq.tasks.examples import Task, TaskBatch
from dmpq.training.objective import own_experts

_LARGEST: Final = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Judgement:
    """How good a model is.

    Attributes:
        nll: Nats per predicted token, or per answer.
        accuracy: Share of them that are right.
        kl: From the teacher's distribution, nats per row; ``None`` where there is no teacher.
        metrics: Of a task, in percent.
    """

    nll: float
    accuracy: float
    kl: float | None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Per token, or per answer; infinite where it is more than a float can hold."""
        return math.exp(self.nll) if self.nll < _LARGEST else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "nll": self.nll,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            **self.metrics,
            "accuracy": self.accuracy,  # a share, where a task tells its own in percent
            "kl": self.kl,
        }


class Judge:
    """Measures models on the same batches, against one teacher.

    Args:
        batches: Held-out.
        teacher: Whose distributions the KL is to; ``None`` for no KL.
        task: Of the batches; ``None`` for text.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        teacher: MoEModel | None = None,
        task: Task | None = None,
    ) -> None:
        self._batches = batches
        self._task = task
        self._right: list[torch.Tensor] | None = None
        if teacher is not None:
            with torch.no_grad(), own_experts(teacher):
                self._right = [
                    functional.log_softmax(batch.logits(teacher), -1) for batch in batches
                ]

    def __call__(self, model: TextModel) -> Judgement:
        """Measure a model as its experts run now.

        Raises:
            InputError: If its loss is not finite.
        """
        loss, hits, kl, rows = 0.0, 0, 0.0, 0
        answers: list[Any] = []
        model.model.eval()
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                logits = batch.logits(model)
                loss += float(batch.loss(logits, reduction="sum"))
                guessed = logits.argmax(-1, keepdim=True)
                hits += int(batch.answered(guessed == batch.targets).sum())
                if self._right is not None:
                    own = functional.log_softmax(logits, -1)
                    right = self._right[number]
                    kl += float(functional.kl_div(own, right, reduction="sum", log_target=True))
                    rows += batch.rows
                if self._task is not None:
                    assert isinstance(batch, TaskBatch)
                    answers.extend(self._task.answers(model, batch, logits))
        if not math.isfinite(loss) or not math.isfinite(kl):
            raise InputError(
                f"The held-out loss is not finite (nll {loss}, KL {kl}), so that there is nothing "
                "to compare and no model was written; lower --learning-rate, or raise --warmup."
            )
        predicted = sum(batch.predicted for batch in self._batches)
        return Judgement(
            loss / predicted,
            hits / predicted,
            kl / rows if self._right is not None else None,
            {} if self._task is None else self._judged(answers),
        )

    def _judged(self, answers: Sequence[Any]) -> dict[str, float]:
        assert self._task is not None
        examples = [
            one
            for batch in self._batches
            if isinstance(batch, TaskBatch)
            for one in batch.examples
        ]
        return self._task.judge(answers, examples)
