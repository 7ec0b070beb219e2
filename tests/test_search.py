"""The command from outside: what it writes, that it repeats and resumes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources

import numpy as np
import pytest

from dmpq.agents import Recorder
from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.search import main

QUICK = [
    "--profile-tokens=256",
    "--search-tokens=512",
    "--selection-tokens=256",
    "--heldout-tokens=512",
    "--evaluations=6",
    "--bits=2,4,16",
    "--threads=1",
]
ROWS = ["bf16", "uniform4", "frequency", "mckp", "ppo"]
COLUMNS = {
    "name",
    "effective_bits",
    "heldout_kl",
    "heldout_ppl",
    "memory_bytes",
    "latency_s",
    "tokens_per_s",
    "energy_j",
    "evaluations",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    assert main([*QUICK, f"--out={out}"]) == 0
    return out


def test_everything_is_written(finished):
    names = {f.name for f in finished.iterdir()}
    assert names >= {
        "bitmap.json",
        "summary.json",
        "history.jsonl",
        "policy",
        "profile.safetensors",
        "journal.jsonl",
        "plane.png",
        "bits.png",
        "config.json",
    }
    assert not any(name.startswith(".") or "partial" in name for name in names)
    for picture in ("plane.png", "bits.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_every_row_and_column(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["hardware"]["kernels"].values()) == {
        f"gemlite, modelled at {bits} bits" for bits in (2, 4, 16)
    }
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ROWS
    for row in rows.values():
        assert set(row) == COLUMNS
        assert all(np.isfinite(value) for key, value in row.items() if key != "name")
    assert rows["bf16"]["heldout_kl"] == 0.0
    assert rows["uniform4"]["heldout_kl"] > 0
    assert rows["ppo"]["effective_bits"] <= 3.0
    assert rows["ppo"]["evaluations"] == 6
    assert rows["bf16"]["memory_bytes"] > rows["ppo"]["memory_bytes"]


def test_the_bit_map_says_what_it_is_and_fits_the_model(finished):
    from dmpq.moe import load_model

    bitmap = BitMap.read(finished / "bitmap.json")
    moe, _ = load_model()
    assignment = bitmap.to_assignment(moe.spec)
    stored = moe.spec.stored_bits(bitmap.menu)[np.arange(64)[:, None], [0, 1], assignment[:, None]]
    measured = bitmap.metrics["predicted"]["effective_bits"]["value"]
    assert stored.sum() / moe.spec.expert_parameters == pytest.approx(measured)
    assert bitmap.model["fingerprint"] == moe.fingerprint


def test_history_has_every_evaluation(finished):
    lines = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == [1, 2, 3, 4, 5, 6]


def run(*arguments, **options):
    command = [sys.executable, "-m", "dmpq.search", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_another_process_writes_the_same_bytes(finished, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    again = run(*QUICK, f"--out={tmp_path / 'again'}", env=environment)
    assert again.returncode == 0, again.stderr
    for name in ("bitmap.json", "history.jsonl", "profile.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_an_interrupted_run_goes_on_to_the_same_result(finished, tmp_path):
    out = tmp_path / "interrupted"
    command = [sys.executable, "-m", "dmpq.search", *QUICK, f"--out={out}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    partial = out / "history.partial.jsonl"
    while process.poll() is None and not (partial.exists() and partial.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    if process.returncode == 130:  # else it was quicker than the signal
        assert "best map so far" in output
        assert BitMap.read(out / "bitmap.partial.json")
        assert not (out / "bitmap.json").exists()
    journal = (out / "journal.jsonl").read_text()
    resumed = run(*QUICK, f"--out={out}")
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "journal.jsonl").read_text().startswith(journal.rpartition("\n")[0])
    for name in ("bitmap.json", "history.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_journal_with_a_torn_line_resumes(finished, tmp_path):
    out = tmp_path / "torn"
    shutil.copytree(finished, out)
    journal = out / "journal.jsonl"
    text = journal.read_text()
    journal.write_text(text[: len(text) // 2])
    assert main([*QUICK, f"--out={out}"]) == 0
    assert (out / "bitmap.json").read_bytes() == (finished / "bitmap.json").read_bytes()


def test_json_goes_to_standard_output_alone(finished, capsys):
    assert main([*QUICK, f"--out={finished}", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ROWS


def test_the_price_of_the_limit_is_in_the_summary_and_shown(finished, capsys):
    assert main([*QUICK, f"--out={finished}"]) == 0
    (price,) = json.loads((finished / "summary.json").read_text())["shadow_prices"].values()
    assert price["active"]
    assert price["nats_per_effective_bit"] > 0
    assert price["reward_per_effective_bit"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--avg-bits 3 is active: {price['nats_per_effective_bit']:.3g} nats of KL" in shown


def test_explain_says_where_the_cost_of_the_map_goes(finished, capsys):
    """On a finished run, and with no word on it in what the run is filed by."""
    before = (finished / "bitmap.json").read_bytes()
    assert main([*QUICK, f"--out={finished}", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "launches at 2" in shown
    summary = json.loads((finished / "summary.json").read_text())
    row, total = summary["rows"][-1], summary["explanation"]["total"]
    for name, value in (
        ("latency_s", total["latency_s"]),
        ("energy_j", total["energy_j"]),
        ("memory_bytes", total["stored_bytes"]),
    ):
        assert value == pytest.approx(row[name])
    assert (finished / "bitmap.json").read_bytes() == before


@pytest.fixture
def device(tmp_path):
    """Write a device file with another memory, and return its path."""

    def write(capacity_bytes):
        with resources.as_file(resources.files("dmpq.hw_models") / "a100.json") as path:
            data = json.loads(path.read_text())
        file = tmp_path / "small.json"
        file.write_text(json.dumps(data | {"name": "small", "capacity_bytes": capacity_bytes}))
        return file

    return write


def test_what_does_not_fit_the_device_is_marked_not_hidden(tmp_path, device, capsys):
    out = tmp_path / "run"
    small = device(0.4e9)
    assert main([*QUICK, "--agent=mckp", f"--hw={small}", "--avg-bits=4", f"--out={out}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory is limited to 0.36 GB: small has 0.4 GB, of which 90% may be used" in shown
    assert "uniform4 *" in shown
    assert "* does not fit: small has 0.4 GB" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["do_not_fit"] == ["bf16", "uniform4"]
    assert summary["rows"][-1]["memory_bytes"] <= 0.36e9
    assert summary["constraints"]["memory_bytes"] == pytest.approx(0.36e9)
    assert set(summary["shadow_prices"]) == {"avg_bits", "memory_bytes"}
    assert BitMap.read(out / "bitmap.json").constraints["memory_bytes"] == pytest.approx(0.36e9)


def test_a_model_larger_than_the_device_is_refused_before_any_forward(tmp_path, device, capsys):
    out = tmp_path / "run"
    assert main([*QUICK, f"--hw={device(0.3e9)}", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The smallest map takes 0.3")
    assert "small has 0.3 GB, of which 90% may be used; use a device with at least" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_limits_that_exclude_each_other_say_what_would_do(tmp_path, capsys):
    out = tmp_path / "run"
    limits = ["--avg-bits=3", "--latency-ms=0.3", "--energy-j=1"]
    assert main([*QUICK, *limits, f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No map was found that meets --avg-bits 3 and --latency-ms 0.3")
    assert "--latency-ms would have to be raised to about 0.5" in error
    assert "(the routing is not known yet)" in error
    assert not out.exists()


def test_an_agent_of_the_user_s_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dmpq.agents import Recorder\n"
        "class Narrow:\n"
        "    name = 'narrow'\n"
        "    def search(self, problem, *, evaluations, seed, on_candidate=None):\n"
        "        recorder = Recorder(problem, evaluations=evaluations)\n"
        "        recorder.evaluate(problem.uniform('2')[None])\n"
        "        return recorder.result()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*QUICK, "--agent=mine:Narrow", f"--out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert rows[-1]["name"] == "narrow"
    assert rows[-1]["effective_bits"] == min(row["effective_bits"] for row in rows)


class Silent:
    """Evaluates without a word to ``on_candidate``."""

    name = "silent"

    def search(self, problem, *, evaluations, seed, on_candidate=None):
        del seed, on_candidate
        recorder = Recorder(problem, evaluations=evaluations)
        recorder.evaluate(np.stack([problem.uniform("2"), problem.mckp()]))
        return recorder.result()


def test_history_does_not_depend_on_what_an_agent_reports(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "silent", sys.modules[__name__])
    out = tmp_path / "run"
    assert main([*QUICK, "--agent=silent:Silent", f"--out={out}"]) == 0
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == [1, 2]
    assert set(lines[0]["assignment"]) == {"2"}


def test_full_precision_has_a_row_whatever_the_menu(tmp_path, finished):
    out = tmp_path / "run"
    assert main([*QUICK, "--bits=2,4", "--agent=mckp", f"--out={out}"]) == 0
    rows, others = (
        json.loads((folder / "summary.json").read_text())["rows"] for folder in (out, finished)
    )
    assert [row["name"] for row in rows] == ["bf16", "uniform4", "frequency", "mckp"]
    assert rows[0] == others[0]


@pytest.mark.parametrize("serve", ["layer", "projection"])
def test_other_serving_granularities(tmp_path, serve):
    assert main([*QUICK, f"--serve={serve}", "--agent=mckp", f"--out={tmp_path / serve}"]) == 0
    bitmap = BitMap.read(tmp_path / serve / "bitmap.json")
    for keys in bitmap.assignment.values():
        assert (len(set(keys)) == 1) if serve == "layer" else set(keys) == {"gate_up", "down"}


def test_every_field_is_a_flag_of_the_same_name_and_default():
    import argparse

    from dmpq.config import add_options, from_arguments

    parser = argparse.ArgumentParser()
    add_options(parser)
    assert from_arguments(parser.parse_args([])) == SearchConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hw=a10o"], "did you mean 'a100'"),
        (["--agent=pppo"], "did you mean 'ppo'"),
        (["--agent=nowhere:Nothing"], "cannot be imported"),
        (["--bits=2,5"], "Bit-width 5 is not on offer"),
        (["--avg-bits=1.5"], "1.5"),
        (["--avg-bits=-3"], "-3"),
        (["--avg-bits=nan"], "nan"),
        (["--avg-bits=1e-300"], "1e-300"),
        (["--memory-gb=1e300"], "--memory-gb 1e+300 makes no sense"),
        (["--memory-gb=1e-300"], "--memory-gb 1e-300"),
        (["--memory-gb=nan"], "nan"),
        (["--latency-ms=1e-300"], "--latency-ms 1e-300"),
        (["--energy-j=1e-300"], "--energy-j 1e-300"),
        (["--memory-gb=0.0001"], "memory"),
        (["--latency-ms=0.000001"], "latency"),
        (["--latency-ms=0.1", "--batch=8"], "the least time in ms"),
        (["--evaluations=0"], "--evaluations 0"),
        (["--search-tokens=0"], "--search-tokens 0"),
        (["--sequence-length=1"], "--sequence-length 1"),
        (["--sequence-length=4096"], "give 2 to 128"),
        (["--threads=0"], "--threads 0"),
        (["--seed=-1"], "--seed -1"),
        (["--device=cuda"], "cannot be used"),
        (["--device=abacus"], "cannot be used"),
        (["--weights=acc=x"], "acc"),
        (["--weights=speed=1"], "speed"),
        (["--cost-geometry=olmoe-1b-7"], "did you mean"),
        (["--model=nobody/nothing"], "hub has not delivered"),
        (["--model=referense"], "did you mean 'reference'"),
        (["--dataset=nothing.txt"], "hub has not delivered"),
        (["--dataset=embeded"], "did you mean 'embedded'"),
        (["--profile=nothing.safetensors"], "There is no profile"),
        (["--quantizer=hq"], "did you mean 'hqq'"),
        (["--serve=experts"], "did you mean 'expert'"),
    ],
)
def test_bad_input_ends_with_two_and_one_sentence(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main([*QUICK, f"--out={out}", *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize("argument", ["--no-such-flag", "--seed=x", "--avg-bits"])
def test_a_command_line_of_no_sense_is_refused_in_one_line(capsys, argument):
    with pytest.raises(SystemExit) as ended:
        main([argument])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert argument.partition("=")[0] in error


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([f"--model={tmp_path / 'empty'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "holds no checkpoint" in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_another_configuration_is_left_alone(finished, capsys):
    before = (finished / "bitmap.json").read_bytes()
    assert main([*QUICK, "--seed=1", f"--out={finished}"]) == 2
    assert "run of another configuration" in " ".join(capsys.readouterr().err.split())
    assert (finished / "bitmap.json").read_bytes() == before


def test_limits_in_the_wrong_unit_are_only_generous(tmp_path):
    out = tmp_path / "generous"
    assert main([*QUICK, "--agent=mckp", "--memory-gb=8e10", f"--out={out}"]) == 0


@pytest.mark.parametrize("content", ["[]", "{", '{"digest": 3}'])
def test_a_folder_with_a_damaged_mark_is_left_alone(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert main([*QUICK, f"--out={tmp_path}"]) == 2
    assert "damaged config.json" in " ".join(capsys.readouterr().err.split())


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, f"--out={tmp_path / 'file' / 'run'}"]) == 2
    assert "cannot be used" in " ".join(capsys.readouterr().err.split())


def test_a_policy_answers_for_other_budgets_at_once(finished, tmp_path, capsys):
    out, policy = tmp_path / "run", finished / "policy"
    quick = [*QUICK, f"--policy={policy}", f"--out={out}", "--avg-bits=4"]
    assert main([*quick, "--evaluations=1", "--signal=gradient"]) == 0
    told = capsys.readouterr().out
    assert "estimated from gradients" in told
    lines = (out / "history.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["effective_bits"] <= 4


def test_a_front_of_one_policy(finished, tmp_path, capsys):
    out = tmp_path / "run"
    profile = finished / "profile.safetensors"
    flags = [f"--policy={finished / 'policy'}", f"--profile={profile}", f"--out={out}"]
    assert main([*QUICK, *flags, "--front"]) == 0
    told = capsys.readouterr().out
    assert told.count("policy  ") == told.count("mckp  ") == 10
    maps = sorted((out / "maps").iterdir())
    assert len(maps) == 10
    bits = [BitMap.read(path).metrics["predicted"]["effective_bits"]["value"] for path in maps]
    assert bits == sorted(bits)
    assert all(size <= float(path.stem[5:]) + 0.005 for path, size in zip(maps, bits, strict=True))
    names = (out / "front.csv").read_text().splitlines()
    assert len(names) == 21
    assert (out / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--front"], "name it by --policy"),
        (["--policy=nowhere"], "There is no policy at nowhere"),
        (["--policy=nowhere", "--agent=mckp"], "'mckp' takes none"),
    ],
)
def test_a_policy_that_cannot_be_asked_is_refused(flags, words, tmp_path, capsys):
    assert main([*QUICK, *flags, f"--out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_a_profile_of_another_signal_is_refused(finished, tmp_path, capsys):
    profile = finished / "profile.safetensors"
    flags = [f"--profile={profile}", "--signal=gradient", f"--out={tmp_path / 'run'}"]
    assert main([*QUICK, *flags]) == 2
    assert "give --signal sensitivity" in capsys.readouterr().err


def test_a_search_on_further_text_goes_on_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr("dmpq.further_text.PIECE_TOKENS", 256)
    flags = [*QUICK[:-3], "--search-tokens=256", "--evaluations=80", *QUICK[-2:]]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*flags, "--further-tokens=2048", f"--out={one}"]) == 0
    history = [json.loads(line) for line in (one / "history.jsonl").read_text().splitlines()]
    texts = [line["text"] for line in history if "text" in line]
    assert len(texts) > 40
    assert len(set(texts)) >= 4
    assert [line.get("text") for line in history][:: len(history) - 1] == [None, None]
    shutil.copytree(one, two)
    for name in ("bitmap.json", "history.jsonl", "summary.json"):
        (two / name).unlink()
    journal = (one / "journal.jsonl").read_text().splitlines(keepends=True)
    (two / "journal.jsonl").write_text("".join(journal[: len(journal) * 2 // 3]))
    assert main([*flags, "--further-tokens=2048", f"--out={two}"]) == 0
    for name in ("bitmap.json", "history.jsonl", "journal.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
