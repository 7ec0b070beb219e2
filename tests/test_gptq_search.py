"""A search with GPTQ: its map names what calibrated it, and can be made again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dmpq.config import SearchConfig
from dmpq.data import redrawn
from dmpq.errors import InputError
from dmpq.search import main as search
from dmpq.session import Session
from dmpq.validate import main as validate

CONFIG = SearchConfig(
    quantizer="gptq,affinity",
    bits="2,16",
    agent="mckp",
    signal="gradient",
    profile_tokens=256,
    search_tokens=256,
    selection_tokens=256,
    further_tokens=0,
    heldout_tokens=512,
    evaluations=1,
    threads=1,
)
OPTIONS = [
    "--quantizer=gptq,affinity",
    "--bits=2,16",
    "--agent=mckp",
    "--signal=gradient",
    "--profile-tokens=256",
    "--search-tokens=256",
    "--selection-tokens=256",
    "--further-tokens=0",
    "--heldout-tokens=512",
    "--evaluations=1",
    "--threads=1",
]


@pytest.fixture(scope="module")
def session():
    return Session(CONFIG)


def test_a_map_says_what_calibrated_it_and_holds(tmp_path, session, capsys):
    out = tmp_path / "run"
    assert search([*OPTIONS, f"--out={out}"]) == 0
    assert "gptq,affinity is calibrated on 256 tokens" in capsys.readouterr().out
    data = json.loads((out / "bitmap.json").read_text())
    told = session.calibrated_by.to_json()
    assert data["quantizer"] == {
        "name": "gptq,affinity",
        "symmetric": False,
        "calibration": told | {"windows": list(told["windows"])},
    }
    assert validate([str(out / "bitmap.json"), "--threads=1"]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 4
    data["quantizer"]["calibration"]["windows"][0] += 1
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(data))
    assert validate([str(forged), "--threads=1"]) == 1
    assert "WRONG heldout_kl" in capsys.readouterr().out


def test_what_calibrates_has_no_other_role(session):
    splits, own = session.splits, session.calibrated_by.draw
    assert len(own.windows) == 2
    calibrating = set(map(tuple, redrawn("embedded", session.tokenizer, own)))
    for role in (splits.profile, splits.search, splits.selection, splits.heldout):
        assert not calibrating & set(map(tuple, role))
    assert not any("measured on the text that calibrates" in note for note in session.notes())


def test_text_of_the_other_roles_is_that_of_a_search_without_gptq(session):
    plain = Session(replace(CONFIG, quantizer="rtn")).splits
    for role in ("profile", "search", "selection", "heldout"):
        assert (getattr(plain, role) == getattr(session.splits, role)).all()
    assert plain.calibration is None


def test_a_profile_of_before_calibrates_by_its_own_text_and_says_so(tmp_path, session):
    path = tmp_path / "profile.safetensors"
    replace(session.profile(), calibration=None).save(path)
    old = Session(replace(CONFIG, profile=str(path)))
    assert old.calibrated_by.draw == session.splits.drawn
    assert any("measured on the text that calibrates" in note for note in old.notes())


def test_a_saved_profile_s_search_has_neither_of_its_texts(tmp_path, session):
    session.profile().save(tmp_path / "profile.safetensors")
    again = Session(replace(CONFIG, profile=str(tmp_path / "profile.safetensors")))
    seen = set(map(tuple, [*session.splits.profile, *session.splits.calibration]))
    assert not seen & set(map(tuple, [*again.splits.search, *again.splits.selection]))
    assert not any("measured on the text that calibrates" in note for note in again.notes())


def test_a_saved_profile_calibrates_as_its_own_search_did(tmp_path, session):
    session.profile().save(tmp_path / "profile.safetensors")
    again = Session(replace(CONFIG, profile=str(tmp_path / "profile.safetensors")))
    assert again.bank.calibration.digest == session.bank.calibration.digest
    own, other = (s.bank.layers[2].variant(7, 0) for s in (session, again))
    assert all((a == b).all() for a, b in zip(own, other, strict=True))


def test_the_calibration_s_forward_is_counted(session):
    plain = Session(replace(CONFIG, quantizer="rtn"))
    assert session.profile().cost_tokens == plain.profile().cost_tokens + 256


def test_other_text_keeps_the_calibration(session):
    other = session.with_text(profile_tokens=512)
    assert other.bank is session.bank
    assert other.calibrated_by == session.calibrated_by
    own = set(map(tuple, session.splits.calibration))
    assert not own & set(map(tuple, other.splits.profile))


def test_a_profile_that_tells_no_text_is_refused(tmp_path, session):
    path = tmp_path / "profile.safetensors"
    replace(session.profile(), drawn=None, calibration=None).save(path)
    with pytest.raises(InputError, match="does not say what text"):
        Session(replace(CONFIG, profile=str(path))).check()


def test_a_draw_is_drawn_again_from_the_same_text_alone(session):
    tokenizer, drawn = session._loaded[1], session.splits.drawn
    found = redrawn("embedded", tokenizer, drawn)
    assert sorted(map(tuple, found)) == sorted(map(tuple, session.splits.profile))
    assert (np.diff(drawn.windows) > 0).all()
    with pytest.raises(InputError, match="is another than the one drawn from"):
        redrawn("embedded", tokenizer, replace(drawn, stream="0" * 64))
    with pytest.raises(InputError, match="names window 10000000"):
        redrawn("embedded", tokenizer, replace(drawn, windows=(1, 10**7)))


def test_a_task_s_examples_calibrate_nothing():
    config = replace(CONFIG, task="classification", dataset="glue:x")
    with pytest.raises(InputError, match="--task classification gives examples"):
        Session(config).check()
