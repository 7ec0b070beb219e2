"""Calibration: known parameters recovered through the model, leaving out, errors, device files."""

import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.console import CommandParser, plain_console
from dmpq.errors import InputError
from dmpq.hardware import fit as hardware_fit
from dmpq.hw_models import calibration, load_hardware
from dmpq.hw_models.analytical import AnalyticalModel
from dmpq.hw_models.base import Workload
from dmpq.hw_models.calibrated_file import file_bytes, only, updated
from dmpq.hw_models.calibration import (
    choose_parameters,
    fit,
    leave_one_out,
    predict,
    predict_power,
    starting_stack,
    with_power,
)
from dmpq.hw_models.calibration_errors import calibrate, errors, ordering
from dmpq.hw_models.device import Kernel, Power, Stack, read_device
from dmpq.hw_models.points import COLUMNS, Point, geometry, layer_alone, precision

A100 = load_hardware("a100").facts
FILES = Path(__file__).parents[1] / "hw_models"
TOKENS = (1, 16, 1024, 8192)
TRUE = Stack(
    name="mine",
    kernels=(
        Kernel(4, "bf16", 0.61, 0.22, 3.1e-5, "true"),
        Kernel(16, "bf16", 0.83, 0.41, 1.7e-5, "true"),
    ),
    tile_rows=16,
    dense_memory_efficiency=0.77,
    dense_compute_efficiency=0.52,
    layer_s=2.3e-5,
    step_s=0.0,
    sequence_s=4.1e-5,
    source="true",
)


@pytest.fixture
def one_tile(monkeypatch):
    """Tile rows are not searched: three times as fast."""
    monkeypatch.setattr(calibration, "LAYER_TILES", (16,))
    monkeypatch.setattr(calibration, "MATRIX_TILES", (16,))


def layers(names=("int4", "bf16"), models=("mixtral-8x7b", "qwen3-30b-a3b"), tokens=TOKENS):
    return [
        Point(f"{m} {n} {t}", "moe_layer", "a100", "mine", m, precision(n), t, 0, 1.0)
        for m in models
        for n in names
        for t in tokens
    ]


def steps(models=("olmoe-1b-7b", "llama-3.1-8b"), batches=(1, 8, 32, 128)):
    return [
        Point(f"{m} {b}", "decode", "a100", "mine", m, precision("bf16"), b, 600, 1.0)
        for m in models
        for b in batches
    ]


def measured(points, stack=TRUE, device=A100):
    """Return the points with the values that the model gives them."""
    values, watts = predict(device, stack, points), predict_power(device, stack, points)
    return [
        replace(
            p, value=float(v), power_w=float(w) if device.power and not math.isnan(w) else None
        )
        for p, v, w in zip(points, values, watts, strict=True)
    ]


def estimates(found):
    return {e.name: e.value for e in found.estimates}


@pytest.mark.usefixtures("one_tile")
def test_known_parameters_are_recovered():
    points = measured(layers() + steps())
    found = fit(A100, starting_stack(A100, "mine", points), points)
    for name, value in estimates(found).items():
        outer, _, figure = name.rpartition(".")
        owner = TRUE.kernel(int(outer.split(".")[1])) if outer else TRUE
        assert value == pytest.approx(getattr(owner, figure), rel=0.01), name
    assert not any(e.at_bound for e in found.estimates)
    np.testing.assert_allclose(predict(A100, found.stack, points), [p.value for p in points], 0.01)


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_tile_rows_are_recovered(tile_rows):
    slow = tuple(replace(k, compute_efficiency=0.02) for k in TRUE.kernels)
    points = measured(layers(("bf16",)), replace(TRUE, tile_rows=tile_rows, kernels=slow))
    found = fit(A100, starting_stack(A100, "mine", points), points)
    assert found.stack.tile_rows == tile_rows


@pytest.mark.usefixtures("one_tile")
def test_power_is_recovered():
    device = with_power(A100, Power(90.0, 120.0, 400.0))
    points = measured(layers(("bf16",)) + steps(), device=device)
    found = fit(A100, starting_stack(A100, "mine", points), points)
    told = [p for p in points if p.power_w is not None]
    watts = predict_power(found.device, found.stack, told)
    np.testing.assert_allclose(watts, [p.power_w for p in told], rtol=0.05)
    assert len(told) == 8


