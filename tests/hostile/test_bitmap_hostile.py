"""Bit-map files made by somebody with bad intentions, or by an accident."""

import json

import pytest

from dmpq import bitmap as module
from dmpq.bitmap import BitMap
from dmpq.errors import InputError

LAYER = "model.layers.0.mlp.experts"
EXPERTS = {"num_experts": 2, "top_k": 1, "hidden_size": 32, "intermediate_size": 16}


def valid():
    return {
        "schema": "dmpq.bitmap/1",
        "model": {
            "id": "tiny",
            "revision": None,
            "architecture": "olmoe",
            "fingerprint": "a" * 64,
            "geometry": {
                "name": "tiny",
                "model_type": "olmoe",
                "hidden_size": 32,
                "num_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": 64,
                "tie_word_embeddings": False,
                "dense_intermediate_size": 0,
                "moe_layers": [{"path": LAYER, **EXPERTS}],
            },
        },
        "quantizer": {"name": "hqq", "symmetric": False},
        "choices": {
            "2": {"bits": 2, "group_size": 128},
            "4g16": {"bits": 4, "group_size": 16},
        },
        "assignment": {LAYER: ["2", "4g16"]},
        "objective": {"weights": {"acc": 1}, "signal": "kl"},
        "constraints": {"avg_bits": 3},
        "hardware": {
            "name": "a100",
            "stack": "gemlite",
            "calibrated": False,
            "source": "x",
            "cost_geometry": "own",
        },
        "workload": {"phase": "decode", "batch": 1, "context": 8},
        "text": {"dataset": "embedded", "sequence_length": 128, "heldout_tokens": 512},
        "serve": "expert",
        "metrics": {"predicted": {}, "measured": {}},
        "search": {"agent": "ppo", "seed": 0, "evaluations": 1, "tokens": 0},
        "versions": {},
        "git_revision": None,
    }


def refused(tmp_path, text):
    path = tmp_path / "bitmap.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        BitMap.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_the_example_is_valid(tmp_path):
    path = tmp_path / "bitmap.json"
    path.write_text(json.dumps(valid()))
    assert BitMap.read(path).to_assignment(BitMap.read(path).geometry).tolist() == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        b"\xff\xfe\x00",
        "[" * 200_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        '{"schema": "dmpq.bitmap/1"',
        '{"schema": NaN}',
        '{"schema": "dmpq.bitmap/1", "schema": "dmpq.bitmap/1"}',
        '{"schema": ["dmpq.bitmap/1"]}',
    ],
)
def test_no_bit_map(tmp_path, text):
    refused(tmp_path, text)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            BitMap.read(path)


def test_too_large_a_file_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    assert "more than the 100" in refused(tmp_path, json.dumps(valid()))


def test_unknown_version_names_both(tmp_path):
    message = refused(tmp_path, json.dumps({**valid(), "schema": "dmpq.bitmap/2"}))
    assert "dmpq.bitmap/2" in message
    assert "dmpq.bitmap/1" in message


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for name in path:
            data = data[name]
        data[last] = value

    return change


GEOMETRY = ("model", "geometry")
MOE = (*GEOMETRY, "moe_layers", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("extra", 1), "extra"),
        (lambda d: d.pop("search"), "has no 'search'"),
        (_set("model", []), "JSON object"),
        (_set("model", "fingerprint", "../../etc/passwd"), "64 hexadecimal digits"),
        (_set("model", "id", "a\u001b[31m"), "printable"),
        (_set("model", "id", ""), "printable"),
        (_set("model", "revision", 3), "printable"),
        (_set(*GEOMETRY, "num_layers", -1), "num_layers is -1"),
        (_set(*GEOMETRY, "num_layers", 1.5), "of type int"),
        (_set(*MOE, "num_experts", 10**12), "list of 1000000000000"),
        (_set(*MOE, "num_experts", 10**400), "num_experts"),
        (_set(*MOE, "path", "../../x"), "module paths"),
        (_set(*MOE, "path", "a..b"), "module paths"),
        (_set("quantizer", "name", "gptqq"), "Unknown quantizer"),
        (_set("quantizer", "symmetric", 1), "true or false"),
        (_set("choices", {}), "empty"),
        (_set("choices", "2", "bits", -2), "-2"),
        (_set("choices", "2", "bits", 3), "make them agree"),
        (_set("choices", "-2", {"bits": -2, "group_size": 128}), "not a format"),
        (_set("choices", "2g128", {"bits": 2, "group_size": 128}), "twice"),
        (_set("choices", "4g0", {"bits": 4, "group_size": 0}), "not positive"),
        (_set("assignment", []), "JSON object"),
        (_set("assignment", {}), "has no"),
        (_set("assignment", "../../etc", []), "Unknown name in assignment"),
        (_set("assignment", LAYER, ["2"]), "list of 2 keys"),
        (_set("assignment", LAYER, ["2"] * 3), "list of 2 keys"),
        (_set("assignment", LAYER, "24"), "list of 2 keys"),
        (_set("assignment", LAYER, ["2", "8"]), "Unknown format"),
        (_set("assignment", LAYER, ["2", 4]), "Unknown format"),
        (_set("assignment", LAYER, ["2", ["2"]]), "Unknown format"),
        (_set("assignment", LAYER, {"gate_up": ["2", "2"]}), "projections apart"),
        (_set("objective", "weights", {"acc": -1}), "0 or more"),
        (_set("objective", "weights", {"acc": "1"}), "a number"),
        (_set("constraints", "avg_bits", -3), "positive"),
        (_set("constraints", "avg_bits", True), "a number"),
        (_set("constraints", "avg_bits", 10**400), "63 bits"),
        (_set("workload", "phase", "decod"), "did you mean 'decode'"),
        (_set("workload", "batch", 0), "1 or more"),
        (_set("text", "heldout_tokens", 0), "1 or more"),
        (_set("text", "dataset", 3), "dataset"),
        (_set("serve", "experts"), "did you mean 'expert'"),
        (_set("serve", "layer"), "mixes formats"),
        (_set("serve", ["layer"]), "Unknown serve"),
        (_set("metrics", "predicted", {"kl": 3}), "JSON object"),
        (_set("metrics", "predicted", {"kl": {"value": None, "unit": "s"}}), "a number"),
        (_set("metrics", "predicted", {"kl": {"value": 1, "unit": ""}}), "printable"),
        (_set("search", "seed", 1.5), "whole number"),
        (_set("search", "tokens", -1), "0 or more"),
        (_set("versions", {"../x": "1"}), "package's name"),
        (_set("git_revision", {}), "printable"),
    ],
)
def test_each_defect_has_its_sentence(tmp_path, change, message):
    data = valid()
    change(data)
    assert message in refused(tmp_path, json.dumps(data))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(tmp_path, number):
    text = json.dumps(valid()).replace('"avg_bits": 3', f'"avg_bits": {number}')
    assert "finite number" in refused(tmp_path, text)
