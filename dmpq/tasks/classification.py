"""Classification of texts, or of pairs of texts, as in GLUE: accuracy and F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch

from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.columns import named, pair, usual
from dmpq.tasks.examples import Encoder, Example, TaskBatch
from dmpq.tasks.labels import class_of, refuse_long, text_of

_TEXTS: Final = ("sentence", "text", "content", "review")
_PAIRS: Final = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
_LABELS: Final = ("label", "labels", "class", "target", "sentiment")


@dataclass(frozen=True)
class Classification:
    """One class per text; the model is one for sequence classification."""

    encoder: Encoder

    name: ClassVar[str] = "classification"
    head: ClassVar[str] = "sequence classification"
    metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Find text, a second text if there is one, and label; ``--text-column a,b`` for a pair.

        Raises:
            InputError: If there are none.
        """
        if text is not None:
            given = [
                named(name.strip(), names, flag="--text-column", where=where)
                for name in text.split(",")
            ]
            if len(given) > 2:
                raise InputError(f"--text-column {text} names {len(given)} columns; give 1 or 2.")
            texts: Sequence[str] = given
        else:
            both = pair(names, _PAIRS)
            texts = both or [usual(names, _TEXTS, what="text", flag="--text-column", where=where)]
        found = dict(zip(("text", "second"), texts, strict=False))
        found["label"] = (
            usual(names, _LABELS, what="labels", flag="--label-column", where=where)
            if label is None
            else named(label, names, flag="--label-column", where=where)
        )
        return found

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return one text, or pair, and its class."""
        texts = [text_of(row[name]) for name in ("text", "second") if name in row]
        ids = self.encoder.tokenizer(*texts, verbose=False).input_ids
        refuse_long(ids, self.encoder, texts[0])
        label = class_of(row["label"], self.encoder)
        return Example(tuple(ids), (), (label,), self.encoder.classes)

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return the class logits, (examples, classes)."""
        del batch
        logits: torch.Tensor = output.logits
        return logits

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[int]:
        """Return the likeliest class of each example."""
        del moe, batch
        return [int(found) for found in logits.argmax(-1)]

    def judge(self, answers: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
        """Return accuracy and F1: class 1's of two classes, as in GLUE, else the classes' mean.

        A class that is neither right nor answered anywhere has no part in the mean.
        """
        found = np.array(answers)
        right = np.array([example.targets[0] for example in examples])
        classes = examples[0].reference
        scores = []
        for one in [1] if classes == 2 else range(classes):
            hits = np.sum((found == one) & (right == one))
            either = np.sum(found == one) + np.sum(right == one)
            if either or classes == 2:
                scores.append(2 * hits / max(either, 1))
        return {
            "accuracy": 100 * float(np.mean(found == right)),
            "f1": 100 * float(np.mean(scores)),
        }
