"""Multiple choice as MMLU asks it (arXiv 2009.03300): the letter that a model writes next.

lm-evaluation-harness scores the same prompt so (its ``mmlu`` tasks). What is searched by is the
distribution over the letters of an example's choices.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import torch

from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.columns import named, usual
from dmpq.tasks.examples import Encoder, Example, TaskBatch
from dmpq.tasks.labels import refuse_long, text_of

LETTERS: Final = string.ascii_uppercase[:10]
"""As many choices as an example may have; MMLU-Pro has ten."""
_QUESTIONS: Final = ("question", "query", "question_stem", "ctx", "sentence")
_CHOICES: Final = ("choices", "options", "endings")
_ANSWERS: Final = ("answer", "answerKey", "label", "gold")
_NOWHERE: Final = -1e9
"""Logit of a letter that an example has no choice for: finite, so that differences stay so."""


@dataclass(frozen=True)
class MultipleChoice:
    """One letter per question; the model is a language model.

    It reads the question, a line for each choice (``A. ...``), and ``Answer:``.
    """

    encoder: Encoder

    name: ClassVar[str] = "multiple-choice"
    head: ClassVar[str] = "language modelling"
    metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Find question, choices and answer; ``--text-column question,choices``.

        Raises:
            InputError: If there are none.
        """
        if text is None:
            question = usual(
                names, _QUESTIONS, what="questions", flag="--text-column", where=where
            )
            choices = usual(names, _CHOICES, what="choices", flag="--text-column", where=where)
        else:
            given = [one.strip() for one in text.split(",")]
            if len(given) != 2:
                raise InputError(f"--text-column {text} is to name two columns: question,choices.")
            question, choices = (
                named(name, names, flag="--text-column", where=where) for name in given
            )
        answer = (
            usual(names, _ANSWERS, what="answers", flag="--label-column", where=where)
            if label is None
            else named(label, names, flag="--label-column", where=where)
        )
        return {"question": question, "choices": choices, "answer": answer}

    @cached_property
    def _letters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before every letter, and the letters' own tokens."""
        if self.encoder.start is not None:
            raise InputError(
                "--task multiple-choice asks a decoder which letter comes next, and the model is "
                "an encoder-decoder; give another task."
            )
        tokenizer = self.encoder.tokenizer
        found = [
            tuple(tokenizer(f" {one}", add_special_tokens=False, verbose=False).input_ids)
            for one in LETTERS
        ]
        before = {ids[:-1] for ids in found}
        last = tuple(ids[-1] for ids in found if ids)
        if len(before) > 1 or len({*last}) < len(LETTERS):
            raise InputError(
                f"The tokenizer has no token of its own for each of the letters {LETTERS[0]} to "
                f"{LETTERS[-1]}, by which --task multiple-choice answers; give another task."
            )
        return before.pop(), last

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return the prompt, and which of its choices is right."""
        question = text_of(row["question"])
        names, choices = _choices(row["choices"], question)
        lines = [f"{letter}. {one}" for letter, one in zip(LETTERS, choices, strict=False)]
        prompt = "\n".join([question, *lines, "Answer:"])
        tokenizer = self.encoder.tokenizer
        before, _ = self._letters
        ids = (*tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids, *before)
        refuse_long(ids, self.encoder, question)
        right = _right(row["answer"], names, choices, question)
        return Example(ids, (len(ids) - 1,), (right,), len(choices))

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return the letters' logits, (examples, letters), those of no choice far below."""
        _, letters = self._letters
        logits: torch.Tensor = output.logits[batch.at()][:, list(letters)].float()
        # A batch may be repeated: its rows are those of its examples, in turn.
        counts = torch.tensor([one.reference for one in batch.examples], device=logits.device)
        place = torch.arange(len(letters), device=logits.device)
        return logits.masked_fill(place >= counts[:, None], _NOWHERE)

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[int]:
        """Return the likeliest choice of each example."""
        del moe, batch
        return [int(found) for found in logits.argmax(-1)]

    def judge(self, answers: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
        """Return accuracy."""
        right = np.array([example.targets[0] for example in examples])
        return {"accuracy": 100 * float(np.mean(np.array(answers) == right))}


def _choices(value: Any, question: str) -> tuple[list[str], list[str]]:
    """Return names and texts of choices: of a list of texts, or of ARC's texts and labels."""
    texts, labels = value, None
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label")
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or not all(isinstance(one, str) for one in texts):
        raise InputError(
            f"The question {question[:60]!r} has the choices {str(value)[:60]}; give a list of "
            "texts, or text and label as ARC has them."
        )
    if not 2 <= len(texts) <= len(LETTERS):
        raise InputError(
            f"The question {question[:60]!r} has {len(texts)} choices; give 2 to {len(LETTERS)}."
        )
    given = list(LETTERS[: len(texts)]) if labels is None else [str(one) for one in labels]
    return given, list(texts)


def _right(answer: Any, names: Sequence[str], choices: Sequence[str], question: str) -> int:
    """Return the number of the right choice: told by its name, its text, or its number from 0."""
    told = str(answer).strip()
    for known in (names, choices):
        if told in known:
            return list(known).index(told)
    if told.isdecimal() and len(told) == 1 and int(told) < len(choices):
        return int(told)
    raise InputError(
        f"The answer {told[:60]!r} to {question[:60]!r} is none of its choices "
        f"({', '.join(names)}); give a letter, the choice's text, or its number from 0."
    )
