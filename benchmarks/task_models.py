"""Small Mixture-of-Experts models trained for one task each: what `benchmarks/tasks.py` quantizes.

Each is a Mixtral of a few layers with the task's head, begun at random, on a vocabulary learned
from its own training text; trained in fp32 on a CPU by Adam with a linear warm-up and decay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from dmpq.moe import HEADS
from dmpq.tasks.examples import Example, TaskBatch, padded_tokens
from dmpq.tasks.splits import TASKS, Encoder

PAD, END, SEP = "<pad>", "<end>", "<sep>"
_WARMUP = 0.1
_BALANCE = 0.01
_SCALE = 0.1
"""Of random weights: such that experts speak as loudly as embeddings from the first step on, and a
short training builds on what they say."""


@dataclass(frozen=True)
class Recipe:
    """How one task's model is made.

    Attributes:
        vocabulary: Tokens of the tokenizer.
        hidden: Width.
        layers: Number of layers.
        experts: Per layer, two of which a token selects.
        intermediate: Width of an expert.
        epochs: Passes over the training examples.
        learning_rate: At its highest.
        batch_tokens: Tokens of a step.
        dropout: Share of input tokens that are replaced by the padding token's embedding.
        longest: Tokens that an example may have.
    """

    vocabulary: int
    epochs: float
    hidden: int = 96
    layers: int = 3
    experts: int = 8
    intermediate: int = 96
    learning_rate: float = 2e-3
    batch_tokens: int = 2048
    dropout: float = 0.0
    longest: int = 256


def tokenizer_for(
    texts: Sequence[str], size: int, *, ends: bool = True
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned from texts.

    Args:
        texts: To learn from.
        size: Tokens of its vocabulary.
        ends: Whether it separates and ends texts; one of a language model, which goes on writing,
            does not (lm-evaluation-harness would read every answer behind the end).
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if ends:
        core.post_processor = processors.TemplateProcessing(
            single=f"$A {END}",
            pair=f"$A {SEP} $B {END}",
            special_tokens=[(END, core.token_to_id(END)), (SEP, core.token_to_id(SEP))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        sep_token=SEP,
        clean_up_tokenization_spaces=False,
    )


def untrained(
    task: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, labels: Sequence[str]
) -> Any:
    """Return a random model with the task's head."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=recipe.experts,
        num_experts_per_tok=2,
        max_position_embeddings=recipe.longest,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)) or {0: "none", 1: "one"},
        label2id={name: i for i, name in enumerate(labels)} or {"none": 0, "one": 1},
        initializer_range=_SCALE,
        output_router_logits=False,
        classifier_dropout=0.1,
    )
    return HEADS.get(TASKS[task].head, AutoModelForCausalLM).from_config(config)


def encode(
    task: str,
    rows: Sequence[dict[str, Any]],
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    **columns: str | None,
) -> tuple[Any, list[Example]]:
    """Return the task and its rows as the search encodes them."""
    config = model.config
    start = config.decoder_start_token_id if config.is_encoder_decoder else None
    longest = config.expert_capacity if start is not None else config.max_position_embeddings
    encoder = Encoder(tokenizer, dict(config.label2id), config.num_labels, longest, start)
    kind = TASKS[task](encoder)
    named = kind.columns(list(rows[0]), text=None, label=None, where="the training data")
    return kind, [kind.encode({k: row[v] for k, v in named.items()}) for row in rows]


def _batches(
    kind: Any, examples: Sequence[Example], recipe: Recipe, pad: int, rng: np.random.Generator
) -> Iterator[TaskBatch]:
    """Yield one epoch of batches of like lengths, in random order."""
    noisy = [one.tokens + rng.uniform(0, 4) for one in examples]
    groups: list[list[Example]] = [[]]
    for i in np.argsort(noisy):
        if groups[-1] and padded_tokens([*groups[-1], examples[i]]) > recipe.batch_tokens:
            groups.append([])
        groups[-1].append(examples[i])
    for g in rng.permutation(len(groups)):
        yield TaskBatch.of(kind, groups[g], pad=pad, device=torch.device("cpu"))


def train(
    kind: Any,
    examples: Sequence[Example],
    model: Any,
    recipe: Recipe,
    *,
    seconds: float,
    say: Callable[[str], None],
) -> float:
    """Train a model on examples, and return how long it took in seconds.

    Args:
        kind: The task.
        examples: For training.
        model: To be trained.
        recipe: How.
        seconds: The run ends after so long at most, its learning rate at zero: the decay follows
            the clock where that is ahead of the epochs.
        say: Told the loss of each epoch.
    """
    rng, began = np.random.default_rng(0), time.monotonic()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    tokens = recipe.epochs * sum(one.tokens for one in examples)
    seen, epoch = 0, 0
    model.train()
    shell = _Shell(model)
    while seen < tokens and time.monotonic() - began < seconds:
        losses, epoch = [], epoch + 1
        for batch in _batches(kind, examples, recipe, model.config.pad_token_id, rng):
            done = max(seen / tokens, (time.monotonic() - began) / seconds)
            if done >= 1:
                break
            rate = min(1.0, done / _WARMUP) * min(1.0, (1 - done) / (1 - _WARMUP))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * max(rate, 0.01)
            if recipe.dropout and batch.decoder is None:
                drop = torch.from_numpy(rng.random(tuple(batch.ids.shape)) < recipe.dropout)
                last = batch.ids == model.config.eos_token_id
                batch.ids[drop & ~last & (batch.mask == 1)] = model.config.pad_token_id
            loss = batch.loss(batch.logits(shell), reduction="mean")
            balance = shell.balance(batch)
            optimizer.zero_grad(set_to_none=True)
            (loss + _BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += batch.tokens
            losses.append(float(loss.detach()))
        if losses:
            elapsed = time.monotonic() - began
            say(f"epoch {epoch}: loss {np.mean(losses):.3f}, {elapsed:.0f} s")
    model.eval()
    return time.monotonic() - began


class _Shell:
    """What a batch runs: a model, noting how its routers share out tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._logits: list[torch.Tensor] = []
        self._decodes: list[bool] = []
        self._chosen = 1 if model.config.is_encoder_decoder else model.config.num_experts_per_tok
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)
            elif name.endswith("mlp.router"):
                self._decodes.append(name.startswith("decoder"))
                module.register_forward_hook(self._note_switch)

    def _note_switch(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._logits.append(output[2].flatten(0, 1))

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        self._logits.append(hidden @ module.weight.T)

    def balance(self, batch: TaskBatch) -> torch.Tensor:
        """Return Switch's balance loss of the last forward, the mean of its layers."""
        total, k = torch.zeros(()), self._chosen
        decodes = self._decodes or [False] * len(self._logits)
        for logits, decoder in zip(self._logits, decodes, strict=True):
            mask = batch.decoder[1] if batch.decoder is not None and decoder else batch.mask
            shares = logits[mask.flatten() == 1].softmax(-1)
            chosen = torch.zeros_like(shares).scatter_(1, shares.topk(k).indices, 1 / k)
            total = total + shares.shape[1] * (shares.mean(0) * chosen.mean(0)).sum()
        count, self._logits = len(self._logits), []
        return total / count


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint as a search reads it, in bf16 as real ones are."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
