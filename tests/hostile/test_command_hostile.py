"""The search command against users who are clumsy, nasty, or unlucky."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dmpq import report
from dmpq import search as module
from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.files import JsonLines
from dmpq.moe import load_model, reference_path
from dmpq.profile import Profile
from dmpq.run_folder import only_run_in
from dmpq.search import main
from dmpq.session import Session

QUICK = [
    "--agent=mckp",
    "--profile-tokens=128",
    "--search-tokens=128",
    "--selection-tokens=128",
    "--heldout-tokens=128",
    "--evaluations=2",
    "--bits=2,4",
    "--quantizer=rtn",
    "--avg-bits=4",
    "--threads=1",
]


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Search a tiny model on a short text by default, and draw nothing."""
    folder = tmp_path_factory.mktemp("small")
    model = build("olmoe")
    model.resize_token_embeddings(257, mean_resizing=False)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(map(str, range(3000))))
    with pytest.MonkeyPatch.context() as patch:
        arguments = [f"--model={folder / 'model'}", f"--dataset={folder / 'text.txt'}"]
        patch.setattr(sys.modules[__name__], "QUICK", [*arguments, *QUICK])
        for name in ("plane", "heat_map", "save_figure"):
            patch.setattr(report, name, lambda *_args, **_options: None)
        yield folder


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "run"
    assert main([*QUICK, f"--out={out}"]) == 0
    return out


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command into a folder of its own; returns its one line on standard error."""

    def refused(*arguments, out=tmp_path / "out"):
        capsys.readouterr()
        assert main([*QUICK, f"--out={out}", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return refused


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hw=A10", "did you mean 'a100'"),
        ("--agent=PPO", "did you mean 'ppo'"),
        ("--agent=a:b:c", "The agent 'a:b:c'"),
        ("--cost-geometry=", "Unknown geometry ''"),
        ("--bank-memory-gb=nan", "--bank-memory-gb nan"),
        ("--bank-memory-gb=inf", "--bank-memory-gb inf"),
        ("--bank-memory-gb=-1", "--bank-memory-gb -1"),
        ("--batch=99999999999999999999999999", "give 1 to"),
        ("--context=99999999999999999999999999", "give 1 to"),
        ("--seed=4294967296", "give 0 to 4,294,967,295"),
        ("--evaluations=99999999999999999999", "give 1 to"),
        ("--threads=1000000000", "give 1 to 1,024"),
        ("--weights=acc=0,lat=0", "weight above 0"),
        ("--weights=acc=1e308,lat=1e308", "none above"),
        ("--device=meta", "device 'meta' cannot be used"),
        ("--device=hpu", "device 'hpu' cannot be used"),
        ("--device=mps", "device 'mps' cannot be used"),
        ("--revision=main", "has no revisions"),
        ("--out=", "--out is empty"),
        ("--profile=", "There is no profile"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(run, monkeypatch, argument, message):
    monkeypatch.setattr(Session, "profile", None)  # nothing may be measured first
    error = run(argument)
    assert message in error
    assert len(error) < 600


def test_a_device_with_a_number_computes_like_one_without():
    moe, _ = load_model(device="cpu:0")
    assert {p.dtype for p in moe.model.parameters()} == {torch.float32}


AGENTS = """
import numpy as np
from dataclasses import replace
from dmpq.agents import Recorder
class Good:
    name = "good"
    def search(self, problem, *, evaluations, seed, on_candidate=None):
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        recorder.evaluate(problem.mckp()[None])
        return self.end(problem, recorder, recorder.result())
class Nothing(Good):
    def end(self, problem, recorder, result): return None
class Raises(Good):
    def end(self, problem, recorder, result): raise ZeroDivisionError("boom\\nsecond line")
class Exits(Good):
    def end(self, problem, recorder, result): raise SystemExit(0)
class Greedy(Good):
    def end(self, problem, recorder, result): recorder.evaluate(np.eye(9, 16, dtype=int))
class Wide(Good):
    def end(self, problem, recorder, result):
        return replace(result, assignment=problem.uniform("4"))
class Short(Good):
    def end(self, problem, recorder, result):
        return replace(result, assignment=result.assignment[1:])
class Floats(Good):
    def end(self, problem, recorder, result):
        return replace(result, assignment=result.assignment * 1.0)
