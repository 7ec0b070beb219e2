"""Tiny models on disk with a tokenizer, a text and examples, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from conftest import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dmpq.bitmap import BitMap
from dmpq.formats import Menu
from dmpq.moe import MoEModel, load_model, reference_path
from dmpq.training.trainer import MoETrainer

MENU = Menu.parse("2,3g16,4,16")
_SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
}


def tiny_model(folder: Path, family: str = "olmoe", *, seed: int = 0) -> Path:
    """Write a tiny random model that reads bytes, and its tokenizer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SHAPE | FAMILIES.get(family, {})))
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(folder)
    return folder


def dense_model(folder: Path) -> Path:
    """Write a tiny random dense model that reads bytes, and its tokenizer."""
    torch.manual_seed(0)
    shape = {name: value for name, value in _SHAPE.items() if name != "head_dim"}
    config = LlamaConfig(**shape, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(folder)
    return folder


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """Let Ctrl-C end every training after a step while the block lasts."""
    after = MoETrainer.after_step

    def interrupted(self: MoETrainer) -> None:
        after(self)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoETrainer, "after_step", interrupted)
        yield


def text_file(folder: Path, *, sentences: int = 400) -> Path:
    """Write a text with something to learn in it."""
    rng = np.random.default_rng(0)
    words = ["expert", "router", "token", "layer", "weight", "bit", "map", "loss"]
    lines = [
        " ".join(words[i] for i in rng.integers(len(words), size=8)) for _ in range(sentences)
    ]
    file = folder / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def bitmap_for(model: Path, text: Path, *, menu: Menu = MENU, pairs: Any = None) -> BitMap:
    """Return a map of a model on disk; random where no formats (N, 2) are given."""
    moe, _ = load_model(str(model))
    found = exports.bitmap_of(
        moe.spec,
        menu,
        architecture=type(moe.model).__name__,
        fingerprint=moe.fingerprint,
        pairs=pairs,
    )
    unit = {"value": 0.0, "unit": "nats/token"}
    return replace(
        found,
        model={**found.model, "id": str(model)},
        text={"dataset": str(text), "sequence_length": 32, "heldout_tokens": 512},
        metrics={"predicted": {}, "measured": {"heldout_kl": unit}},
    )


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights by the names of its modules."""
    moe, _ = load_model(str(folder))
    return dict(moe.model.state_dict())


def examples(folder: Path, rows: list[dict[str, Any]], *, name: str = "data") -> Path:
    """Write rows as a task's data."""
    file = folder / f"{name}.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file


def loaded(folder: Path) -> MoEModel:
    """Return a model on disk."""
    return load_model(str(folder))[0]
