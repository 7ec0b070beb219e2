"""A streamed profile that was interrupted goes on, and ends as the uninterrupted one."""

import json
import shutil

import pytest
import torch
from families import build_tiny
from safetensors.numpy import load_file, save_file

from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.streamed_profile import scratch_bytes, streamed_profile
from dmpq.errors import InputError
from dmpq.formats import Menu

MENU = Menu.parse("0,2g8,4g8,16")
LOT = 32
WINDOWS = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(0)).numpy()


class Interrupted(BaseException):
    """What no handler expects."""


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    build_tiny(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Count reads of experts' matrices; the read whose number stands in ``last`` fails."""
    made = {"count": 0, "last": None}
    read = Checkpoint.expert

    def counted(self, experts, side, index):
        made["count"] += 1
        if made["count"] == made["last"]:
            raise Interrupted
        return read(self, experts, side, index)

    monkeypatch.setattr(Checkpoint, "expert", counted)
    return made


def profiled(folder, kept=None, *, windows=WINDOWS, menu=MENU):
    return streamed_profile(Checkpoint(str(folder)), menu, windows, text="x", lot=LOT, kept=kept)


def as_bytes(profile, tmp_path):
    profile.save(tmp_path / "profile.safetensors")
    return (tmp_path / "profile.safetensors").read_bytes()


def interrupted(folder, kept, reads, last):
    reads.update(count=0, last=last)
    kept.mkdir(exist_ok=True)
    with pytest.raises(Interrupted):
        profiled(folder, kept)
    reads.update(count=0, last=None)


def test_it_ends_the_same_wherever_it_was_interrupted(folder, tmp_path, reads):
    wanted = as_bytes(profiled(folder), tmp_path)
    whole = reads["count"]
    layer = 2 * 4  # two matrices of four experts
    for share in (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.99):
        kept = tmp_path / f"kept-{share}"
        last = max(1, round(share * whole))
        interrupted(folder, kept, reads, last)
        assert as_bytes(profiled(folder, kept), tmp_path) == wanted
        assert last - 1 <= whole - reads["count"] + layer
        reads["count"] = 0
        assert as_bytes(profiled(folder, kept), tmp_path) == wanted
        assert reads["count"] == 0, "a finished one is only read"


def test_interrupted_again_and_again_it_gets_to_the_end(folder, tmp_path, reads):
    wanted = as_bytes(profiled(folder), tmp_path)
    whole = reads["count"]
    kept = tmp_path / "kept"
    kept.mkdir()
    for _ in range(whole):
        reads.update(count=0, last=12)
        try:
            found = profiled(folder, kept)
        except Interrupted:
            continue
        break
    assert as_bytes(found, tmp_path) == wanted


def test_a_layer_s_experts_are_read_once_forward_and_once_backward(folder, reads):
    profile = profiled(folder)
    lots = WINDOWS.size // LOT
    experts = profile.spec.num_experts
    assert reads["count"] <= (2 * lots + 1) * 2 * experts


@pytest.mark.parametrize("other", ["text", "menu", "weights", "threads"])
def test_what_other_runs_left_is_never_mixed_in(other, folder, tmp_path, reads, monkeypatch):
    kept = tmp_path / "kept"
    options = {}
    source = folder
    interrupted(folder, kept, reads, 40)
    (kept / "stray").write_text("of another run")
    if other == "text":
        options["windows"] = WINDOWS[::-1].copy()
    elif other == "menu":
        options["menu"] = Menu.parse("2g8,4g8,16", quantizer="rtn")
    elif other == "weights":
        source = tmp_path / "other"
        shutil.copytree(folder, source)
        model = build_tiny(json.loads((source / "config.json").read_text())["model_type"])
        model.get_output_embeddings().weight.data[0, 0] += 1
        model.save_pretrained(source)
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    wanted = as_bytes(profiled(source, **options), tmp_path)
    whole, reads["count"] = reads["count"], 0
    assert as_bytes(profiled(source, kept, **options), tmp_path) == wanted
    assert reads["count"] == whole
    assert not (kept / "stray").exists()


def test_damaged_leftovers_are_measured_again(folder, tmp_path, reads):
    kept = tmp_path / "kept"
    kept.mkdir()
    wanted = as_bytes(profiled(folder, kept), tmp_path)
    (kept / "sums-1.safetensors").write_bytes(b"torn")
    with (kept / "profile.jsonl").open("a") as file:
        file.write('{"lot": "none"}\n{"ran": "forw')
    assert as_bytes(profiled(folder, kept), tmp_path) == wanted
    journal = (kept / "profile.jsonl").read_text().splitlines(keepends=True)
    left = [line for line in journal if '"lot": 0' not in line]
    assert len(left) == len(journal) - 1
    (kept / "profile.jsonl").write_text("".join(left))
    (kept / "sums-0.safetensors").unlink()
    assert as_bytes(profiled(folder, kept), tmp_path) == wanted


def test_the_disk_is_asked_before_anything_is_run(folder, tmp_path, monkeypatch):
    source = Checkpoint(str(folder))
    kept = tmp_path / "kept"
    kept.mkdir()
    profiled(folder, kept)
    used = sum(file.stat().st_size for file in kept.glob("*[0-9s].safetensors"))
    sums = sum(file.stat().st_size for file in kept.glob("sums-*"))
    assert used - sums == scratch_bytes(source, WINDOWS, LOT)
    shutil.rmtree(kept)
    kept.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="give another --scratch"):
        profiled(folder, kept)


@pytest.mark.parametrize("which", ["gone", "torn", "changed", "sums"])
def test_rows_that_are_not_as_they_were_left_are_measured_again(which, folder, tmp_path, reads):
    wanted = as_bytes(profiled(folder), tmp_path)
    kept = tmp_path / "kept"
    interrupted(folder, kept, reads, reads["count"] - 6)  # all lots are run
    damaged = kept / "layer-0.safetensors"
    whole = damaged.read_bytes()
    if which == "gone":
        damaged.unlink()
    elif which == "torn":
        damaged.write_bytes(whole[: len(whole) // 2])
    elif which == "changed":
        damaged.write_bytes(whole[:-1000] + bytes(1000))
    else:
        profiled(folder, kept)
        arrays = load_file(kept / "sums-0.safetensors")
        changed = {name: array + 1 for name, array in arrays.items()}
        save_file(changed, kept / "sums-0.safetensors")
    assert as_bytes(profiled(folder, kept), tmp_path) == wanted


def test_slopes_of_a_lot_under_way_are_as_they_were_left(folder, tmp_path, reads):
    wanted = as_bytes(profiled(folder), tmp_path)
    kept = tmp_path / "kept"
    for last in (25, 35, 45):
        shutil.rmtree(kept, ignore_errors=True)
        interrupted(folder, kept, reads, last)
        (kept / "slopes.safetensors").unlink(missing_ok=True)
        assert as_bytes(profiled(folder, kept), tmp_path) == wanted
