"""What one forward is run on, and which of its distributions are compared.

A language model is read at every token. A model with a task's head is read where the task puts its
questions (:mod:`dmpq.tasks`), and its batches are padded. An evaluator sees no difference: a batch
says which rows of logits count, what each should have said, and which tokens are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dmpq.data import Windows
from dmpq.experts import Experts
from dmpq.moe import TextModel

_PROBE_LENGTH: Final = 8


class Batch(Protocol):
    """The inputs of one forward; R rows of logits are compared."""

    @property
    def ids(self) -> torch.Tensor:
        """int64 (sequences, length), padding included."""

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""

    @property
    def rows(self) -> int:
        """R, the distributions that are compared."""

    @property
    def predicted(self) -> int:
        """Rows of which the right answer is known."""

    @property
    def targets(self) -> torch.Tensor:
        """int64 (R, 1), the right answers; a placeholder where none is known."""

    def logits(self, moe: TextModel) -> torch.Tensor:
        """Run the model and return the rows, fp32 (R, classes)."""

    def answered(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values, of (R, 1), of rows whose right answer is known."""

    def loss(self, logits: torch.Tensor, *, reduction: str) -> torch.Tensor:
        """Return the cross-entropy of rows (R, classes), nats, by torch's ``reduction``."""

    def real(self, values: torch.Tensor, experts: Experts) -> torch.Tensor:
        """Return the values, of all tokens of a layer (T, ...), that are no padding's.

        Args:
            values: Of the tokens that the experts see.
            experts: Of the layer: an encoder's see other tokens than its decoder's.
        """

    def repeat(self, copies: int) -> Batch:
        """Return the batch several times over, as one."""

    def split(self) -> Sequence[Batch]:
        """Return its sequences as batches of one."""

    def probe(self) -> Batch:
        """Return a small batch of the same kind."""


class Text(Protocol):
    """What an evaluator measures on, whole: windows of text, or a task's examples."""

    def __len__(self) -> int:
        """Return the number of windows or examples."""

    def batches(self, moe: TextModel, *, tokens: int) -> Sequence[Batch]:
        """Return fixed batches for a model, of so many tokens at most, or of one sequence."""

    def identity(self) -> tuple[str, bytes]:
        """Return its shape in words, and all that answers depend on."""


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Windows of text, read at every token: each predicts the next one.

    Attributes:
        ids: int64 (sequences, length).
        read: int64 (sequences, length as read), the tokens that logits follow
            (:meth:`dmpq.moe.TextModel.read`).
    """

    ids: torch.Tensor
    read: torch.Tensor

    @property
    def tokens(self) -> int:
        """Every token."""
        return self.ids.numel()

    @property
    def rows(self) -> int:
        """One of each token that logits follow."""
        return self.read.numel()

    @property
    def predicted(self) -> int:
        """All rows but each window's last."""
        return self.read.shape[0] * (self.read.shape[1] - 1)

    @property
    def targets(self) -> torch.Tensor:
        """The next token; of a last one, a placeholder."""
        return self.read.roll(-1, 1).reshape(-1, 1)

    def logits(self, moe: TextModel) -> torch.Tensor:
        """See :meth:`Batch.logits`."""
        return moe.logits(self.ids).flatten(0, 1)

    def answered(self, values: torch.Tensor) -> torch.Tensor:
        """See :meth:`Batch.answered`."""
        return values.view(self.read.shape)[:, :-1]

    def loss(self, logits: torch.Tensor, *, reduction: str) -> torch.Tensor:
        """See :meth:`Batch.loss`."""
        rows = logits.unflatten(0, self.read.shape)[:, :-1].flatten(0, 1)
        return functional.cross_entropy(rows, self.read[:, 1:].flatten(), reduction=reduction)

    def real(self, values: torch.Tensor, experts: Experts) -> torch.Tensor:
        """Return all: no token is padding."""
        del experts
        return values

    def repeat(self, copies: int) -> TextBatch:
        """See :meth:`Batch.repeat`."""
        return TextBatch(self.ids.repeat(copies, 1), self.read.repeat(copies, 1))

    def split(self) -> Sequence[TextBatch]:
        """See :meth:`Batch.split`."""
        return [
            TextBatch(*pair) for pair in zip(self.ids.split(1), self.read.split(1), strict=True)
        ]

    def probe(self) -> TextBatch:
        """See :meth:`Batch.probe`."""
        return TextBatch(self.ids[:1, :_PROBE_LENGTH], self.read[:1, :_PROBE_LENGTH])


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Windows of token ids, int64 (windows, length)."""

    windows: Windows

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, moe: TextModel, *, tokens: int) -> Sequence[TextBatch]:
        """See :meth:`Text.batches`."""
        rows = max(1, tokens // self.windows.shape[1])
        every = torch.from_numpy(self.windows).to(moe.model.device)
        return [TextBatch(ids, moe.read(ids)) for ids in every.split(rows)]

    def identity(self) -> tuple[str, bytes]:
        """See :meth:`Text.identity`."""
        return str(self.windows.shape), np.ascontiguousarray(self.windows).tobytes()


def as_text(windows: NDArray[np.int64] | Text) -> Text:
    """Return what an evaluator measures on: windows of token ids, or what is a text already."""
    return TextWindows(windows) if isinstance(windows, np.ndarray) else windows
