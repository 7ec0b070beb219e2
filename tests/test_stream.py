"""A map for a checkpoint that is never loaded, by the command."""

import numpy as np
import pytest
import torch
from conftest import build

from dmpq.bitmap import BitMap
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.streamed_profile import BATCH_TOKENS, batch_tokens, memory_needed
from dmpq.errors import InputError
from dmpq.profile import Profile
from dmpq.session import Session
from dmpq.stream import main

SMALL = ("--profile-tokens", "512", "--threads", "1", "--heldout-tokens", "128")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "big"
    assert main([*SMALL, "--out", str(folder), "--max-memory", "0.5"]) == 0
    return folder


def test_the_map_is_the_knapsack_s_on_the_profile(streamed):
    bitmap = BitMap.read(streamed / "bitmap.json")
    profile = Profile.load(streamed / "profile.safetensors")
    assert bitmap.model["fingerprint"] == profile.fingerprint
    assert bitmap.metrics["measured"] == {}
    bits = bitmap.metrics["predicted"]["effective_bits"]["value"]
    assert 2.9 < bits <= 3.0
    assert profile.signal == "gradient"


def test_the_profile_is_kept_for_the_next_map(streamed, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the profile was there")

    monkeypatch.setattr("dmpq.checkpoints.streamed_profile.streamed_profile", refuse)
    before = (streamed / "profile.safetensors").read_bytes()
    assert main([*SMALL, "--out", str(streamed), "--avg-bits", "2.5"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was measured on held-out text" in said
    assert (streamed / "profile.safetensors").read_bytes() == before
    bits = BitMap.read(streamed / "bitmap.json").metrics["predicted"]["effective_bits"]["value"]
    assert 2.4 < bits <= 2.5


def test_a_search_that_loads_the_model_takes_the_profile(streamed):
    from dmpq.config import SearchConfig

    session = Session(
        SearchConfig(
            profile=str(streamed / "profile.safetensors"),
            signal="gradient",
            search_tokens=128,
            selection_tokens=128,
            further_tokens=0,
            heldout_tokens=128,
        )
    )
    profile = session.profile()
    chosen = session.problem(profile).mckp()[None]
    assert np.isfinite(session.evaluator("search").evaluate(chosen).kl).all()
    taken = {tuple(w) for w in session.splits.search.tolist()}
    assert taken.isdisjoint({tuple(w) for w in session.splits.selection.tolist()})


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def unprofiled(monkeypatch):
    """A run in which nothing may be profiled."""

    def refuse(*_, **__):
        raise AssertionError("profiled before the refusal")

    monkeypatch.setattr("dmpq.checkpoints.streamed_profile.streamed_profile", refuse)
    monkeypatch.setattr(Checkpoint, "fingerprint", refuse)


@pytest.mark.usefixtures("unprofiled")
def test_what_cannot_be_is_refused_before_profiling(tmp_path, capsys):
    out = ("--out", tmp_path / "big")
    assert "avg-bits" in refused(capsys, *SMALL, *out, "--avg-bits", "1")
    assert "--dataset is empty; give 'embedded'" in refused(capsys, *SMALL, *out, "--dataset", "")
    assert "Unknown hardware" in refused(capsys, *SMALL, *out, "--hw", "none")


@pytest.mark.usefixtures("unprofiled")
def test_a_link_in_the_place_of_the_partial_profile_is_not_followed(tmp_path, capsys):
    out, own = tmp_path / "big", tmp_path / "own"
    own.mkdir()
    out.mkdir()
    (own / "letter.txt").write_text("kept")
    (out / "profile.partial").symlink_to(own)
    assert "is a link to another folder" in refused(capsys, *SMALL, "--out", out)
    assert (own / "letter.txt").read_text() == "kept"


@pytest.mark.usefixtures("unprofiled")
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("olmoe", "gives no token for any text: its vocab"),
        ("mixtral", "has no tokenizer that can"),
    ],
)
def test_a_missing_tokenizer_is_named(family, message, tmp_path, capsys):
    build(family).save_pretrained(tmp_path / "model")
    model = ("--model", tmp_path / "model", "--sequence-length", "8", "--avg-bits", "5")
    said = refused(capsys, *SMALL, *model, "--out", tmp_path / "big")
    assert message in said
    assert "put" in said
    assert "tokenizer.json" in said


def test_an_interrupted_run_goes_on_and_ends_as_the_uninterrupted_one(
    streamed, tmp_path, capsys, monkeypatch
):
    out, scratch = tmp_path / "big", tmp_path / "scratch"
    scratch.mkdir()
    options = [*SMALL, "--out", str(out), "--max-memory", "0.5", "--scratch", str(scratch)]
    read, reads = Checkpoint.expert, []

    def counted(self, experts, side, index):
        reads.append(index)
        if len(reads) == 150:
            raise KeyboardInterrupt
        return read(self, experts, side, index)

    monkeypatch.setattr(Checkpoint, "expert", counted)
    assert main(options) == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    assert not (out / "profile.safetensors").exists()
    (left,) = scratch.iterdir()
    assert list(left.glob("layer-*"))
    before = len(reads)
    assert main(options) == 0
    assert len(reads) - before <= 2 * 2 * 64, "the forward pass was done"
    assert not list(scratch.iterdir())
    name = "profile.safetensors"
    assert (out / name).read_bytes() == (streamed / name).read_bytes()
    assert (out / "bitmap.json").exists()


def test_limits_that_cannot_be_kept_are_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "big")
    assert "--max-memory allows 0.00" in refused(capsys, *SMALL, *out, "--max-memory", "1e-6")
    assert "give a positive number" in refused(capsys, *SMALL, *out, "--max-memory", "nan")
    assert "no folder" in refused(capsys, *SMALL, *out, "--scratch", tmp_path / "none")
    assert "1e+09 at most" in refused(capsys, *SMALL, *out, "--max-memory", "1e300")
    assert "give --out" in refused(capsys, *SMALL, "--out", "")
    said = refused(capsys, *SMALL, *out, "--avg-bits", "1")
    assert "avg-bits" in said


def test_a_calibrated_quantizer_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dmpq.checkpoints.checkpoint.Checkpoint", None)
    said = refused(capsys, *SMALL, "--out", tmp_path / "big", "--quantizer", "gptq")
    assert "needs calibration text that a loaded model reads" in said


def test_batches_shrink_with_the_memory():
    source = Checkpoint("reference")
    fixed, each = memory_needed(source)
    assert batch_tokens(source, 128, None) == BATCH_TOKENS
    assert batch_tokens(source, 128, fixed + 300 * each) == 256
    assert batch_tokens(source, 4096, 1e12) == 4096
    with pytest.raises(InputError, match="shorter --sequence-length"):
        batch_tokens(source, 128, fixed + 100 * each)


def test_the_estimate_counts_what_a_batch_holds():
    source = Checkpoint("reference")
    _, each = memory_needed(source)
    logits = torch.zeros(1, source.moe.spec.vocab_size).nbytes
    assert each > 4 * logits
