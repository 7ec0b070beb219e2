"""Mixed precision by torch's autocast and loss scaling, on CPUs and GPUs, through accelerate.

Weights, optimizer and routers stay in FP32; matrix products run in BF16 or FP16. What the
libraries leave out is filled in here, each found by running them (transformers 5.23, accelerate
1.15, torch 2.13):

* accelerate takes ``fp16`` on a CPU and then trains in FP32 without a word: it makes no loss scale
  and no autocast there, though torch has both.
* ``grouped_mm`` is no autocast operation, and transformers casts the experts' *inputs* to the type
  of their weights: experts with FP32 weights run in FP32 under autocast, whatever is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator


def autocast_type(precision: str) -> torch.dtype | None:
    """Return the type that a precision's matrix products run in; ``None`` for FP32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to where it is on, else ``None``."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def scale_losses(accelerator: Accelerator) -> None:
    """Give an accelerator for FP16 on a CPU what it has on a GPU: a loss scale and autocast.

    Args:
        accelerator: Before it prepares model and optimizer; left as it is in every other case.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")


def arguments_of(precision: str) -> dict[str, Any]:
    """Return what ``TrainingArguments`` takes for a precision."""
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}