class Negative(Good):
    def end(self, problem, recorder, result):
        return replace(result, assignment=result.assignment * 0 - 1)
class Forgetful(Good):
    def end(self, problem, recorder, result): return replace(result, history=())
class Policy(Good):
    def end(self, problem, recorder, result): return replace(result, policy="x")
class OldSignature(Good):
    def search(self, problem): pass
class Mckp(Good):
    name = "mckp"
class Number(Good):
    name = 7
class Escape(Good):
    name = "\\x1b[31m"
class Unmade(Good):
    def __init__(self): raise RuntimeError("no\\nway")
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Nothing", "returned a NoneType; it must be a SearchResult"),
        ("Raises", "failed (ZeroDivisionError: boom)"),
        ("Exits", "failed (SystemExit: 0)"),
        ("Greedy", "failed (OutOfEvaluations)"),
        ("Wide", "a map outside the limits"),
        ("Short", "it must be 16 integers from 0 to 1"),
        ("Floats", "it must be 16 integers from 0 to 1"),
        ("Negative", "it must be 16 integers from 0 to 1"),
        ("Forgetful", "no history"),
        ("Policy", "a str as policy"),
        ("OldSignature", "failed (TypeError"),
        ("Mckp", "calls itself 'mckp'"),
        ("Number", "has the name 7"),
        ("Escape", "has the name '\\x1b[31m'"),
        ("Unmade", "cannot be made (RuntimeError: no)"),
    ],
)
def test_an_agent_that_misbehaves_is_named(finished, tmp_path, run, monkeypatch, kind, message):
    (tmp_path / "bad_agents.py").write_text(AGENTS)
    monkeypatch.syspath_prepend(tmp_path)
    error = run(f"--agent=bad_agents:{kind}", f"--profile={finished / 'profile.safetensors'}")
    assert message in error
    out = tmp_path / "out"
    assert not (out / "bitmap.json").exists()
    if kind == "Raises":
        assert "in end" in (out / "agent_error.txt").read_text()
        assert BitMap.read(out / "bitmap.partial.json").search["evaluations"] == 1


def test_a_folder_with_somebody_s_files_is_left_alone(run, tmp_path):
    (tmp_path / "bitmap.json").write_text("mine")
    assert "may be somebody else's" in run(out=tmp_path)
    assert (tmp_path / "bitmap.json").read_text() == "mine"
    assert [f.name for f in tmp_path.iterdir()] == ["bitmap.json"]


def test_a_second_run_in_the_same_folder_is_refused(finished, run, monkeypatch):
    with only_run_in(finished):
        assert "Another run is at work" in run(out=finished)


def test_a_damaged_partial_map_does_not_cost_the_best_one(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "bitmap.partial.json").write_text("{")

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_rows", interrupted)
    assert main([*QUICK, f"--out={out}"]) == 130
    assert BitMap.read(out / "bitmap.partial.json").search["evaluations"] == 1
    assert "best map so far" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("moment", ["profile", "_searched", "_rows", "_finish"])
def test_interrupted_at_any_moment_the_same_command_ends_the_same(
    finished, tmp_path, monkeypatch, moment
):
    out = tmp_path / "run"

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session if moment == "profile" else module, moment, interrupted)
        assert main([*QUICK, f"--out={out}"]) == 130
    assert main([*QUICK, f"--out={out}"]) == 0
    for name in ("bitmap.json", "history.jsonl", "profile.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_garbage_in_the_journal_is_passed_over(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    journal = out / "journal.jsonl"
    last = json.loads(journal.read_text().splitlines()[-1])
    poisoned = json.dumps({**last, "values": [float("nan")] * 3}).encode()
    garbage = [b"\xff\xfe\x00", b"null", b"[" * 100_000, b"\0" * 4096, b"1" * 9999, poisoned]
    journal.write_bytes(journal.read_bytes() + b"\n".join([*garbage, b'{"torn']))
    assert main([*QUICK, f"--out={out}"]) == 0
    assert (out / "bitmap.json").read_bytes() == (finished / "bitmap.json").read_bytes()


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    finished, run, tmp_path, monkeypatch
):
    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full)
        assert "No space left on device; what was measured is kept" in run()
    assert main([*QUICK, f"--out={tmp_path / 'out'}"]) == 0
    found = (tmp_path / "out" / "bitmap.json").read_bytes()
    assert found == (finished / "bitmap.json").read_bytes()


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate"), RuntimeError("DefaultCPUAllocator: not enough memory")],
)
def test_too_little_memory_is_named(run, monkeypatch, error):
    def big(*_args):
        raise error

    monkeypatch.setattr(Session, "profile", big)
    assert "There is not enough memory" in run()


