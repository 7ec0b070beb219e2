"""Translation: the distributions at a reference's tokens, and BLEU of greedy text by sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.columns import named, usual
from dmpq.tasks.examples import Encoder, Example, TaskBatch
from dmpq.tasks.labels import missing, refuse_long, text_of

_SPARE: Final = 1.5
"""Tokens that a translation may have, for each of the reference's."""


@dataclass(frozen=True)
class Translation:
    """The next-token distributions at the reference's tokens; BLEU of what is generated.

    A causal model reads the source, a line's end, the target, and end-of-text. Of an
    encoder-decoder, as Switch Transformers or NLLB-MoE, the encoder reads the source as its
    tokenizer encodes texts, and the decoder its start token, the token of the target's language
    where there is one, and the target: the labels, which end with end-of-text, shifted right.
    """

    encoder: Encoder

    name: ClassVar[str] = "translation"
    head: ClassVar[str] = "language modelling"
    metric: ClassVar[str] = "bleu"
    metrics: ClassVar[tuple[str, ...]] = ("bleu",)

    def columns(
        self, names: Sequence[str], *, text: str | None, label: str | None, where: str
    ) -> Mapping[str, str]:
        """Find source and target; a hub's ``translation`` column is asked for by its languages.

        Raises:
            InputError: If there are none.
        """
        return {
            "source": usual(
                names, ("source", "src"), what="source text", flag="--text-column", where=where
            )
            if text is None
            else named(text, names, flag="--text-column", where=where),
            "target": usual(
                names, ("target", "tgt"), what="target text", flag="--label-column", where=where
            )
            if label is None
            else named(label, names, flag="--label-column", where=where),
        }

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return prompt and reference; what matters is where the reference is predicted."""
        tokenizer = self.encoder.tokenizer
        source, target = text_of(row["source"]), text_of(row["target"])
        if tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end-of-text token, by which a translation ends; set "
                "eos_token in its tokenizer_config.json."
            )
        if self.encoder.start is not None:
            return self._pair(source, target, self.encoder.start)
        prompt = tokenizer(f"{source}\n", add_special_tokens=False, verbose=False).input_ids
        if not prompt:
            raise InputError(
                f"The source text {source!r} has no tokens that the model knows; leave it out."
            )
        answer = tokenizer(target, add_special_tokens=False, verbose=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        ids = (*prompt, *answer)
        refuse_long(ids, self.encoder, source)
        at = tuple(range(len(prompt) - 1, len(ids) - 1))
        return Example(ids, at, tuple(answer), target)

    def _pair(self, source: str, target: str, start: int) -> Example:
        """Return what encoder and decoder read; forced tokens are given, so not compared."""
        tokenizer, forced = self.encoder.tokenizer, self.encoder.forced
        ids = tokenizer(source, verbose=False).input_ids
        answer = tokenizer(text_target=target, add_special_tokens=False, verbose=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        read = (start, *forced, *answer[:-1])
        refuse_long(ids, self.encoder, source)
        refuse_long(read, self.encoder, target)
        at = tuple(range(len(forced), len(read)))
        return Example(tuple(ids), at, tuple(answer), target, read)

    def rows(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """Return the next-token logits that predict the reference, (tokens, vocabulary)."""
        logits: torch.Tensor = output.logits[batch.at()]
        return logits

    def answers(self, moe: TextModel, batch: TaskBatch, logits: torch.Tensor) -> list[list[int]]:
        """Return the tokens generated after each prompt, greedily, without end-of-text."""
        del logits
        if self.encoder.start is not None:
            return self._decoded(moe, batch)
        prompts = [one.ids[: one.at[0] + 1] for one in batch.examples]
        length = max(map(len, prompts))
        end = batch.examples[0].targets[-1]
        ids = torch.full((len(prompts), length), end, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        longest = max(len(one.targets) for one in batch.examples)
        made = moe.model.generate(
            input_ids=ids.to(batch.ids.device),
            attention_mask=mask.to(batch.ids.device),
            max_new_tokens=round(_SPARE * longest),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        return _ended(made[:, length:], end)

    def _decoded(self, moe: TextModel, batch: TaskBatch) -> list[list[int]]:
        """Return what the decoder says greedily after its start and forced tokens."""
        first = batch.examples[0]
        begin, end = first.decoder[: first.at[0] + 1], first.targets[-1]
        made = moe.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            decoder_input_ids=torch.tensor([begin] * len(batch.examples)).to(batch.ids.device),
            decoder_start_token_id=begin[0],
            max_new_tokens=round(_SPARE * max(len(one.targets) for one in batch.examples)),
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end,
        )
        return _ended(made[:, len(begin) :], end)

    def judge(
        self, answers: Sequence[Sequence[int]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Return corpus BLEU by sacrebleu's defaults (13a tokens, exponential smoothing).

        Raises:
            InputError: If sacrebleu is not installed.
        """
        try:
            from sacrebleu import corpus_bleu
        except ImportError as error:
            raise missing("sacrebleu", "BLEU") from error
        texts = [
            self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers
        ]
        return {"bleu": float(corpus_bleu(texts, [[one.reference for one in examples]]).score)}


def _ended(made: torch.Tensor, end: int) -> list[list[int]]:
    """Return generated rows up to the end token."""
    return [row[: row.index(end)] if end in row else row for row in made.tolist()]
