"""The hardware command and its files against users who are clumsy, nasty, or unlucky."""

import copy
import json
import os
import threading
from importlib import resources

import numpy as np
import pytest
from factories import write_bitmap

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hardware.__main__ import main
from dmpq.hw_models import Workload, load_hardware
from dmpq.hw_models.catalogue import MEASURED, list_hardware
from dmpq.hw_models.machine import cache_folder
from dmpq.hw_models.points import read_points
from dmpq.spec import load_geometry

SHIPPED = resources.files("dmpq.hw_models")
DEVICE = json.loads((SHIPPED / "a100.json").read_text())
ACCELERATOR = json.loads((SHIPPED / "accelerators" / "edge-tpu-like.json").read_text())
RECORD = SHIPPED / "recorded" / "host-amd-epyc.json"
HEAD = "kind,device,stack,model,precision,batch,context,value,unit,source"
ROWS = [
    f"moe_layer,a100,mine,mixtral-8x7b,{key},{2**i},,{ms + i},ms,me"
    for i in range(4)
    for key, ms in (("bf16", 9), ("int8", 8))
]


def mixtral():
    return (resources.files("dmpq") / "geometries" / "mixtral-8x7b.json").read_text()


@pytest.fixture
def refused(capsys):
    """Run the command; returns its one sentence."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert len(error) < 1000
        return error

    return run


def changed(data, *path, value):
    data = copy.deepcopy(data)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(data)


def _device(*path, value):
    return changed(DEVICE, *path, value=value)


def _accelerator(*path, value):
    return changed(ACCELERATOR, *path, value=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ('{"a', "it is no JSON (Unterminated string starting at, line 1 column 2)"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        (b"\xff\xfe", "it is no UTF-8 text (byte 0)"),
        (_device("schema", value="dmpq.device/2"), "but 'dmpq.device/2'"),
        (_device("name", value=" "), "' ' is no name"),
        (_device("name", value="x" * 61), "of at most 60 characters"),
        (_device("name", value="\x1b[31m"), "must be text without control codes"),
        (_device("description", value="\x1b[2J"), "must be text without control codes"),
        (_device("description", value="\u202edrac a"), "must be text without control codes"),
        (_device("note", value="\ud800"), "must be text without control codes"),
        (_device("sources", "\x1b[31m", value="x"), "a name in the device's sources"),
        (_device("sources", "tdp_w", value=" "), "tdp_w has neither a source"),
        (_device("stacks", 0, "source", value=""), "the device's stacks[0] has an empty source"),
        (
            _device("stacks", 0, "kernels", 1, "source", value=" "),
            "kernels[1] has an empty source",
        ),
        (
            _device("peaks", value="denser"),
            "is 'denser'; it must be one of dense, sparse (did you",
        ),
        (_device("stacks", 0, "kernels", 0, "math", value={}), "stacks[0].kernels[0].math is {}"),
        (_device("capacity_bytes", value=None), "capacity_bytes is null; it must be a finite"),
        (_accelerator("schema", value="dmpq.accelerator/2"), "accelerator file"),
        (_accelerator("name", value=""), "'' is no name"),
        (_accelerator("name", value="a/b"), "'a/b' is no name"),
        (_accelerator("sources", "zz", value="x"), "Unknown figure under sources or assumed 'zz'"),
        (_accelerator("assumed", value=[*ACCELERATOR["assumed"], "clock"]), "did you mean"),
        (RECORD.read_text(), "describes no device by its figures"),
    ],
)
def test_damaged_files_are_refused_in_a_users_words(refused, tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused("show", file)


def test_a_byte_order_mark_is_no_damage(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(DEVICE), encoding="utf-8-sig")
    assert load_hardware(str(file)).facts == load_hardware("a100").facts


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "long"])
def test_what_is_no_file_is_no_device(refused, tmp_path, kind):
    path = tmp_path / f"{'x' * 300 if kind == 'long' else 'x'}.json"
    if kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling"):
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    assert "There is no device file" in refused("show", path)


def test_a_pipe_is_not_waited_for(refused, tmp_path):
    pipe = tmp_path / "x.json"
    os.mkfifo(pipe)
    writer = threading.Timer(20, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))
    writer.daemon = True  # frees a command that waits, so that it fails here
    writer.start()
    assert "There is no device file" in refused("show", pipe)
    assert writer.is_alive()
    writer.cancel()


@pytest.mark.parametrize("name", [*MEASURED, "host/torch", "cuda/gemlite"])
def test_measured_hardware_has_nothing_to_show(refused, name):
    error = refused("show", name)
    assert "is measured when it is used" in error
    assert "did you mean" not in error


def test_what_has_no_stacks_says_so(refused, tmp_path):
    assert "simulated, so it has no kernel stacks" in refused("show", "edge-tpu-like/x")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ACCELERATOR))
    assert "without a kernel stack" in refused("show", f"{file}/x")
    assert "Unknown kernel stack of a100 ''" in refused("show", "a100/")
    device = tmp_path / "device.json"
    device.write_text(json.dumps(DEVICE))
    assert "Unknown kernel stack of a100 ''" in refused("show", f"{device}/")


@pytest.mark.parametrize("name", ["host", "CUDA", "a100"])
def test_an_accelerator_may_not_pass_for_something_else(tmp_path, name):
    file = tmp_path / "mine.json"
    file.write_text(_accelerator("name", value=name))
    with pytest.raises(InputError, match="give it another"):
        load_hardware(str(file))


class TestExplain:
    @pytest.fixture
    def bitmap(self, tmp_path):
        """Write a bit map, changed; returns its path."""

        def write(**hardware):
            path = write_bitmap(tmp_path)
            data = json.loads(path.read_text())
            data["hardware"] |= hardware
            path.write_text(json.dumps(data))
            return path

        return write

    def test_a_map_that_does_not_fit_is_refused(self, refused, bitmap):
        error = refused("explain", bitmap(), "--hw", "h100", "a100", "--batch", 10**6)
        assert "for KV cache, scores, and h100 has 80 GB, of which 90% may be used" in error

    def test_a_step_beyond_numbers_is_refused(self, refused, bitmap):
        for flag in ("--batch", "--context"):
            assert "at most 1,000,000,000" in refused("explain", bitmap(), flag, 10**30)

    @pytest.mark.parametrize("name", MEASURED)
    def test_nothing_is_measured_to_be_refused(self, refused, bitmap, monkeypatch, name):
        monkeypatch.setattr("dmpq.hw_models.live.host_model", None)
        monkeypatch.setattr("dmpq.hw_models.live.cuda_model", None)
        assert "is measured as a whole" in refused("explain", bitmap(), "--hw", name)

    @pytest.mark.parametrize(
        "hardware",
        [
            {"name": "mine", "stack": "x"},
            {"name": "host", "stack": "torch"},
            {"name": "edge-tpu-like", "stack": "SCALE-Sim"},
            {"stack": "zz"},
        ],
    )
    def test_no_other_device_stands_in_for_the_map_s_own(self, refused, bitmap, hardware):
        error = refused("explain", bitmap(**hardware))
        assert "of which there is no device file here; name an analytical device" in error
        assert len(error) < 250

    def test_other_figures_of_the_same_device_are_noted(self, capsys, bitmap):
        own = load_hardware("a100").source
        for source, noted in ((own, False), ("analytical; somebody's", True)):
            path = bitmap(name="a100", stack="gemlite", source=source)
            assert main(["explain", str(path)]) == 0
            assert (
                "made with other figures" in " ".join(capsys.readouterr().out.split())
            ) is noted


class TestFit:
    @pytest.fixture
    def points(self, tmp_path):
        """Write a file of points; returns its path."""

        def write(*lines, encoding="utf-8"):
            file = tmp_path / "points.csv"
            file.write_bytes("\n".join(lines).encode(encoding))
            return file

        return write

    def test_a_byte_order_mark_blank_lines_and_broken_quotes_are_read(self, points):
        row = ROWS[-1].replace(",me", ',"me,\nmyself"')
        found, _ = read_points(points(HEAD, "", ROWS[0], "", row, ROWS[1], encoding="utf-8-sig"))
        assert [p.name for p in found] == ["line 3", "line 5", "line 7"]
        assert found[1].source == "me,\nmyself"

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ((HEAD.replace(",", ";"), ROWS[0].replace(",", ";")), "with commas between them"),
            ((HEAD + ",value", ROWS[0] + ",1"), "has two columns 'value'"),
            ((HEAD, *[row + ",x" for row in ROWS]), "line 2: it has 11 values for 10 columns"),
            ((HEAD, "moe_layer,a100"), "line 2: it has 2 values for 10 columns"),
            ((HEAD, ROWS[0], ROWS[1], ROWS[0]), "line 4: it repeats line 2"),
            ((HEAD, ROWS[0].replace("me", '"a\nb"'), "x"), "line 4: it has 1 values"),
            ((HEAD, ROWS[0].replace(",9,", ",1_0,")), "value is '1_0'"),
            ((HEAD, ROWS[0].replace(",9,", ",९,")), "value is '९'"),
            ((HEAD, ROWS[0].replace(",1,", ",1000000001,")), "at most 1,000,000,000"),
            ((HEAD, ROWS[0].replace("mine", "a/b")), "line 2: 'a/b' is no name"),
            ((HEAD, ROWS[0].replace("mine", "\x1b[31m")), "is no name"),
            ((HEAD, ROWS[0].replace("bf16", "3g7")), "line 2: Group size 7 does not divide"),
            (("", "", ""), "it is empty"),
            ((HEAD, '"' + ROWS[0]), "cannot be read (unexpected end of data)"),
            (
                (HEAD, *[r.replace("a100", "a10") for r in ROWS]),
                "8 outside, unknown hardware 'a10'",
            ),
            ((HEAD, *[r.replace("a100", "A100") for r in ROWS]), "call the device 'A100'"),
            (
                (HEAD, *[r.replace("a100", "host") for r in ROWS]),
                "host is measured when it is used",
            ),
            ((HEAD, ROWS[0]), "has 1 measured point in scope"),
        ],
    )
    def test_damaged_points_are_refused(self, refused, points, lines, message):
        assert message in refused("fit", points(*lines))

    def test_the_device_wanted_is_named_where_there_is_none(self, refused, points):
        file = points(HEAD, *[row.replace("a100", "a10") for row in ROWS])
        assert "did you mean 'a100'?" in refused("fit", file, "--device", "a10/mine")

    @pytest.mark.parametrize("out", ["points.csv", "nowhere/x.json", "", ".", "x.txt"])
    def test_what_cannot_be_written_is_refused_before_the_fit(self, refused, points, out):
        file = points(HEAD, *ROWS)
        before = file.read_bytes()
        error = refused("fit", file, "--device", "a100/mine", "--out", file.parent / out)
        assert "is no .json file in a folder that exists" in error
        assert file.read_bytes() == before

    def test_a_file_that_the_system_refuses_is_named_as_given(self, capsys, points, monkeypatch):
        def denied(*_args):
            raise PermissionError(13, "Permission denied", ".out.json.a1b2c3")

        monkeypatch.setattr("dmpq.hardware.files.replace_atomically", denied)
        file = points(HEAD, *ROWS)
        out = file.parent / "out.json"
        assert main(["fit", str(file), "--device", "a100/mine", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"--out {out} cannot be written (Permission denied)" in error

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"schema": "dmpq.scope/1", "batch": [1, ' + "9" * 5000 + "]}", "too many digits"),
            ('{"schema": "dmpq.scope/1", "rows": [1, 2], "rows": [1, 3]}', "is written twice"),
            ('{"schema": "dmpq.scope/2"}', "but 'dmpq.scope/2'"),
            ("", "it is empty"),
        ],
    )
    def test_damaged_scopes_are_refused(self, refused, points, tmp_path, text, message):
        scope = tmp_path / "scope.json"
        scope.write_text(text)
        assert message in refused("fit", points(HEAD, *ROWS), "--scope", scope)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "--threads 0 makes no sense; give 1 to 1,024"),
        (("--threads", 100_000), "--threads 100000 makes no sense"),
        (("--bits", "4g7"), "Group size 7 does not divide"),
        (("--out", "nowhere/x.json"), "is no .json file in a folder that exists"),
        (("--batch", 10**12), "at most 1,000,000,000"),
    ],
)
def test_nothing_is_measured_for_flags_that_make_no_sense(
    refused, monkeypatch, arguments, message
):
    monkeypatch.setattr("dmpq.hw_models.live.host_model", None)
    assert message in refused("measure", *arguments)


def test_a_geometry_of_a_billion_layers_is_refused(tmp_path):
    config = {**json.loads(mixtral()), "num_hidden_layers": 10**9}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="layers"):
        load_geometry(str(file))


@pytest.mark.parametrize("name", list_hardware())
def test_the_largest_workload_has_finite_costs(name):
    model, work = load_hardware(name), Workload("prefill", 10**9, 10**9)
    spec = load_geometry("mixtral-8x7b")
    menu = Menu.parse("2,16")
    cost = model.cost(spec, menu, np.zeros((1, spec.num_experts), int), work)
    for values in (cost.latency_s, cost.memory_bytes, cost.energy_j):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("command", ["list", "show", "explain", "fit", "measure"])
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_cache_folder_must_be_absolute_for_measurements_and_simulations_alike(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    for kind in ("measurements", "systolic"):
        assert cache_folder(kind).is_absolute()
