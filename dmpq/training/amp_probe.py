"""What low precision changes in a training, measured on the batches that it reads.

Every so many steps the same batch is run once more in FP32, from the same weights, and its
gradients and routers are compared with those in low precision.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import TrainerCallback

from dmpq.moe import MoEModel
from dmpq.overrides import overridden
from dmpq.training.precision import autocast_type
from dmpq.training.routing import Routers
from dmpq.training.trainer import MoETrainer
from dmpq.training.workbench import Workbench


@dataclass(frozen=True)
class Comparison:
    """One batch in low precision and in FP32.

    Attributes:
        step: Steps done before.
        underflow: Share of the gradient's entries that are zero in low precision and not in FP32,
            at the loss scale of the step (1 where there is none).
        underflow_unscaled: The same without a loss scale.
        router_error: Mean absolute difference of router logits; ``None`` for a dense model.
        changed_selections: Share of token-expert selections that FP32 does not make.
        loss_scale: Of the step; 1 where there is none.
    """

    step: int
    underflow: float
    underflow_unscaled: float
    router_error: float | None
    changed_selections: float | None
    loss_scale: float


class AmpProbe:
    """Compares batches in low precision with FP32, as a training goes on.

    Args:
        bench: Of the training.
        every: Steps between two comparisons; 0 for none.
    """

    def __init__(self, bench: Workbench, *, every: int) -> None:
        self.seconds = 0.0
        self._bench = bench
        self._every = every

    def callbacks(self, trainer: MoETrainer) -> Sequence[TrainerCallback]:
        """Return what a trainer tells of its steps."""
        probe = self

        class Watcher(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                del args, control
                probe.before_step(trainer, int(state.global_step))

        return [Watcher()]

    def before_step(self, trainer: MoETrainer, step: int) -> None:
        """Note the loss scale, and compare where it is time."""
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        scales = trainer.records.setdefault("loss_scales", [])
        if scaler is not None and (not scales or scales[-1][1] != scale):
            scales.append([step, scale])
        low = autocast_type(self._bench.config.precision)
        if low is None or not self._every or step % self._every:
            return
        began = time.monotonic()
        found = vars(self._compared(step, scale, low))
        trainer.records.setdefault("probes", []).append(found)
        self.seconds += time.monotonic() - began

    def _compared(self, step: int, scale: float, low: torch.dtype) -> Comparison:
        exact, right = self._run(step, None, 1.0)
        scaled, mine = self._run(step, low, scale)
        unscaled = scaled if scale == 1.0 else self._run(step, low, 1.0)[0]
        routed = _routing(mine, right, self._bench)
        self._bench.model.model.zero_grad()
        return Comparison(
            step, _underflow(scaled, exact), _underflow(unscaled, exact), *routed, scale
        )

    def _run(
        self, step: int, low: torch.dtype | None, scale: float
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return gradients, and router logits, of the step's first batch."""
        bench = self._bench
        model = bench.model.model
        batch = bench.steps.batch(step * bench.config.accumulate)
        model.zero_grad()
        training = model.training
        model.eval()  # dropout would differ
        logged: list[torch.Tensor] = []
        # accelerate has put an autocast of its own around the forward.
        plain = overridden([model], "forward", [MethodType(type(model).forward, model)])
        with plain, torch.autocast(model.device.type, dtype=low, enabled=low is not None):
            if isinstance(bench.model, MoEModel):
                with Routers(model).recording() as logged:
                    logits = batch.logits(bench.model)
            else:
                logits = batch.logits(bench.model)
        (batch.loss(logits, reduction="mean") * scale).backward()
        model.train(training)
        found = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        model.zero_grad()
        return found, [one.detach() for one in logged]


def _underflow(low: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Return the share of entries that are zero in the first and not in the second."""
    pairs = list(zip(low, exact, strict=True))
    lost = sum(int(((mine == 0) & (right != 0)).sum()) for mine, right in pairs)
    return lost / max(1, sum(int((right != 0).sum()) for _, right in pairs))


def _routing(
    mine: Sequence[torch.Tensor], right: Sequence[torch.Tensor], bench: Workbench
) -> tuple[float | None, float | None]:
    """Return the mean error of router logits, and the share of selections that are others."""
    if not isinstance(bench.model, MoEModel):
        return None, None
    errors, other, all_of_them = [], 0, 0
    for low, exact, layer in zip(mine, right, bench.model.spec.moe_layers, strict=True):
        errors.append(float((low - exact).abs().mean()))
        chosen, wanted = (one.topk(layer.top_k).indices for one in (low, exact))
        same = (chosen[:, :, None] == wanted[:, None]).any(-1)
        other += int((~same).sum())
        all_of_them += same.numel()
    return sum(errors) / len(errors), other / all_of_them
