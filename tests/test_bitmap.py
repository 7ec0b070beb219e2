"""Bit maps: round trips, exact bytes, and what fits together."""

import json
import stat
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.bitmap import BitMap, assignment_from
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.spec import ModelSpec, MoELayer


def make_spec(*, layers=2, experts=3):
    return ModelSpec(
        name="tiny",
        model_type="olmoe",
        hidden_size=32,
        num_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        tie_word_embeddings=False,
        dense_intermediate_size=0,
        moe_layers=tuple(
            MoELayer(f"model.layers.{i}.mlp.experts", experts, 1, 32, 16) for i in range(layers)
        ),
    )


SPEC = make_spec()
MENU = Menu.parse("2,2g16,4,16")


def make_bitmap(assignment=(0, 1, 2, 3, 0, 1), *, serve="expert", geometry=SPEC, **changes):
    values = {
        "model": {
            "id": "tiny",
            "revision": None,
            "architecture": "olmoe",
            "fingerprint": "0123456789abcdef" * 4,
        },
        "geometry": geometry,
        "menu": MENU,
        "assignment": assignment_from(geometry, MENU, np.array(assignment)),
        "objective": {"weights": {"acc": 1.0, "lat": 0.1}, "signal": "kl"},
        "constraints": {"avg_bits": 3.0, "memory_bytes": None},
        "hardware": {
            "name": "a100",
            "stack": "gemlite",
            "calibrated": False,
            "source": "analytical",
            "cost_geometry": "olmoe-1b-7b",
        },
        "workload": {"phase": "decode", "batch": 1, "context": 2048},
        "text": {"dataset": "embedded", "sequence_length": 128, "heldout_tokens": 512},
        "serve": serve,
        "metrics": {
            "predicted": {"latency": {"value": np.float64(0.5), "unit": "s"}},
            "measured": {"kl": {"value": 0.25, "unit": "nats/token"}},
        },
        "search": {"agent": "ppo", "seed": np.int64(0), "evaluations": 200, "tokens": 1e6},
        "versions": {"dmpq": "0.1.0", "stable-baselines3": "2.9.2"},
        "git_revision": None,
    }
    return BitMap(**{**values, **changes})


def test_write_and_read(tmp_path):
    bitmap, path = make_bitmap(), tmp_path / "bitmap.json"
    bitmap.write(path)
    assert BitMap.read(path) == bitmap
    first = path.read_bytes()
    BitMap.read(path).write(path)
    assert path.read_bytes() == first
    assert json.loads(first)["schema"] == "dmpq.bitmap/1"
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_mode_of_an_ordinary_one(tmp_path):
    make_bitmap().write(tmp_path / "bitmap.json")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_round_trip_of_any_map(data):
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    spec, parts = make_spec(layers=layers, experts=experts), data.draw(st.integers(1, 2))
    size = layers * experts * parts
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    value = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    bitmap = make_bitmap(
        chosen,
        geometry=spec,
        serve="expert" if parts == 1 else "projection",
        metrics={"predicted": {"x": {"value": value, "unit": "µs"}}, "measured": {}},
    )
    again = BitMap.from_json(json.loads(json.dumps(bitmap.to_json(), allow_nan=False)))
    assert again == bitmap
    assert again.to_assignment(spec).tolist() == chosen


CALIBRATION = {"dataset": "embedded", "stream": "ab" * 32, "length": 128, "windows": [0, 3]}


def test_a_calibrated_map_says_by_what(tmp_path):
    menu = Menu.parse(MENU.keys, quantizer="gptq,affinity")
    bitmap = make_bitmap(menu=menu, calibration=CALIBRATION)
    quantizer = bitmap.to_json()["quantizer"]
    assert quantizer == {"name": "gptq,affinity", "symmetric": False, "calibration": CALIBRATION}
    bitmap.write(tmp_path / "bitmap.json")
    assert BitMap.read(tmp_path / "bitmap.json") == bitmap


def test_other_maps_are_written_as_before_there_was_calibration():
    assert make_bitmap().to_json()["quantizer"] == {"name": "hqq", "symmetric": False}