def test_a_path_is_shown_as_it_is(finished, tmp_path, capsys):
    out = tmp_path / "[bold]:b:"
    shutil.copytree(finished, out)
    assert main([*QUICK, f"--out={out}"]) == 0
    assert "[bold]:b:" in capsys.readouterr().out


def _not_finite(weights):
    next(v for k, v in weights.items() if "experts" in k)[0] = float("nan")


def _other_shape(weights):
    name = next(k for k in weights if "experts" in k)
    weights[name] = torch.zeros(3, 3, dtype=weights[name].dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_not_finite, "that are not finite"), (_other_shape, "have other shapes")],
)
def test_damaged_weights_are_named(run, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(reference_path(), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert message in run(f"--model={folder}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 1, "router_init_norms of other layers"),
        ("router_init_norms", [1], "router_init_norms of other layers"),
        ("router_init_norms", "x", "router_init_norms of other layers"),
        ("num_experts", 8, "other shapes than its config.json says"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_named(run, tmp_path, name, value, message):
    folder = tmp_path / "model"
    shutil.copytree(reference_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    assert message in run(f"--model={folder}")


def test_pickled_weights_are_never_opened(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(reference_path(), folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cos\nmkdir\n(V{tmp_path}/owned\ntR.".encode())
    assert "no pickle is ever opened" in run(f"--model={folder}")
    assert not (tmp_path / "owned").exists()


def test_a_tokenizer_of_another_model_is_named(run, small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small / "model", folder)
    build("olmoe").save_pretrained(folder)
    (tmp_path / "letters.txt").write_text("letters " * 999)
    error = run(f"--model={folder}", f"--dataset={tmp_path / 'letters.txt'}")
    assert "gives token 116, and the model knows 64 tokens" in error


def test_a_terminal_without_micro_signs_is_no_reason_to_fail(finished, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*QUICK, f"--out={finished}"]) == 0
    stream.flush()
    assert b"latency" in stream.buffer.getvalue()


def eights(windows):
    """Every run of eight tokens in the windows; the text of numbers has none twice."""
    return {tuple(row[i : i + 8]) for row in windows.tolist() for i in range(len(row) - 7)}


@pytest.mark.parametrize(("seed", "length"), [(0, 64), (1, 64), (1, 48)])
def test_a_profile_s_text_is_not_searched_again(finished, small, seed, length):
    config = SearchConfig(
        model=str(small / "model"),
        dataset=str(small / "text.txt"),
        bits="2,4",
        quantizer="rtn",
        avg_bits=4.0,
        profile_tokens=128,
        search_tokens=9000,
        selection_tokens=1000,
        heldout_tokens=128,
        seed=seed,
        sequence_length=length,
    )
    as_profiled = {"seed": 0, "sequence_length": 64, "search_tokens": 128, "selection_tokens": 128}
    profiled = Session(replace(config, **as_profiled)).splits
    assert profiled.drawn == Profile.load(finished / "profile.safetensors").drawn
    session = Session(replace(config, profile=str(finished / "profile.safetensors")))
    session.check()
    assert session.notes() == ()
    assert session.splits.profile.size == 0
    seen = eights(profiled.profile)
    assert not seen & (eights(session.splits.search) | eights(session.splits.selection))


def test_a_profile_of_the_same_seed_searches_the_same_text(finished, tmp_path):
    out = tmp_path / "again"
    profile = f"--profile={finished / 'profile.safetensors'}"
    assert main([*QUICK, profile, f"--out={out}"]) == 0
    one, other = (BitMap.read(f / "bitmap.json") for f in (finished, out))
    assert one == other


def test_a_profile_of_other_text_is_said_to_be_one(finished, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(2000))))
    profile = f"--profile={finished / 'profile.safetensors'}"
    capsys.readouterr()
    assert main([*QUICK, profile, f"--dataset={text}", f"--out={tmp_path / 'out'}"]) == 0
    assert "measured on another text" in " ".join(capsys.readouterr().out.split())
