"""Training in mixed precision, of models with experts and of dense ones."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmpq.batches import Batch
from dmpq.moe import MoEModel
from dmpq.training.amp_probe import AmpProbe, Comparison
from dmpq.training.config import FinetuneConfig
from dmpq.training.fake_quant import TrainedExperts, check_trainable
from dmpq.training.judging import Judgement
from dmpq.training.objective import LossTerms
from dmpq.training.saved import MODEL, round_weights, save
from dmpq.training.workbench import Progress, Workbench, workbench


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What a training has made.

    Attributes:
        bench: The model, as it was saved.
        rows: What was measured on held-out text or examples, before and after.
        seconds: Of the training, without judging; of this process alone.
        tokens: Read by this process, padding included.
        peak_bytes: Memory of the process at its most, or of the GPU.
        skipped: Steps that FP16's loss scale left out.
        loss_scales: Step and scale, wherever it was another than before; of FP16.
        probes: Comparisons with FP32 on the same batch.
        active_parameters: That a token runs through.
        parameters: All.
    """

    bench: Workbench
    rows: Mapping[str, Judgement]
    seconds: float
    tokens: int
    peak_bytes: int
    skipped: int
    loss_scales: Sequence[Sequence[float]]
    probes: Sequence[Comparison]
    active_parameters: int
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "rows": {name: row.to_json() for name, row in self.rows.items()},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "peak_bytes": self.peak_bytes,
            "skipped_steps": self.skipped,
            "loss_scales": [list(one) for one in self.loss_scales],
            "probes": [_finite(vars(one)) for one in self.probes],
            "active_parameters": self.active_parameters,
            "parameters": self.parameters,
        }


def finetune(config: FinetuneConfig, folder: Path, progress: Progress) -> Finetuned:
    """Train, and save the checkpoint.

    Args:
        config: How.
        folder: Where to: checkpoints of the training, and ``model``.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If model or data cannot be read or do not suit each other, or the loss does
            not stay finite.
    """
    bench = workbench(config)
    model = bench.model
    forwards = []
    if isinstance(model, MoEModel):
        check_trainable(model)
        forwards = [TrainedExperts(experts) for experts in model.containers]
    judge = bench.judge()
    rows = {} if config.from_scratch else {"before": judge(model)}
    probe = AmpProbe(bench, every=config.probe_every)
    tokens = 0

    def on_batch(_step: int, batch: Batch) -> None:
        nonlocal tokens
        tokens += batch.ids.numel()

    began = time.monotonic()
    trainer = bench.train(
        LossTerms(balance=config.balance, z=config.z),
        folder / "training",
        forwards=forwards,
        on_batch=on_batch,
        callbacks=probe.callbacks,
        progress=progress,
        stage=f"training, {config.precision}",
    )
    seconds = time.monotonic() - began - probe.seconds
    round_weights(model, bench.dtype)
    rows["after"] = judge(model)
    save(bench, folder / MODEL, bench.dtype)
    parameters = sum(one.numel() for one in model.model.parameters())
    return Finetuned(
        bench,
        rows,
        seconds,
        tokens,
        _peak_bytes(model.model.device),
        trainer.skipped,
        trainer.records.get("loss_scales", []),
        [Comparison(**one) for one in trainer.records.get("probes", [])],
        parameters - _idle(model),
        parameters,
    )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers as JSON can hold them: what FP16 overflowed is ``None``."""
    return {
        name: value if value is None or math.isfinite(value) else None
        for name, value in values.items()
    }


def _idle(model: Any) -> int:
    """Return the weights of the experts that a token does not select."""
    if not isinstance(model, MoEModel):
        return 0
    return sum(
        layer.expert_parameters * (layer.num_experts - layer.top_k) // layer.num_experts
        for layer in model.spec.moe_layers
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else 1024))
