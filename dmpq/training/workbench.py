"""A model, what it is trained on, and what it is judged on: from a configuration."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from dmpq.batches import Batch, as_text
from dmpq.data import TokenRequest, load_splits, token_stream, training_text
from dmpq.errors import InputError, first_line, is_out_of_memory
from dmpq.families import auto_class, find_containers
from dmpq.files import JsonLines
from dmpq.moe import (
    HEADS,
    LANGUAGE_MODELLING,
    HeadMissingError,
    MoEModel,
    TextModel,
    check_device,
    check_weights,
    checkpoint_source,
    load_tokenizer,
    load_transformer,
)
from dmpq.tasks.examples import Examples, Task
from dmpq.tasks.splits import TASKS, encode_tables, label_names
from dmpq.tasks.tables import Tables, read_tables
from dmpq.training.config import FinetuneConfig, TrainingConfig
from dmpq.training.judging import Judge
from dmpq.training.objective import LossTerms, Objective
from dmpq.training.routing import Routers
from dmpq.training.steps import Steps, TaskSteps, TextSteps
from dmpq.training.trainer import MoETrainer, Schedule, StepCounter

_LONGEST_WINDOW: Final = 2048
_BATCH_TOKENS: Final = 8192
"""Held-out tokens of a forward."""

Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class Workbench:
    """Everything that a training works with.

    Attributes:
        config: What to do.
        model: To be trained, weights in FP32.
        tokenizer: Its tokenizer.
        steps: What it is trained on.
        heldout: What it is judged on.
        task: Of both; ``None`` for text.
        source: What both are, in words.
        dtype: Of the checkpoint's weights, in which a trained one is saved, too.
    """

    config: TrainingConfig
    model: TextModel
    tokenizer: Any
    steps: Steps
    heldout: Sequence[Batch]
    task: Task | None
    source: str
    dtype: torch.dtype = torch.float32

    @property
    def moe(self) -> MoEModel:
        """The model, which has experts.

        Raises:
            InputError: If it has none.
        """
        if not isinstance(self.model, MoEModel):
            raise InputError(
                f"{self.config.model} is a dense model (family "
                f"{self.model.model.config.model_type!r}): it has no experts to quantize; make "
                "some by python -m dmpq.train upcycle."
            )
        return self.model

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the training."""
        if self.config.steps is not None:
            return self.config.steps
        batches = math.ceil(self.config.epochs * self.steps.steps_per_epoch)
        return max(1, batches // self.config.accumulate)

    def judge(self, teacher: MoEModel | None = None) -> Judge:
        """Return what measures models on the held-out text or examples."""
        return Judge(self.heldout, teacher=teacher, task=self.task)

    def frozen_copy(self) -> MoEModel:
        """Return the model as it is now, for a teacher."""
        return MoEModel(copy.deepcopy(self.moe.model), name=self.config.model)

    def schedule(self) -> Schedule:
        """Return how long and how fast."""
        c = self.config
        return Schedule(
            steps=self.num_steps,
            learning_rate=c.learning_rate,
            warmup=c.warmup,
            decay=c.decay,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            accumulate=c.accumulate,
            precision=c.precision,
            save_every=c.save_every,
            seed=c.seed,
        )

    def train(
        self,
        terms: LossTerms,
        folder: Path,
        *,
        forwards: Sequence[Any],
        teacher: MoEModel | None = None,
        on_batch: Callable[[int, Batch], None] = lambda _step, _batch: None,
        trained: Callable[[str], bool] = lambda _: True,
        callbacks: Callable[[MoETrainer], Sequence[Any]] = lambda _: (),
        progress: Progress,
        stage: str,
    ) -> MoETrainer:
        """Train the model, or go on with what an interrupted run has left.

        Args:
            terms: Of the loss; terms of routers are left out where there are none.
            folder: Of checkpoints and ``log.jsonl``.
            forwards: What the experts run by, one of each container; none for a dense model.
            teacher: For terms that need one.
            on_batch: Called with the number of a batch and the batch, before it is run.
            trained: Whether the parameter of a name is trained.
            callbacks: More of them, for the trainer.
            progress: Called with the stage, steps done, and all steps.
            stage: What to call the training.

        Returns:
            The trainer, its training done.

        Raises:
            InputError: If the loss does not stay finite.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(self.model, MoEModel):
            terms = replace(terms, balance=0.0, z=0.0, routers=0.0)
        for name, parameter in self.model.model.named_parameters():
            parameter.requires_grad_(trained(name))
        objective = Objective(self.model, terms, teacher=teacher)

        def loss(batch: Batch, step: int) -> torch.Tensor:
            on_batch(step, batch)
            return objective(batch)

        log = JsonLines(folder / "log.jsonl")
        total, every = self.num_steps, max(1, self.num_steps // 100)

        def said(step: int) -> None:
            if step % every == 0 or step == total:
                scaler = trainer.accelerator.scaler
                scale = {} if scaler is None else {"loss_scale": scaler.get_scale()}
                means = {k: v if math.isfinite(v) else None for k, v in objective.means().items()}
                log.append({"step": step, **means, **scale})
            progress(stage, step, total)

        counter = StepCounter(said)
        trainer = MoETrainer(
            self.model,
            loss,
            self.steps,
            self.schedule(),
            folder,
            made_of=_made_of(self.model, self.steps),
            callbacks=[counter],
        )
        counter.trainer = trainer
        for callback in callbacks(trainer):
            trainer.add_callback(callback)
        try:
            with self._running(forwards):
                trainer.run()
        finally:
            log.close()
            self.model.model.requires_grad_(False)
        return trainer

    def _running(self, forwards: Sequence[Any]) -> AbstractContextManager[Any]:
        """Run experts by functions, and routers in FP32, while the block lasts."""
        if not isinstance(self.model, MoEModel):
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(self.model.experts_forward(forwards))
        stack.enter_context(Routers(self.model.model).in_float32())
        return stack


def _made_of(model: TextModel, steps: Steps) -> str:
    """Return a hash of the weights that a training begins with, and of what it reads."""
    found = hashlib.sha256(steps.identity)
    for name, parameter in model.model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(
            parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return found.hexdigest()


def workbench(config: TrainingConfig) -> Workbench:
    """Return what a configuration asks for, loaded and cut.

    Raises:
        InputError: If model or data cannot be read, or do not suit each other.
    """
    check_device(config.device)
    tables = None if config.task is None else read_tables(config.dataset)
    model, tokenizer = _load(config, tables)
    model.to(config.device)
    found = find_containers(model)
    text_model = (MoEModel if found else TextModel)(
        model, name=config.model, revision=config.revision
    )
    check_weights(text_model)
    if tables is None:
        bench = _on_text(config, text_model, tokenizer)
    else:
        bench = _on_task(config, text_model, tokenizer, tables)
    _check_that_it_runs(bench)
    return replace(bench, dtype=_stored_dtype(config))


def _stored_dtype(config: TrainingConfig) -> torch.dtype:
    """Return the type that a checkpoint says its weights are in; models are loaded in another."""
    source, local = checkpoint_source(config.model, config.revision)
    told = AutoConfig.from_pretrained(
        source,
        revision=config.revision,
        local_files_only=local,
        trust_remote_code=config.trust_remote_code,
    ).dtype
    found: torch.dtype = getattr(torch, told) if isinstance(told, str) else told or torch.float32
    return found


def _check_that_it_runs(bench: Workbench) -> None:
    """Run a small batch: what a config.json says may only fail in a forward."""
    try:
        with torch.no_grad():
            bench.heldout[0].probe().logits(bench.model)
    except Exception as error:  # each module raises its own
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"The model {bench.config.model} cannot run ({first_line(error)}); its config.json "
            "does not describe weights that work together: get it again."
        ) from error


def _load(config: TrainingConfig, tables: Tables | None) -> tuple[Any, Any]:
    head = LANGUAGE_MODELLING if config.task is None else TASKS[config.task].head
    new_head = None
    begins_anew = isinstance(config, FinetuneConfig) and config.from_scratch
    asks = isinstance(config, FinetuneConfig) and config.new_head
    wants_head = asks or begins_anew
    if tables is not None and wants_head and config.task != "question-answering":
        assert config.task is not None
        names = label_names(
            config.task,
            tables,
            dataset=config.dataset,
            text_column=config.text_column,
            label_column=config.label_column,
        )
        new_head = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
    elif asks:
        new_head = {}
    if begins_anew:
        return _from_scratch(config, head, new_head or {})
    torch.manual_seed(config.seed)  # of a new head
    try:
        model, tokenizer = load_transformer(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            head=head,
            new_head=new_head,
        )
    except HeadMissingError as error:
        raise InputError(
            f"{config.model} has no head for {config.task} ({first_line(error)}); give --new-head "
            "for one with the labels of the data."
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"The checkpoint {config.model} is quantized already, so that its weights cannot be "
            "trained; give the one that it was made from."
        )
    return model, tokenizer


def _from_scratch(config: TrainingConfig, head: str, entries: dict[str, Any]) -> tuple[Any, Any]:
    """Return a model of random weights and the tokenizer, of a folder without weights."""
    source, local = checkpoint_source(config.model, config.revision)
    options = {
        "revision": config.revision,
        "local_files_only": local,
        "trust_remote_code": config.trust_remote_code,
    }
    torch.manual_seed(config.seed)
    try:
        shape = AutoConfig.from_pretrained(source, **options, **entries)
        kind = auto_class(shape) if head == LANGUAGE_MODELLING else HEADS[head]
        model = kind.from_config(shape, dtype=torch.float32)
    except Exception as error:  # a strange config raises whatever its reader raises
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{config.model} describes no model for {head} that can be built "
            f"({first_line(error)}); mend its config.json, or give another --model or --task."
        ) from error
    return model, load_tokenizer(config.model, source, options)


def _on_text(config: TrainingConfig, model: TextModel, tokenizer: Any) -> Workbench:
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    length = config.sequence_length or min(limit or _LONGEST_WINDOW, _LONGEST_WINDOW)
    if not 2 <= length <= (limit or length):
        raise InputError(
            f"--sequence-length {length} does not suit {config.model}; give 2 to {limit}."
        )
    request = TokenRequest(0, 0, 0, config.heldout_tokens)
    splits = load_splits(config.dataset, tokenizer, length=length, tokens=request, seed=0)
    texts, source = training_text(config.dataset)
    tokens = token_stream(texts, tokenizer)
    known = model.model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= known:
        raise InputError(
            f"The tokenizer of {config.model} gives token {int(tokens.max())}, and the model "
            f"knows {known} tokens; put the tokenizer that belongs to the model into its folder."
        )
    steps = TextSteps(model, tokens, length, config.batch_size, config.seed)
    heldout = as_text(splits.heldout).batches(model, tokens=_BATCH_TOKENS)
    return Workbench(config, model, tokenizer, steps, heldout, None, source)


def _on_task(
    config: TrainingConfig, model: TextModel, tokenizer: Any, tables: Tables
) -> Workbench:
    assert config.task is not None
    read = encode_tables(
        config.task,
        tables,
        model,
        tokenizer,
        dataset=config.dataset,
        length=config.sequence_length,
        text_column=config.text_column,
        label_column=config.label_column,
    )
    steps = TaskSteps(model, read.task, read.calibration, read.pad, config.batch_size, config.seed)
    examples = Examples(read.task, tuple(read.heldout), read.pad)
    heldout = examples.batches(model, tokens=_BATCH_TOKENS)
    source = (
        f"{read.source}; examples: {len(read.calibration):,} to train on, "
        f"{len(read.heldout):,} held-out"
    )
    return Workbench(config, model, tokenizer, steps, heldout, read.task, source)
