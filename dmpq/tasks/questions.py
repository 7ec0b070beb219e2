"""Extractive question answering by SQuAD's rules (arXiv 1606.05250): exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.columns import named, usual
from dmpq.tasks.examples import Encoder, Example, TaskBatch
from dmpq.tasks.labels import refuse_long, text_of

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_LONGEST_ANSWER: Final = 30
"""Tokens; as in transformers' and BERT's own question answering."""
_NOWHERE: Final = -1e9
"""Logit of a place where no answer can be: finite, so that differences of logits stay so."""


@dataclass(frozen=True)
class QuestionAnswering:
    """The span of a context that answers a question: one distribution over starts, one over ends.

    The model reads the question first, then the context.
    """

    encoder: Encoder

    name: ClassVar[str] = "question-answering"
    head: ClassVar[str] = "question answering"
    metric: ClassVar[str] = "f1"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Find question, context and answers; ``--text-column question,context``.

        Raises:
            InputError: If there are none.
        """
        given = ["question", "context"] if text is None else [t.strip() for t in text.split(",")]
        if len(given) != 2:
            raise InputError(f"--text-column {text} is to name two columns: question,context.")
        question, context = (
            named(name, names, flag="--text-column", where=where) for name in given
        )
        answers = (
            usual(names, ("answers", "answer"), what="answers", flag="--label-column", where=where)
            if label is None
            else named(label, names, flag="--label-column", where=where)
        )
        return {"question": question, "context": context, "answers": answers}

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return question and context, with the tokens of the first answer."""
        question, context = text_of(row["question"]), text_of(row["context"])
        texts, starts = _answers(row["answers"], question)
        encoded = self.encoder.tokenizer(
            question, context, return_offsets_mapping=True, verbose=False
        )
        refuse_long(encoded.input_ids, self.encoder, question)
        spans = encoded["offset_mapping"]
        places = [at for at, part in enumerate(encoded.sequence_ids()) if part == 1]
        start, end = starts[0], starts[0] + len(texts[0])
        if context[start:end] != texts[0]:
            raise InputError(
                f"The answer {texts[0][:60]!r} to {question[:60]!r} does not stand at character "
                f"{start} of its context; correct answer_start."
            )
        inside = [at for at in places if spans[at][1] > start and spans[at][0] < end]
        if not inside:
            raise InputError(
                f"The answer {texts[0][:60]!r} to {question[:60]!r} covers no token of its "
                "context; correct it, or leave it out."
            )
        reference = {
            "context": context,
            "spans": [list(spans[at]) for at in places],
            "answers": texts,
        }
        return Example(tuple(encoded.input_ids), tuple(places), (inside[0], inside[-1]), reference)

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return start and end logits over positions, (examples * 2, length)."""
        both = torch.stack([output.start_logits, output.end_logits], 1).float()
        allowed = torch.zeros_like(batch.ids, dtype=torch.bool)
        allowed[batch.at()] = True
        return both.masked_fill(~allowed[:, None], _NOWHERE).flatten(0, 1)

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[str]:
        """Return the text of the likeliest span of at most 30 tokens."""
        del moe
        found = []
        for example, (start, end) in zip(
            batch.examples, logits.unflatten(0, (-1, 2)), strict=True
        ):
            places = list(example.at)
            scores = start[places][:, None] + end[places]
            scores = scores + torch.full_like(scores, _NOWHERE).tril(-1)
            scores = scores + torch.full_like(scores, _NOWHERE).triu(_LONGEST_ANSWER)
            first, last = divmod(int(scores.argmax()), len(places))
            spans = example.reference["spans"]
            found.append(example.reference["context"][spans[first][0] : spans[last][1]])
        return found

    def judge(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Return exact match and F1, each the best over an example's answers."""
        exact, f1 = 0.0, 0.0
        for found, example in zip(answers, examples, strict=True):
            known = example.reference["answers"]
            exact += max(normalised(found) == normalised(answer) for answer in known)
            f1 += max(word_f1(found, answer) for answer in known)
        return {"exact_match": 100 * exact / len(examples), "f1": 100 * f1 / len(examples)}


def normalised(text: str) -> str:
    """Return text in small letters, without punctuation, articles and superfluous blanks.

    That of SQuAD's official script, evaluate-v1.1.py.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(found: str, answer: str) -> float:
    """Return the harmonic mean of the shares of words that two normalised texts have in common."""
    ours, theirs = normalised(found).split(), normalised(answer).split()
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _answers(value: Any, question: str) -> tuple[list[str], list[int]]:
    """Return texts and starts: of SQuAD's lists, or of a list of single answers."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        pairs = (
            list(zip(texts, starts, strict=False))
            if isinstance(texts, Sequence) and isinstance(starts, Sequence)
            else []
        )
    else:
        one_by_one = value if isinstance(value, Sequence) and not isinstance(value, str) else []
        pairs = [
            (one.get("text"), one.get("answer_start"))
            for one in one_by_one
            if isinstance(one, Mapping)
        ]
    if not pairs or not all(isinstance(t, str) and isinstance(s, int) for t, s in pairs):
        raise InputError(
            f"The question {question[:60]!r} has no answers with text and answer_start "
            f"({str(value)[:60]}); give them as in SQuAD 1.1, where every question has one."
        )
    return [text for text, _ in pairs], [start for _, start in pairs]
