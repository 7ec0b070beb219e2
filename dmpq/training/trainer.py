"""transformers' ``Trainer`` on a text model: our loss, states without pickles, no silent NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dmpq.batches import Batch
from dmpq.errors import InputError, first_line
from dmpq.files import remove, replace_folder
from dmpq.moe import TextModel
from dmpq.training.precision import arguments_of, scale_losses
from dmpq.training.state_files import (
    load_state,
    random_state,
    save_state,
    set_random_state,
    unusable,
)
from dmpq.training.steps import StepData, Steps

Loss = Callable[[Batch, int], torch.Tensor]
"""Gives the loss of a step's batch, a scalar in nats, by the step's number."""

_STATE: Final = "training.safetensors"
_PLACE: Final = "trainer_state.json"
_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")
_MOST_SKIPPED: Final = 50
"""Steps in a row that FP16 may skip: each halves the loss scale, and 2**50 is past all use."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a model is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At its highest.
        warmup: Share of the steps in which the rate rises to that.
        decay: Share of the steps, the last ones, in which it falls to zero; constant between.
        weight_decay: Of matrices.
        clip_norm: Gradients are scaled down to this norm.
        accumulate: Batches per optimizer step.
        precision: One of :data:`dmpq.training.config.PRECISIONS`.
        save_every: Steps between two checkpoints; 0 for none.
        seed: Of dropout and whatever else draws.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    save_every: int = 0
    seed: int = 0

    def arguments(self, folder: Path, device: torch.device) -> TrainingArguments:
        """Return what transformers' ``Trainer`` takes."""
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=1,  # one item is one batch
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",  # :meth:`MoETrainer.create_scheduler` makes its own
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip_norm,
            adam_beta2=0.95,
            save_strategy="steps" if self.save_every else "no",
            save_steps=self.save_every or 1,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            **arguments_of(self.precision),
        )
        made._n_gpu = min(made.n_gpu, 1)  # one process, one GPU: no replicas of the model
        return made

    def rate(self, step: int) -> float:
        """Return the share of the highest learning rate that a step has."""
        rising = (step + 1) / max(1, round(self.steps * self.warmup))
        falling = (self.steps - step) / max(1, round(self.steps * self.decay))
        return min(1.0, rising, falling)