@pytest.mark.usefixtures("one_tile")
def test_speedups_recover_the_ceiling():
    true = replace(
        TRUE,
        kernels=(
            replace(
                TRUE.kernels[1], bits=4, compute_efficiency=0.2, dequantized_weights_per_s=1.5e12
            ),
            TRUE.kernels[1],
        ),
    )
    points = measured(
        [
            Point(f"{n} {m}", "speedup", "a100", "mine", f"{n}x{n}", precision("4"), m, 0, 1.0)
            for n in (4096, 8192, 16384)
            for m in (1, 16, 64, 128, 256, 1024)
        ],
        true,
    )
    start = replace(
        true, kernels=(replace(true.kernels[0], compute_efficiency=0.9), true.kernels[1])
    )
    found = estimates(fit(A100, start, points))
    assert found["kernels.4.dequantized_weights_per_s"] == pytest.approx(1.5e12, rel=0.02)
    assert found["kernels.4.compute_efficiency"] == pytest.approx(0.2, rel=0.02)
    assert found["kernels.16.compute_efficiency"] == pytest.approx(0.41, rel=0.02)


def test_predictions_are_those_of_the_analytical_model():
    """A decode point is the model's latency; a layer its experts, launches and activations."""
    (decode,) = steps(("olmoe-1b-7b",), (8,))
    spec = geometry("olmoe-1b-7b").spec
    maps = np.zeros((1, spec.num_experts), int)
    menu = decode.precision.menu
    model = AnalyticalModel(A100, TRUE)
    whole = model.cost(spec, menu, maps, Workload(batch=8, context=600)).latency_s[0]
    assert predict(A100, TRUE, [decode])[0] == whole
    (layer,) = layers(("int4",), ("mixtral-8x7b",), (16,))
    mixtral = geometry("mixtral-8x7b").spec.moe_layers[0]
    assert layer_alone(mixtral).num_experts == 8
    kernel, weights = TRUE.kernel(4), 3 * 4096 * 14336
    bytes_s = 8 * weights * 4.125 / 8 / (0.61 * A100.bandwidth_bytes_per_s)
    flops_s = 8 * 16 * 2 * weights / (0.22 * 312e12)
    activations = 16 * 2 * (2 * 4096 + 3 * 14336) * 2 / (0.77 * A100.bandwidth_bytes_per_s)
    slow_twin = (bytes_s**4 + flops_s**4) ** 0.25 + kernel.launch_s + activations
    assert predict(A100, TRUE, [layer])[0] == pytest.approx(slow_twin, rel=1e-4)


def test_a_dense_model_has_no_experts_to_pay_for():
    (point,) = steps(("llama-3.1-8b",), (1,))
    slow = replace(TRUE, kernels=tuple(replace(k, launch_s=1e-2) for k in TRUE.kernels))
    assert predict(A100, slow, [point]) == pytest.approx(predict(A100, TRUE, [point]), rel=1e-9)
    read = 7.5e9 * 2 / (0.77 * A100.bandwidth_bytes_per_s) + 32 * 2.3e-5
    assert predict(A100, TRUE, [point])[0] == pytest.approx(read, rel=0.02)


@pytest.mark.usefixtures("one_tile")
def test_leaving_out_really_leaves_out():
    """Whatever one model's points say, they do not touch their own prediction."""
    points = measured(layers())
    lies = [replace(p, value=p.value * 7) if "qwen" in p.model else p for p in points]
    start = starting_stack(A100, "mine", points)
    honest, lied = (leave_one_out(A100, start, those)[0] for those in (points, lies))
    qwen = np.array(["qwen" in p.model for p in points])
    np.testing.assert_array_equal(honest[qwen], lied[qwen])
    assert (np.abs(lied[~qwen] / honest[~qwen] - 1) > 0.2).all()


@pytest.mark.usefixtures("one_tile")
def test_a_fit_does_not_begin_where_an_earlier_one_ended():
    points = measured(layers())
    start = starting_stack(A100, "mine", points)
    first = fit(A100, start, points)
    assert fit(A100, first.stack, points) == replace(first)
    np.testing.assert_array_equal(
        leave_one_out(A100, start, points)[0], leave_one_out(A100, first.stack, points)[0]
    )


