"""``python -m dmpq.hardware``: what it prints, at 80 columns and as JSON, and its exit codes."""

import json
from pathlib import Path

import pytest

from dmpq.hardware.__main__ import main
from dmpq.hw_models import list_hardware
from dmpq.hw_models.catalogue import shipped

FILES = Path(__file__).parents[1] / "hw_models"


@pytest.fixture(autouse=True)
def _columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    try:
        code = main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_list_names_every_device_and_stack_within_80_columns(capsys):
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for name in list_hardware():
        assert f" {name} " in out
        for stack in shipped(name).stacks:
            assert stack.name in out
    (line,) = [line for line in out.splitlines() if " a100 " in line]
    assert line.split()[:6] == ["a100", "80", "2039", "312", "400", "gemlite,"]
    assert line.split()[-1] == "sglang"  # the one that was calibrated
    (line,) = [line for line in out.splitlines() if "coral" in line]
    assert "4*" in line


def test_list_as_json_says_units_in_names(capsys):
    code, out, _ = run(capsys, "list", "--json")
    devices = {device["name"]: device for device in json.loads(out)}
    assert code == 0
    assert list(devices) == list_hardware()
    assert devices["coral-edge-tpu"]["peak_math"] == "int8"
    assert devices["epyc-9654"]["bandwidth_bytes_per_s"] == 460.8e9
    assert "tdp_w" in devices["tpu-v5e"]["assumed"]


@pytest.mark.parametrize("name", list_hardware())
def test_show_prints_every_figure_and_source_within_80_columns(capsys, name):
    code, out, err = run(capsys, "show", name)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    device = shipped(name)
    assert device.description in words
    for stack in device.stacks:
        assert f"stack {name}/{stack.name}" in words
        for kernel in stack.kernels:
            assert f"{kernel.bits} bits: {kernel.source}" in words
    if device.note:
        assert device.note in words
    assert words.count("assumed") > len(device.assumed)


def test_show_marks_assumed_figures_and_says_what_widths_become(capsys):
    _, out, _ = run(capsys, "show", "coral")
    words = " ".join(out.split())
    assert "assumed: the host's memory" in words
    assert "0.8*" in words
    assert "2 x int8" in words
    assert "note: 2: coral-edge-tpu/tflite cannot store 2 bits; stored and timed as 8" in words
    assert "also coral, edge-tpu, edgetpu" in words
    _, out, _ = run(capsys, "show", "a100/sglang")
    assert "a100/gemlite" not in out
    published = shipped("a100").stack("sglang").kernel(4).memory_efficiency
    assert f" {published:g} " in out  # so without a mark


def test_show_prints_a_power_fit(capsys):
    _, out, _ = run(capsys, "show", "h100")
    power = shipped("h100").power
    assert f"{power.base_w:g} + {power.memory_w:g} m + {power.compute_w:g} c W" in out


def test_show_as_json_holds_every_figure(capsys):
    code, out, _ = run(capsys, "show", "coral-edge-tpu", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["figures"]["capacity_bytes"]["assumed"] is True
    assert shown["figures"]["tdp_w"] == {
        "value": 2.0,
        "source": "Coral USB Accelerator data sheet: 2 W at 4 TOPS",
        "assumed": False,
    }
    stack = shown["stacks"]["tflite"]
    assert stack["resident_bits"] == 8
    assert stack["kernels"]["16"]["passes"] == 2
    assert "memory_efficiency" in stack["kernels"]["8"]["assumed"]
    assert stack["widths"]["3"] == {"stored_bits": 8, "timed_as_bits": 8, "passes": 1}


def test_show_a_users_file_and_its_stack(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text((FILES / "a100.json").read_text())
    assert "stack a100/sglang" in run(capsys, "show", f"{file}/sglang")[1]


def test_show_ignores_markup_in_a_users_file(capsys, tmp_path):
    data = json.loads((FILES / "l4.json").read_text())
    data["description"] = "[red]a card[/red] :smile:"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    assert "[red]a card[/red] :smile:" in run(capsys, "show", str(file))[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("lst",), "'lst'"),
        (("show",), "name"),
        (("show", "a1000"), "did you mean 'a100'?"),
        (("show", "rtx 3060"), "did you mean"),
        (("show", "a100/gemlit"), "did you mean 'gemlite'?"),
        (("show", "nowhere.json"), "no device file nowhere.json"),
        (("show", "x" * 100_000), "Unknown hardware"),
        (("show", "host"), "host is measured when it is used"),
        (("list", "--jsn"), "--help"),
    ],
)
def test_bad_command_lines_end_in_one_sentence(capsys, arguments, message):
    error = refused(capsys, *arguments)
    assert message in error
    assert len(error) < 1000


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00", '{"schema": "dmpq.device/2"}'])
def test_bad_files_end_in_one_sentence(capsys, tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    assert "device file" in refused(capsys, "show", str(file))


def test_a_folder_named_like_a_file_is_refused(capsys, tmp_path):
    folder = tmp_path / "bad.json"
    folder.mkdir()
    assert "no device file" in refused(capsys, "show", str(folder))


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "list" in out
    assert "show" in out


def test_show_an_accelerator_within_80_columns(capsys):
    code, out, _ = run(capsys, "show", "edge-tpu-like")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "simulated" in out
    assert "480 MHz" in out
    assert "4: edge-tpu-like stores no 4-bit weights" in out
