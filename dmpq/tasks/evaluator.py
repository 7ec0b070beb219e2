"""Bit maps on a task's examples: the metrics of a map, and their drop as a search signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.bank import Bank
from dmpq.errors import InputError
from dmpq.evaluation import FAILURE_NATS, Assignments
from dmpq.files import JsonLines
from dmpq.model_evaluator import ModelEvaluator
from dmpq.profile import Profile
from dmpq.tasks.examples import Examples, TaskBatch

_PERCENT: Final = 100.0


class TaskEvaluator(ModelEvaluator):
    """Measures bit maps on a task's examples: KL of the head's distributions, and metrics.

    Args:
        bank: The model's variants.
        examples: What is measured on.
        label: Names the examples in the journal.
        journal: Where answers are kept and looked up.
    """

    def __init__(
        self, bank: Bank, examples: Examples, *, label: str, journal: JsonLines | None = None
    ) -> None:
        super().__init__(bank, examples, label=label, journal=journal)
        self.task = examples.task

    @property
    def task_batches(self) -> Sequence[TaskBatch]:
        """The batches, as the task's own."""
        batches: Any = self.batches
        return batches  # type: ignore[no-any-return]

    def metrics(self, assignments: Assignments) -> list[dict[str, float]]:
        """Return the metrics of each map, in percent.

        A judgement, not a signal of any search: neither kept nor counted.
        """
        found = []
        with torch.inference_mode(), self.bank.attached():
            for formats in self._formats(assignments):
                self.bank.choose(formats[None])
                found.append(self._judged(self._answered()))
        return found

    @cached_property
    def _full_answers(self) -> list[list[Any]]:
        """What the full-precision model answers, by batch."""
        with torch.inference_mode(), self._own_forward():
            return self._answered()

    def full_metrics(self) -> dict[str, float]:
        """Return the metrics of the full-precision model, in percent."""
        return self._judged(self._full_answers)

    def _answered(self) -> list[list[Any]]:
        moe = self.bank.moe
        return [self.task.answers(moe, batch, batch.logits(moe)) for batch in self.task_batches]

    def _judged(self, answers: Sequence[list[Any]]) -> dict[str, float]:
        """Return the metrics of the answers to the first so many batches."""
        examples = [
            example
            for batch, _ in zip(self.task_batches, answers, strict=False)
            for example in batch.examples
        ]
        return self.task.judge([one for some in answers for one in some], examples)


class MetricEvaluator(TaskEvaluator):
    """Measures what the task's metric loses, in place of the KL, as a share of 1.

    It moves in steps of one example and may fall below 0, so that it needs more examples than the
    KL to tell maps apart. Screening, which only ranks maps, is by the KL.
    """

    name = "task metric"

    def __init__(
        self, bank: Bank, examples: Examples, *, label: str, journal: JsonLines | None = None
    ) -> None:
        metric = examples.task.metric
        super().__init__(bank, examples, label=f"{label} {metric} drop", journal=journal)
        self._answers: list[list[Any]] = []

    def _compared(self, logits: torch.Tensor, batch: Any) -> tuple[float, float]:
        inputs: TaskBatch = batch.inputs
        self._answers.append(self.task.answers(self.bank.moe, inputs, logits))
        return super()._compared(logits, batch)

    def _measure(self, *arguments: Any) -> tuple[float, float, float]:
        self._answers = []
        kl, nll, shift = super()._measure(*arguments)
        if not self._answers:  # full precision itself: nothing ran
            return 0.0, nll, shift
        if kl >= FAILURE_NATS:
            return kl, nll, shift
        full = self._judged(self._full_answers[: len(self._answers)])
        own = self._judged(self._answers)
        return (full[self.task.metric] - own[self.task.metric]) / _PERCENT, nll, shift

    def in_its_unit(self, profile: Profile) -> Profile:
        """Return a profile whose damages are drops of the metric.

        Sensitivities were measured as KL, which tells single experts apart, and are scaled such
        that the narrowest uniform map's KL becomes its drop.

        Args:
            profile: Measured as KL.

        Raises:
            InputError: If the narrowest uniform map loses nothing.
        """
        menu, experts = profile.menu, profile.spec.num_experts
        uniform = np.arange(len(menu))[:, None].repeat(experts, 1)
        drops: NDArray[np.float64] = self.evaluate(uniform).kl
        narrowest = menu.narrowest
        if not drops[narrowest] > 0 or not profile.uniform_kl[narrowest] > 0:
            raise InputError(
                f"The {self.task.metric} does not fall on the search's examples even where every "
                f"expert has {menu.keys[narrowest]} bits, so it cannot tell maps apart; leave "
                "--signal task out, or give more --search-tokens."
            )
        scale = drops[narrowest] / profile.uniform_kl[narrowest]
        apart = profile.projection_sensitivity
        return replace(
            profile,
            sensitivity=profile.sensitivity * scale,
            projection_sensitivity=None if apart is None else apart * scale,
            uniform_kl=drops,
        )