@pytest.mark.usefixtures("one_tile")
def test_a_width_left_out_borrows_from_the_next_wider():
    points = measured(layers(("bf16",)) + layers(("int4",), ("mixtral-8x7b",)))
    start = starting_stack(A100, "mine", points)
    left, _ = leave_one_out(A100, start, points)
    four = [i for i, p in enumerate(points) if p.precision.bits == 4]
    wide = replace(TRUE, kernels=(replace(TRUE.kernels[1], bits=4), TRUE.kernels[1]))
    expected = predict(A100, wide, [points[i] for i in four])
    np.testing.assert_allclose(left[four], expected, rtol=0.02)


@pytest.mark.usefixtures("one_tile")
def test_points_of_one_model_cannot_be_left_out():
    points = measured(layers(models=("mixtral-8x7b",)))
    found = calibrate(A100, "mine", points)
    assert found.held_out is None
    assert not found.calibrated
    assert found.in_sample.mape < 0.01


def test_parameters_are_those_that_points_can_tell():
    start = starting_stack(A100, "mine", layers())
    figures = [f"kernels.16.{f}" for f in ("memory_efficiency", "compute_efficiency", "launch_s")]
    for count, told in ((3, 2), (4, 3), (5, 3)):
        some = layers(("bf16",), ("mixtral-8x7b",), TOKENS[:count])
        assert list(choose_parameters(start, some)) == figures[:told]
    assert "layer_s" in choose_parameters(start, layers() + steps())
    assert "layer_s" not in choose_parameters(start, layers() + steps(batches=(8, 16)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(layers() + steps()), min_size=3, max_size=24, unique=True))
def test_there_are_always_fewer_parameters_than_points(points):
    names = choose_parameters(starting_stack(A100, "mine", points), points)
    assert len(names) < len(points)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_points_are_refused(count):
    with pytest.raises(
        InputError, match=f"has {count} measured points? in scope; give at least 3"
    ):
        calibrate(A100, "mine", layers()[:count])


@pytest.mark.usefixtures("one_tile")
def test_a_parameter_at_its_bound_is_said():
    points = measured(layers(("bf16",)))
    impossible = [replace(p, value=p.value / 3) for p in points]
    found = fit(A100, starting_stack(A100, "mine", points), impossible)
    bound = {e.name for e in found.estimates if e.at_bound}
    assert "kernels.16.memory_efficiency" in bound


def test_errors_and_ordering_are_what_they_are_called():
    found = errors(np.array([1.1, 0.8]), np.array([1.0, 1.0]))
    assert (found.mape, found.bias, found.n) == (pytest.approx(0.15), pytest.approx(-0.05), 2)
    points = [
        replace(p, value=v) for p, v in zip(layers(tokens=(1, 16)), range(1, 9), strict=True)
    ]
    right = np.array([p.value for p in points])
    assert ordering(points, right).tau == 1
    assert ordering(points, -right).tau == -1
    assert ordering(points, np.ones(8)).tau == 0
    assert ordering(points, right).groups == 4
    assert ordering(points[:1], right[:1]) is None


@pytest.mark.usefixtures("one_tile")
def test_device_files_take_the_figures_and_keep_the_rest(tmp_path):
    points = measured(layers())
    found = calibrate(A100, "mine", points)
    before = json.loads((FILES / "a100.json").read_text("utf-8"))
    data = updated(before, found, origin="a test")
    assert [s for s in data["stacks"] if s["name"] != "mine"] == before["stacks"]
    assert {k: v for k, v in data.items() if k not in ("stacks", "sources")} == {
        k: v for k, v in before.items() if k not in ("stacks", "sources")
    }
    again = updated(data, found, origin="a test")
    assert file_bytes(again) == file_bytes(data)
    file = tmp_path / "mine.json"
    file.write_bytes(file_bytes(data))
    device = read_device(file)
    stack = device.stack("mine")
    assert stack.calibrated
    assert not device.calibrated
    assert "fitted to 16 points of a test" in stack.source
    np.testing.assert_array_equal(predict(device, stack, points), found.predicted)
    file.write_bytes(file_bytes(only(data, ["mine"])))
    assert read_device(file).calibrated


