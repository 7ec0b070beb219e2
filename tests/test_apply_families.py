"""Checkpoints of every family: read expert by expert, packed, loaded by transformers."""

import numpy as np
import pytest
import torch
from families import FAMILIES, build_tiny
from test_apply import bitmap_of, evaluated

from dmpq.checkpoint import Checkpoint
from dmpq.errors import InputError
from dmpq.families import auto_class
from dmpq.formats import Menu
from dmpq.moe import MoEModel
from dmpq.quantized_checkpoint import QuantizedCheckpoint

MENU = Menu.parse("2g8,3g8,8g8,16")
ADAPTED = ["dbrx", "llama4", "llama4_text", "nllb-moe", "switch_transformers"]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(ADAPTED)))
def test_a_packed_checkpoint_gives_the_evaluator_s_logits(family, tmp_path):
    model = build_tiny(family)
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    assignment = np.random.default_rng(0).integers(len(MENU), size=moe.spec.num_experts)
    source = Checkpoint(str(tmp_path / "model"))
    made = QuantizedCheckpoint(bitmap_of(moe, MENU, assignment, tmp_path), source)
    made.write(tmp_path / "out", card="")
    loaded = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        logits = loaded(input_ids=ids, use_cache=False).logits.float()
    assert torch.equal(logits, evaluated(moe, MENU, assignment, ids))


@pytest.mark.parametrize("family", ADAPTED)
def test_families_outside_the_interface_are_refused(family, tmp_path):
    build_tiny(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be packed: write the dequantized one"):
        Checkpoint(str(tmp_path))