class MoETrainer(Trainer):
    """Trains a text model by a loss of ours.

    Attributes:
        skipped: Steps that FP16's loss scale left out.
        records: What callbacks note of the training's course, plain JSON values, by name.

    Args:
        model: The model; its parameters that ask for gradients are trained.
        loss: Of a batch.
        steps: The batches.
        schedule: How long and how fast.
        folder: Where checkpoints are kept.
        made_of: Hash of what the training begins with: a checkpoint of another is refused.
        callbacks: Told of the training's course.
    """

    def __init__(
        self,
        model: TextModel,
        loss: Loss,
        steps: Steps,
        schedule: Schedule,
        folder: Path,
        *,
        made_of: str = "",
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.text_model = model
        self.made_of = made_of
        self.schedule = schedule
        self.folder = folder
        self.skipped = 0
        self.records: dict[str, list[Any]] = {}
        self._loss = loss
        self._data = StepData(steps, schedule.steps * schedule.accumulate)
        self._skipped_in_a_row = 0
        self._scale = 0.0
        super().__init__(
            model=model.model,
            args=schedule.arguments(folder, model.model.device),
            train_dataset=self._data,
            data_collator=lambda items: items[0],
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        scale_losses(self.accelerator)
        if self.accelerator.scaler is not None:
            self._scale = float(self.accelerator.scaler.get_scale())

    def run(self) -> None:
        """Train to the end, from the last checkpoint where there is one.

        Raises:
            InputError: If the loss, the gradients or the weights do not stay finite (the last
                checkpoint stays), or the last checkpoint cannot be gone on from.
        """
        last = last_checkpoint(self.folder)
        if last is not None:
            self._check_checkpoint(last)
        try:
            self.train(resume_from_checkpoint=None if last is None else str(last))
            self._check_weights()
        finally:
            # accelerate wraps the forward in autocast, for good.
            self.accelerator.unwrap_model(self.text_model.model, keep_fp32_wrapper=False)
            self.text_model.model.eval()

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self._data)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate's course, a function of the step alone."""
        del num_training_steps
        rated = self.optimizer if optimizer is None else optimizer
        assert rated is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(rated, self.schedule.rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: a step's batch is none that transformers could count."""
        del inputs
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch, a scalar."""
        del model, return_outputs, num_items_in_batch
        return self._loss(inputs["batch"], inputs["step"])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run forward and backward; refuse a loss that is not finite.

        Raises:
            InputError: If it is not, with the step and the first module whose output is not.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Gradient overflow is what FP16's loss scale is there for, and so is that of a forward.
        if not torch.isfinite(loss) and self.accelerator.scaler is None:
            raise self._not_finite("loss", _first_not_finite(self.text_model, inputs["batch"]))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if norm is None or math.isfinite(norm):
            return norm
        if self.accelerator.scaler is None:
            raise self._not_finite("gradient", _first_bad_gradient(model))
        return norm

    def after_step(self) -> None:
        """Count a step that FP16's loss scale has skipped; called by :class:`StepCounter`.

        Raises:
            InputError: If too many were skipped in a row.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        # accelerate does not see what fused optimizers skip; the scale falls where they do.
        scale = float(scaler.get_scale())
        fell, self._scale = scale < self._scale, scale
        if not fell:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise self._not_finite(
                f"loss of {_MOST_SKIPPED} steps in a row, at whatever loss scale,", ""
            )

    def _not_finite(self, what: str, where: str, *, step: int | None = None) -> InputError:
        kept = last_checkpoint(self.folder)
        held = "there is no checkpoint yet" if kept is None else f"the last good one is {kept}"
        return InputError(
            f"The {what} is not finite at step {step or self.state.global_step + 1}"
            f"{f', first in {where}' if where else ''}; {held}: lower --learning-rate, raise "
            "--warmup, or train with --precision fp32."
        )

    def _check_weights(self) -> None:
        """Refuse weights that the last step has made infinite: finite gradients can do that."""
        for name, parameter in self.text_model.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise self._not_finite("weight", name, step=self.state.global_step)

    def _check_checkpoint(self, place: Path) -> None:
        """Refuse a checkpoint of other weights or data, or one whose files differ."""
        state = load_state(place / _STATE)
        try:
            told = (place / _PLACE).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unusable(place, f"{_PLACE}: {first_line(error)}") from error
        if not isinstance(state, dict) or state.get("trainer") != told:
            raise unusable(place, f"{_PLACE} is not the one that was written")
        if state["made_of"] != self.made_of:
            raise unusable(place, "the model or the data has changed since it was written")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all, and remove those before it."""
        del model, trial
        self._check_weights()
        place = self.folder / f"checkpoint-{self.state.global_step}"
        partial = self.folder / f".{place.name}.partial"
        remove(partial)
        partial.mkdir(parents=True)
        self.state.save_to_json(str(partial / _PLACE))
        scaler = self.accelerator.scaler
        state = {
            "made_of": self.made_of,
            "trainer": (partial / _PLACE).read_text("utf-8"),
            "model": self.text_model.model.state_dict(),
            **{name: part.state_dict() for name, part in self._moving_parts().items()},
            "random": random_state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "records": self.records,
            "skipped": [self.skipped, self._skipped_in_a_row, self._scale],
        }
        save_state(partial / _STATE, state)
        replace_folder(partial, place)
        for other in checkpoints(self.folder):
            if other != place:
                remove(other)

    def _moving_parts(self) -> dict[str, Any]:
        """Return what a training moves beside the weights."""
        return {"optimizer": self.optimizer, "scheduler": self.lr_scheduler}

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights under the names of the model's modules.

        Those of a checkpoint's files differ in many an MoE family, and transformers' ``Trainer``
        passes over names that it does not find.
        """
        del model
        self.text_model.model.load_state_dict(load_state(Path(checkpoint) / _STATE)["model"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / _STATE)
        for name, part in self._moving_parts().items():
            part.load_state_dict(state[name])
        self.skipped, self._skipped_in_a_row, self._scale = state["skipped"]
        self.records = state["records"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the scale is loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(Path(checkpoint) / _STATE)["random"])


class StepCounter(TrainerCallback):
    """Tells a trainer and its listeners of every step.

    Args:
        said: Called with the number of steps done.
    """

    def __init__(self, said: Callable[[int], None]) -> None:
        self.trainer: MoETrainer | None = None
        self._said = said

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count."""
        del args, control
        if self.trainer is not None:
            self.trainer.after_step()
        self._said(int(state.global_step))


def checkpoints(folder: Path) -> list[Path]:
    """Return a training's checkpoints, the oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def last_checkpoint(folder: Path) -> Path | None:
    """Return a training's last checkpoint; ``None`` where there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def _first_not_finite(model: TextModel, batch: Batch) -> str:
    """Return the first module whose output is not finite; empty where all are."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for one in tensors:
                if isinstance(one, torch.Tensor) and not torch.isfinite(one).all():
                    found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            batch.logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _first_bad_gradient(model: nn.Module) -> str:
    """Return the first parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return ""
