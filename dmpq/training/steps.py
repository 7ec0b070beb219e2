"""What each step of a training reads: a function of the seed and the step alone.

So that resuming needs nothing but the number of steps done. Every epoch visits everything once, in
a fresh order; of a text it also cuts the windows at a fresh phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dmpq.batches import Batch, TextBatch
from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.examples import Example, Examples, Task, TaskBatch


class Steps(Protocol):
    """The batches of a training, by step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit everything once."""

    @property
    def identity(self) -> bytes:
        """What they are cut from: equal where, with the same options, all batches are."""

    def batch(self, step: int) -> Batch:
        """Return what a step reads."""


@dataclass(frozen=True, eq=False)
class TextSteps:
    """Windows of a text.

    Attributes:
        model: Reads them.
        tokens: int64 (tokens,), the whole text.
        length: Tokens per window.
        sequences: Windows per step.
        seed: Of phases and orders.

    Raises:
        InputError: If the text is too short for one step.
    """

    model: TextModel
    tokens: NDArray[np.int64]
    length: int
    sequences: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise InputError(
                f"The text to train on has {len(self.tokens):,} tokens, and a step reads "
                f"{self.sequences} windows of {self.length}; give more text, or a smaller "
                "--batch-size."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit everything once; a window's worth is lost to the phase."""
        return max(len(self.tokens) // self.length - 1, 0) // self.sequences

    @property
    def identity(self) -> bytes:
        """The text."""
        return self.tokens.tobytes()

    def batch(self, step: int) -> TextBatch:
        """Return what a step reads."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        phase = int(rng.integers(self.length))
        order = rng.permutation(self.steps_per_epoch * self.sequences)
        chosen = order[place * self.sequences : (place + 1) * self.sequences]
        starts = phase + chosen * self.length
        ids = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length)])
        ids = ids.to(self.model.model.device)
        return TextBatch(ids, self.model.read(ids))


@dataclass(frozen=True, eq=False)
class TaskSteps:
    """Examples of a task, so many per step whatever their lengths; the last of an epoch are left.

    Attributes:
        model: Reads them.
        task: Of the examples.
        examples: Encoded.
        pad: Id of the padding token.
        sequences: Examples per step.
        seed: Of the orders.

    Raises:
        InputError: If there are too few examples for one step.
    """

    model: TextModel
    task: Task
    examples: Sequence[Example]
    pad: int
    sequences: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise InputError(
                f"There are {len(self.examples)} examples to train on, and a step reads "
                f"{self.sequences}; give more, or a smaller --batch-size."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit everything once."""
        return len(self.examples) // self.sequences

    @property
    def identity(self) -> bytes:
        """The examples."""
        return Examples(self.task, tuple(self.examples), self.pad).identity()[1]

    def batch(self, step: int) -> TaskBatch:
        """Return what a step reads."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        chosen = order[place * self.sequences : (place + 1) * self.sequences]
        some = [self.examples[i] for i in chosen]
        return TaskBatch.of(self.task, some, pad=self.pad, device=self.model.model.device)


class StepData(Dataset[dict[str, Any]]):
    """The steps of a training as transformers' ``Trainer`` asks for them: one item per step.

    Args:
        steps: The batches.
        count: Steps of the training.
    """

    def __init__(self, steps: Steps, count: int) -> None:
        self._steps = steps
        self._count = count

    def __len__(self) -> int:
        """Return the steps of the training."""
        return self._count

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return what a step reads, and its number."""
        return {"batch": self._steps.batch(step), "step": step}