@pytest.mark.parametrize(
    ("quantizer", "calibration", "message"),
    [
        ("gptq", None, "its calibration is missing"),
        ("hqq", CALIBRATION, "is not calibrated, but a calibration is given"),
        ("gptq", {**CALIBRATION, "windows": []}, "a list that is not empty"),
        ("gptq", {**CALIBRATION, "windows": [-1]}, "0 or more"),
        ("gptq", {**CALIBRATION, "windows": [True]}, "0 or more"),
        ("gptq", {**CALIBRATION, "length": 1}, "2 or more"),
        ("gptq", {**CALIBRATION, "stream": "../x"}, "64 hexadecimal digits"),
        ("gptq", {**CALIBRATION, "extra": 1}, "extra"),
        ("gptq", {"dataset": "embedded"}, "has no 'stream'"),
        ("gptq", [1], "JSON object"),
    ],
)
def test_calibrations_that_do_not_suit_are_refused(quantizer, calibration, message):
    menu = Menu.parse(MENU.keys, quantizer=quantizer)
    with pytest.raises(InputError, match=message):
        make_bitmap(menu=menu, calibration=calibration)
    data = make_bitmap().to_json()
    data["quantizer"]["name"] = quantizer
    if calibration is not None:
        data["quantizer"]["calibration"] = calibration
    with pytest.raises(InputError, match=message):
        BitMap.from_json(data)


def test_a_quantizer_has_one_spelling_in_a_map():
    data = make_bitmap().to_json()
    data["quantizer"] |= {"name": "gptq, affinity", "calibration": CALIBRATION}
    with pytest.raises(InputError, match="must be written 'gptq,affinity'"):
        BitMap.from_json(data)


def test_projections_interleave():
    chosen = np.arange(12) % 4
    bitmap = make_bitmap(chosen, serve="projection")
    first = bitmap.assignment["model.layers.0.mlp.experts"]
    assert first == {"gate_up": ["2", "4", "2"], "down": ["2g16", "16", "2g16"]}
    np.testing.assert_array_equal(bitmap.to_assignment(SPEC), chosen)


def test_order_of_layers_in_the_file_does_not_matter():
    bitmap = make_bitmap()
    data = bitmap.to_json()
    data["assignment"] = dict(reversed(data["assignment"].items()))
    assert BitMap.from_json(data).to_json() == bitmap.to_json()


def test_arrays_and_numpy_scalars_become_plain():
    bitmap = make_bitmap(constraints={"avg_bits": np.float32(3)})
    assert type(bitmap.constraints["avg_bits"]) is float
    assert type(bitmap.search["seed"]) is int


def test_other_model_is_refused():
    with pytest.raises(InputError, match="was made for the experts of tiny"):
        make_bitmap().to_assignment(make_spec(layers=3))


@pytest.mark.parametrize(
    "assignment",
    [np.zeros(5, int), np.full(6, 4), np.full(6, -1), np.zeros(6), np.zeros((1, 6), int)],
)
def test_misfitting_indices_are_refused(assignment):
    with pytest.raises(InputError, match="assignment"):
        assignment_from(SPEC, MENU, assignment)


def test_serving_granularity_is_enforced():
    with pytest.raises(InputError, match="mixes formats"):
        make_bitmap(serve="layer")
    assert make_bitmap((0, 0, 0, 2, 2, 2), serve="layer").serve == "layer"
    with pytest.raises(InputError, match="sets projections apart"):
        make_bitmap(np.zeros(12, int))


@pytest.mark.parametrize("value", [float("nan"), np.inf, np.array([np.nan])])
def test_results_that_are_not_finite_are_refused(value):
    with pytest.raises(InputError, match="finite"):
        make_bitmap(constraints={"avg_bits": value})


def test_replacing_a_part_validates_again():
    with pytest.raises(InputError, match="64 hexadecimal"):
        replace(make_bitmap(), model={**make_bitmap().model, "fingerprint": "x"})
