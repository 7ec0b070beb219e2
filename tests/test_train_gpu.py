"""Training on a GPU: run by hand with ``-m gpu``."""

import json

import pytest
import torch
from trainings import bitmap_for, text_file, tiny_model

from dmpq.train import main

pytestmark = pytest.mark.gpu
SMALL = ["--steps", "12", "--batch-size", "4", "--save-every", "4", "--heldout-tokens", "512"]
SMALL += ["--labels", "1", "--distillation", "0"]  # a random model has nothing to teach


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_under_a_map(device, precision, tmp_path):
    model, text = tiny_model(tmp_path / "model"), text_file(tmp_path)
    bitmap_for(model, text).write(tmp_path / "bitmap.json")
    out = tmp_path / "out"
    options = ["--device", device, "--precision", precision, "--out", str(out)]
    assert main(["qat", str(tmp_path / "bitmap.json"), *SMALL, *options]) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert rows["the map, after"]["nll"] < rows["the map, before"]["nll"] - 0.05
    assert torch.cuda.max_memory_allocated() > 0
