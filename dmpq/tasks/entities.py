"""Token classification, as of named entities: whole ones count, by seqeval's definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Final

import torch

from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.columns import named, usual
from dmpq.tasks.examples import Encoder, Example, TaskBatch
from dmpq.tasks.labels import class_of, missing, refuse_long, text_of

_WORDS: Final = ("tokens", "words")
_TAGS: Final = ("ner_tags", "tags", "labels", "label", "ner")


@dataclass(frozen=True)
class TokenClassification:
    """One tag per word, read at the word's first token."""

    encoder: Encoder

    name: ClassVar[str] = "token-classification"
    head: ClassVar[str] = "token classification"
    metric: ClassVar[str] = "f1"
    metrics: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1")

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Find words and tags, each a list.

        Raises:
            InputError: If there are none.
        """
        return {
            "words": usual(names, _WORDS, what="words", flag="--text-column", where=where)
            if text is None
            else named(text, names, flag="--text-column", where=where),
            "tags": usual(names, _TAGS, what="tags", flag="--label-column", where=where)
            if label is None
            else named(label, names, flag="--label-column", where=where),
        }

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return one sentence, with the place of each word's first token."""
        words, tags = row["words"], row["tags"]
        if not _is_list(words) or not _is_list(tags) or len(words) != len(tags):
            raise InputError(
                f"Words and tags of an example ({str(words)[:60]}; {str(tags)[:60]}) are no lists "
                "of one length; give one tag per word."
            )
        if not len(words):
            raise InputError("The data holds a sentence without words; leave it out.")
        words = [text_of(word) for word in words]
        encoded = self.encoder.tokenizer(words, is_split_into_words=True, verbose=False)
        refuse_long(encoded.input_ids, self.encoder, " ".join(words))
        first: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                first.setdefault(word, place)
        kept = sorted(first)  # a word of nothing but strange characters may have no token
        if not kept:
            raise InputError(
                f"No word of the sentence {' '.join(words)[:60]!r} has a token; leave it out."
            )
        classes = [class_of(tags[word], self.encoder) for word in kept]
        names = {number: name for name, number in self.encoder.labels.items()}
        reference = [names[number] for number in range(self.encoder.classes)]
        places = tuple(first[word] for word in kept)
        return Example(tuple(encoded.input_ids), places, tuple(classes), reference)

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return the tag logits of each word, (words, tags)."""
        logits: torch.Tensor = output.logits[batch.at()]
        return logits

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[list[int]]:
        """Return the likeliest tag of each word of each example."""
        del moe
        found = iter(logits.argmax(-1).tolist())
        return [list(islice(found, len(example.at))) for example in batch.examples]

    def judge(
        self, answers: Sequence[Sequence[int]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Return precision, recall and F1 of entities: right only with kind, start and end.

        Raises:
            InputError: If seqeval is not installed.
        """
        try:
            from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
        except ImportError as error:
            raise missing("seqeval", "the F1 of entities") from error

        right = [[one.reference[tag] for tag in one.targets] for one in examples]
        found = [
            [one.reference[tag] for tag in tags]
            for one, tags in zip(examples, answers, strict=True)
        ]
        precision, recall, f1, _ = precision_recall_fscore_support(
            right, found, average="micro", zero_division=0
        )
        return {
            "precision": 100 * float(precision),
            "recall": 100 * float(recall),
            "f1": 100 * float(f1),
        }


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence)
