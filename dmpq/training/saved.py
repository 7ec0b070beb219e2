"""What a training leaves behind: a checkpoint, the map that holds for it, and a summary."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.files import remove, replace_atomically, replace_folder
from dmpq.moe import TextModel
from dmpq.session import Session
from dmpq.training.fake_quant import LEARNED_RANGES
from dmpq.training.workbench import Progress, Workbench

MODEL: Final = "model"
BITMAP: Final = "bitmap.json"
SUMMARY: Final = "summary.json"


def round_weights(model: TextModel, dtype: torch.dtype) -> None:
    """Round all weights to what a checkpoint's type can hold, and keep them in FP32.

    Learned ranges are no weights of the checkpoint; they are stored in float16, as they ran.
    """
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if f".{LEARNED_RANGES}." in name:
                continue
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def save(bench: Workbench, folder: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as transformers loads them, whole or not at all.

    Args:
        bench: Of the model, whose weights stay as they are.
        folder: Where to; what is there is replaced.
        dtype: Of the weights on disk.
    """
    partial_folder = folder.parent / f".{folder.name}.partial"
    remove(partial_folder)
    model = copy.deepcopy(bench.model.model).to(dtype)
    model.save_pretrained(partial_folder)
    bench.tokenizer.save_pretrained(partial_folder)
    replace_folder(partial_folder, folder)


def mapped(bitmap: BitMap, folder: Path, progress: Progress) -> BitMap:
    """Return the map of the trained checkpoint: the same formats, measured on it anew.

    The KL that it states is to the trained checkpoint's own full precision, as of every map.

    Args:
        bitmap: The map that it was trained under.
        folder: Where the checkpoint is, as the map is to name it.
        progress: Called with a stage's name, steps done, and all steps.
    """
    text = bitmap.text
    config = SearchConfig(
        model=str(folder),
        hw=bitmap.hardware["name"],
        cost_geometry=bitmap.hardware["cost_geometry"],
        dataset=text["dataset"],
        heldout_tokens=text["heldout_tokens"],
        sequence_length=None if "task" in text else text["sequence_length"],
        task=text.get("task"),
        text_column=text.get("text_column"),
        label_column=text.get("label_column"),
        bits=",".join(bitmap.menu.keys),
        quantizer=bitmap.menu.quantizer,
        symmetric=bitmap.menu.symmetric,
        profile_tokens=0,
        search_tokens=0,
        selection_tokens=0,
        further_tokens=0,
    )
    session = Session(config, progress=progress)
    moe = session.moe
    evaluator = session.evaluator("heldout")
    chosen = bitmap.to_assignment(moe.spec)[None]
    found = evaluator.evaluate(chosen)
    measured = {"heldout_kl": float(found.kl[0]), "heldout_perplexity": float(found.perplexity[0])}
    if config.task is not None:
        from dmpq.tasks.evaluator import TaskEvaluator

        assert isinstance(evaluator, TaskEvaluator)
        del measured["heldout_perplexity"]
        (judged,) = evaluator.metrics(chosen)
        measured |= {f"heldout_{name}": value for name, value in judged.items()}
    units = bitmap.metrics["measured"]
    metrics = {
        **bitmap.metrics,
        "measured": {
            name: {"value": value, "unit": units[name]["unit"]}
            for name, value in measured.items()
            if name in units
        },
    }
    model = {
        **bitmap.model,
        "id": str(folder),
        "revision": None,
        "architecture": type(moe.model).__name__,
        "fingerprint": moe.fingerprint,
    }
    return replace(bitmap, model=model, geometry=moe.spec, metrics=metrics)


def write_summary(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a training was and found."""
    replace_atomically(folder / SUMMARY, (json.dumps(facts, indent=2) + "\n").encode())