@pytest.mark.usefixtures("one_tile")
def test_ratios_alone_do_not_make_a_profile_calibrated():
    points = measured(
        [
            Point(f"{n} {m}", "speedup", "a100", "mine", f"{n}x{n}", precision("4"), m, 0, 1.0)
            for n in (4096, 8192)
            for m in (1, 64, 1024)
        ]
    )
    found = calibrate(A100, "mine", points)
    assert found.held_out is not None
    assert not found.calibrated


def _run(*arguments):
    parser = CommandParser(prog="test")
    hardware_fit.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["fit", *map(str, arguments)])
    return parsed.run(parsed, plain_console())


def _csv(path, points):
    units = defaultdict(lambda: "s", speedup="x")
    rows = [
        f"{p.kind},{p.device},{p.stack},{p.model},{_NAMES[p.precision.bits]},{p.batch},"
        f"{p.context or ''},{p.value!r},{units[p.kind]},test"
        for p in points
    ]
    path.write_text("\n".join((",".join(COLUMNS), *rows)) + "\n")
    return path


_NAMES = {4: "int4", 16: "bf16"}


@pytest.mark.usefixtures("one_tile")
def test_the_command_prints_and_writes_the_same_bytes_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    points = _csv(tmp_path / "points.csv", measured(layers()))
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file in files:
        assert _run(points, "--device", "a100/mine", "--out", file) == 0
    said = capsys.readouterr().out
    assert "kernels.4.launch_s" in said
    assert "models left out" in said
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 80
    assert files[0].read_bytes() == files[1].read_bytes()
    model = load_hardware(str(files[0]))
    assert model.calibrated
    assert model.stack == "mine"
    assert "not fitted: dense_memory_efficiency" in model.source


@pytest.mark.usefixtures("one_tile")
def test_a_users_own_device_file_is_fitted(tmp_path):
    own, out = tmp_path / "own.json", tmp_path / "out.json"
    content = json.loads((FILES / "a100.json").read_text("utf-8"))
    own.write_bytes(file_bytes({**content, "name": "own"}))
    points = [replace(p, device=str(own)) for p in measured(layers(("bf16",)))]
    name = f"{own}/mine"
    assert _run(_csv(tmp_path / "p.csv", points), "--device", name, "--out", out) == 0
    assert load_hardware(str(out)).name == "own"


@pytest.mark.usefixtures("one_tile")
def test_the_command_prints_json(tmp_path, capsys):
    points = _csv(tmp_path / "points.csv", measured(layers()))
    assert _run(points, "--json") == 0
    (profile,) = json.loads(capsys.readouterr().out)["profiles"]
    assert (profile["device"], profile["stack"], profile["points"]) == ("a100", "mine", 16)
    assert profile["held_out"]["mape"] < 0.01
    assert profile["held_order"]["tau"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "a100/mind"), "did you mean 'a100/mine'"),
        (("--out", "x.json"), "say which by --device"),
        (("--scope", "nowhere.json"), "cannot be read"),
    ],
)
def test_bad_commands_are_refused(tmp_path, arguments, message):
    points = _csv(tmp_path / "points.csv", measured(layers()))
    with pytest.raises(InputError, match=message):
        _run(points, *arguments)


def test_a_file_without_enough_points_is_refused(tmp_path):
    points = _csv(tmp_path / "points.csv", measured(layers()[:2]))
    with pytest.raises(InputError, match="with enough points to fit"):
        _run(points)
    strange = [replace(p, device="a9000") for p in measured(layers())]
    with pytest.raises(InputError, match="with enough points to fit"):
        _run(_csv(tmp_path / "points.csv", strange))


def test_there_is_one_formula():
    """The module that fits prices nothing itself."""
    text = Path(calibration.__file__).read_text("utf-8")
    assert "power_mean" not in text
    assert "bandwidth_bytes_per_s" in text  # in the rule about caches only
    assert text.count("bandwidth_bytes_per_s") == 1


def test_parser_is_added_to_others():
    parser = argparse.ArgumentParser()
    hardware_fit.add_parser(parser.add_subparsers())
    assert parser.parse_args(["fit", "x.csv"]).run is hardware_fit.run
