"""A task's examples as an evaluator reads them: encoded, padded, and in fixed batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional

from dmpq.experts import Experts
from dmpq.moe import TextModel


@dataclass(frozen=True)
class Example:
    """One example, encoded.

    Attributes:
        ids: Token ids, without padding.
        at: Positions that matter: where labels are read, or where a span may lie; empty where
            the head gives one row for the whole example.
        targets: The right answer of each row.
        reference: What the metrics compare with, as JSON can hold it.
        decoder: Token ids that an encoder-decoder's decoder reads, where ``at`` then points; the
            encoder reads ``ids``. Empty for other models.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[int, ...]
    reference: Any
    decoder: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that a model reads."""
        return len(self.ids) + len(self.decoder)


@dataclass(frozen=True)
class Encoder:
    """What encoding needs of a model.

    Attributes:
        tokenizer: A fast Hugging Face tokenizer.
        labels: Name → class of the model's head.
        classes: Number of classes.
        longest: Tokens that an example may have; of an encoder-decoder, on each side.
        start: Token by which the decoder of an encoder-decoder starts; ``None`` for other models.
        forced: Tokens that its texts are made to begin with, as the language to translate into.
    """

    tokenizer: Any
    labels: Mapping[str, int]
    classes: int
    longest: int
    start: int | None = None
    forced: tuple[int, ...] = ()


class Task(Protocol):
    """What is asked of a model, how a row of data is put to it, and how answers are judged."""

    @property
    def encoder(self) -> Encoder:
        """What encoding needs of the model."""

    name: ClassVar[str]
    """As ``--task`` spells it."""
    head: ClassVar[str]
    """Of which kind the model is: a key of :data:`dmpq.moe.HEADS`."""
    metric: ClassVar[str]
    """The metric whose drop ``--signal task`` searches by."""
    metrics: ClassVar[tuple[str, ...]]
    """What is reported, each in percent."""

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Return which column of a table serves which purpose."""

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return one row of data, its values by purpose, as the model reads it."""

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return the rows of a model's output that are compared, (R, classes)."""

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[Any]:
        """Return what the model answers to each example, given its rows."""

    def judge(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Return the metrics of answers, by name, in percent."""


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Examples padded on the right to one length, with what is compared.

    Attributes:
        task: Which rows are read, and how.
        examples: In the order of the batch.
        ids: int64 (sequences, length).
        mask: int64 (sequences, length), 0 where padding is.
        targets: int64 (R, 1).
        decoder: Ids and mask, int64 (sequences, length) each, that the decoder of an
            encoder-decoder reads; ``None`` for other models.
    """

    task: Task
    examples: tuple[Example, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    decoder: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(
        cls, task: Task, examples: Sequence[Example], *, pad: int, device: torch.device
    ) -> TaskBatch:
        """Return examples as one batch.

        Args:
            task: Of the examples.
            examples: One or more.
            pad: Id of the padding token.
            device: Where the model is.
        """
        ids, mask = _padded([example.ids for example in examples], pad, device)
        read = [example.decoder for example in examples if example.decoder]
        targets = [target for example in examples for target in example.targets]
        right = torch.tensor(targets, dtype=torch.int64)[:, None]
        return cls(
            task,
            tuple(examples),
            ids,
            mask,
            right.to(device),
            _padded(read, pad, device) if read else None,
        )

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(example.tokens for example in self.examples)

    @property
    def rows(self) -> int:
        """One of each answer."""
        return len(self.targets)

    @property
    def predicted(self) -> int:
        """All: every example has its right answers."""
        return len(self.targets)

    def logits(self, moe: TextModel) -> torch.Tensor:
        """See :meth:`dmpq.batches.Batch.logits`."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        if self.decoder is not None:
            inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = self.decoder
        output = moe.model(**inputs, use_cache=False)
        return self.task.rows(output, self).float()

    def answered(self, values: torch.Tensor) -> torch.Tensor:
        """Return all: every row has a right answer."""
        return values

    def loss(self, logits: torch.Tensor, *, reduction: str) -> torch.Tensor:
        """See :meth:`dmpq.batches.Batch.loss`."""
        return functional.cross_entropy(logits, self.targets[:, 0], reduction=reduction)

    def real(self, values: torch.Tensor, experts: Experts) -> torch.Tensor:
        """See :meth:`dmpq.batches.Batch.real`."""
        mask = self.mask if self.decoder is None or not experts.decodes else self.decoder[1]
        return values[mask.flatten() == 1]

    def at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sequence and position of all that matters, each (R,)."""
        pairs = [(row, at) for row, one in enumerate(self.examples) for at in one.at]
        rows, places = torch.tensor(pairs, device=self.ids.device).T
        return rows, places

    def repeat(self, copies: int) -> TaskBatch:
        """See :meth:`dmpq.batches.Batch.repeat`."""
        read = self.decoder
        return TaskBatch(
            self.task,
            self.examples * copies,
            self.ids.repeat(copies, 1),
            self.mask.repeat(copies, 1),
            self.targets.repeat(copies, 1),
            None if read is None else (read[0].repeat(copies, 1), read[1].repeat(copies, 1)),
        )

    def split(self) -> Sequence[TaskBatch]:
        """See :meth:`dmpq.batches.Batch.split`."""
        device = self.ids.device
        return [TaskBatch.of(self.task, [one], pad=0, device=device) for one in self.examples]

    def probe(self) -> TaskBatch:
        """See :meth:`dmpq.batches.Batch.probe`."""
        return self.split()[0]


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded examples of one task: what an evaluator measures on.

    Attributes:
        task: Of the examples.
        examples: Encoded.
        pad: Id of the padding token.
    """

    task: Task
    examples: tuple[Example, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(example.tokens for example in self.examples)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of examples, and tokens of the longest."""
        return len(self.examples), max((one.tokens for one in self.examples), default=0)

    def batches(self, moe: TextModel, *, tokens: int) -> Sequence[TaskBatch]:
        """Return fixed batches of examples of like length, in random order.

        Like lengths need little padding, and by the random order the first batches, which are all
        that a lower fidelity reads, are no short ones.
        """
        groups: list[list[Example]] = []
        for example in sorted(self.examples, key=lambda one: one.tokens):
            if not groups or padded_tokens([*groups[-1], example]) > tokens:
                groups.append([])
            groups[-1].append(example)
        order = np.random.default_rng(0).permutation(len(groups))
        device = moe.model.device
        return [
            TaskBatch.of(self.task, groups[i], pad=self.pad, device=device) for i in order.tolist()
        ]

    def identity(self) -> tuple[str, bytes]:
        """See :meth:`dmpq.batches.Text.identity`."""
        content = [
            (one.ids, one.at, one.targets, one.reference, *([one.decoder] if one.decoder else []))
            for one in self.examples
        ]
        return f"{self.task.name}{len(self)}", json.dumps(content).encode()


def padded_tokens(examples: Sequence[Example]) -> int:
    """Return the tokens of examples as one batch, padding included."""
    longest = max(len(one.ids) for one in examples) + max(len(one.decoder) for one in examples)
    return len(examples) * longest


def _padded(
    rows: Sequence[tuple[int, ...]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, padded on the right, and mask, int64 (rows, length)."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, known in enumerate(rows):
        ids[row, : len(known)] = torch.tensor(known)
        mask[row, : len(known)] = 1
    return ids.to(device), mask.to(device)
