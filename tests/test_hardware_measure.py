"""The command that measures: what it prints and writes, and what it refuses."""

import json

import pytest
from benches import maps_of, quick_bench

from dmpq.formats import Menu
from dmpq.hardware import __main__ as hardware
from dmpq.hw_models import Workload, load_hardware
from dmpq.spec import load_geometry

MENU = Menu()


@pytest.fixture
def tiny_config(tmp_path, monkeypatch):
    config = {
        "model_type": "olmoe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dmpq.hw_models.live.host_bench", lambda threads: quick_bench())
    return path


def test_the_command_measures_prints_and_writes(tiny_config, tmp_path, capsys):
    out = tmp_path / "record.json"
    flags = ["--model", str(tiny_config), "--batch", "4", "--out", str(out)]
    assert hardware.main(["measure", *flags]) == 0
    said = capsys.readouterr().out
    assert "expert 64 x 32" in said
    assert "not measured" in said
    spec = load_geometry(str(tiny_config))
    cost = load_hardware(str(out)).cost(spec, MENU, maps_of(spec, MENU), Workload(batch=4))
    assert (cost.latency_s > 0).all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--hw", "hots"],
        ["--hw", "a100"],
        ["--threads", "0"],
        ["--threads", "x"],
        ["--tdp-w", "5"],
        ["--hw", "cuda", "--tdp-w", "nan"],
        ["--cost-geometry", "olmo"],
        ["--model", "no/such/model"],
        ["--bits", "5"],
        ["--phase", "decoding"],
        ["--batch", "0"],
        ["--out", "record.txt"],
        ["--out", "no/such/folder/record.json"],
    ],
)
def test_the_command_refuses_in_one_line(flags, capsys):
    try:
        code = hardware.main(["measure", *flags])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
