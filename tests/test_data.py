import dataclasses
import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from dmpq.data import Draw, TokenRequest, evenly, load_splits, redrawn
from dmpq.embedded import side_documents
from dmpq.errors import InputError
from dmpq.moe import reference_path

SMALL = TokenRequest(profile=256, search=512, selection=256, heldout=512)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reference_path(), local_files_only=True)


def rows(windows):
    return {window.tobytes() for window in windows}


def test_a_byte_is_its_own_token(tokenizer):
    text = "héllo\n\tx = 'ß'\x00"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_roles_are_disjoint_and_of_the_size_asked_for(tokenizer):
    splits = load_splits("embedded", tokenizer, length=64, tokens=SMALL, seed=3)
    roles = [splits.profile, splits.search, splits.selection, splits.heldout]
    assert [r.size for r in roles] == [256, 512, 256, 512]
    assert len(set().union(*map(rows, roles))) == sum(len(rows(r)) for r in roles)


def test_further_text_changes_no_other_draw_and_is_apart_from_all(tokenizer):
    more = dataclasses.replace(SMALL, further=1024)
    without, splits = (
        load_splits("embedded", tokenizer, length=64, tokens=tokens, seed=3)
        for tokens in (SMALL, more)
    )
    assert without.further.size == 0
    assert splits.further.size == 1024
    for role in ("profile", "search", "selection", "heldout"):
        np.testing.assert_array_equal(getattr(splits, role), getattr(without, role))
        assert not rows(splits.further) & rows(getattr(splits, role))


def test_there_may_be_less_further_text_than_was_asked_for(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(800)))
    more = dataclasses.replace(SMALL, further=10**9)
    splits = load_splits(str(path), tokenizer, length=64, tokens=more, seed=0)
    roles = (splits.profile, splits.search, splits.selection, splits.further)
    whole = sum(len(f"line {i}\n") for i in range(800)) * 4 // 5
    assert sum(role.size for role in roles) == whole // 64 * 64
    assert splits.further.size > 1024


def test_held_out_windows_come_from_held_out_modules(tokenizer):
    splits = load_splits("embedded", tokenizer, length=64, tokens=SMALL, seed=0)
    heldout = "\0".join(d.text for d in side_documents("heldout"))
    for window in splits.heldout:
        text = tokenizer.decode(window).split("<|endoftext|>")[0]
        assert text.strip("\ufffd") in heldout


def test_the_seed_draws_calibration_and_leaves_held_out_text_alone(tokenizer):
    one, same, other = (
        load_splits("embedded", tokenizer, length=64, tokens=SMALL, seed=seed)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.profile, same.profile)
    assert rows(one.profile) != rows(other.profile)
    np.testing.assert_array_equal(one.heldout, other.heldout)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files_of_every_kind(tmp_path, tokenizer, suffix):
    lines = [f"line {i} of a small text\n" for i in range(400)]
    path = tmp_path / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("".join(lines))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        import pandas as pd

        pd.DataFrame({"text": lines}).to_parquet(path)
    splits = load_splits(str(path), tokenizer, length=64, tokens=SMALL, seed=0)
    assert tokenizer.decode(splits.heldout[0]).count("line")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("short.txt", "too short", "is too short: its calibration part"),
        ("blank.txt", "  \n \n", "is empty"),
        ("image.png", "x", "no text that can be read"),
        ("rows.jsonl", '{"label": 1}\n', "has no column of text; it has label"),
        ("broken.jsonl", "{not json\n", "cannot be read as jsonl"),
        ("torn.jsonl", '{"text": "a"}\n{"te', "cannot be read as jsonl"),
        ("null.json", "null", "has no column of text; it has none"),
        ("number.jsonl", "3\n", "has no column of text; it has none"),
        ("nested.json", "[" * 100_000, "cannot be read as json"),
        ("no_text.jsonl", '{"text": null}\n{"text": 3}\n', "is empty"),
        ("none.parquet", "PAR1 nothing", "cannot be read as parquet"),
        ("zeros.txt", "\0" * 9999, "is no UTF-8 text"),
        ("wide.txt", "text\0" * 9999, "is no UTF-8 text"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_splits(str(path), tokenizer, length=64, tokens=SMALL, seed=0)


def test_a_name_too_long_for_a_file_is_no_file(tokenizer):
    with pytest.raises(InputError, match="hub has not delivered"):
        load_splits("a" * 300, tokenizer, length=64, tokens=SMALL, seed=0)


def test_a_pipe_is_not_waited_for(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="no text that can be read"):
        load_splits(str(tmp_path / "pipe.txt"), tokenizer, length=64, tokens=SMALL, seed=0)


def test_a_folder_gives_its_text_and_nothing_else(tmp_path, tokenizer):
    lines = [f"line {i} of a small text" for i in range(200)]
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\xc3")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.json").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (tmp_path / "d.json").write_text(json.dumps([{"label": 1, "text": line} for line in lines]))
    (tmp_path / "e.txt").symlink_to("nowhere")
    splits = load_splits(str(tmp_path), tokenizer, length=64, tokens=SMALL, seed=0)
    assert tokenizer.decode(splits.heldout[0]).count("line")


def test_windows_are_taken_in_rounds_over_the_documents():
    owners = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
    order = np.array([5, 8, 4, 6, 3, 2, 7, 1, 0])
    assert evenly(order, owners, 3).tolist() == [5, 8, 6]
    assert evenly(order, owners, 5).tolist() == [5, 8, 6, 4, 7]
    assert sorted(evenly(order, owners, 9)) == list(range(9))
    assert evenly(order, owners, 0).size == 0


def test_a_long_document_gives_no_more_than_others(tmp_path, tokenizer):
    for name, words in {"a": 40_000, "b": 2000, "c": 2000, "d": 20_000}.items():
        (tmp_path / f"{name}.txt").write_text(f"{name} " * words)
    tokens = TokenRequest(profile=2048, search=2048, selection=2048, heldout=64)
    splits = load_splits(str(tmp_path), tokenizer, length=64, tokens=tokens, seed=0)
    for role in (splits.profile, splits.search, splits.selection):
        assert all((role == ord(name)).any() for name in "abcd")
    both = np.concatenate([splits.profile, splits.search, splits.selection])
    shares = [(both == ord(name)).sum() / (both.size / 2) for name in "abcd"]
    assert shares == pytest.approx([1 / 4] * 4, abs=0.02)


def test_texts_of_a_tokenizer_without_end_of_text_are_apart(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "row"}) + "\n" for _ in range(2000)))
    mute = AutoTokenizer.from_pretrained(reference_path(), local_files_only=True)
    mute.eos_token = None
    splits = load_splits(str(path), mute, length=64, tokens=SMALL, seed=0)
    assert "row\nrow\n" in mute.decode(splits.search[0])


@pytest.mark.parametrize("length", [16, 64, 100])
def test_a_draw_touches_what_shares_a_token_with_it(length):
    drawn = Draw("", 64, (0, 3, 4, 17))
    seen = {token for w in drawn.windows for token in range(w * 64, w * 64 + 64)}
    for window, touched in enumerate(drawn.touched(length, 70)):
        assert touched == bool(seen & set(range(window * length, (window + 1) * length)))


def test_what_was_drawn_from_a_text_is_not_drawn_from_it_again(tmp_path, tokenizer):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(2000))))
    options = {"length": 64, "tokens": SMALL, "seed": 0}
    first = load_splits(str(path), tokenizer, **options)
    fresh = load_splits(str(path), tokenizer, **options, taken=(first.drawn,))
    assert not rows(first.profile) & (rows(fresh.profile) | rows(fresh.search))
    elsewhere = dataclasses.replace(first.drawn, stream="elsewhere")
    same = load_splits(str(path), tokenizer, **options, taken=(elsewhere,))
    np.testing.assert_array_equal(same.profile, first.profile)


def test_a_hub_name_without_network_is_refused(tokenizer):
    with pytest.raises(InputError, match="hub has not delivered"):
        load_splits("nobody/nothing", tokenizer, length=64, tokens=SMALL, seed=0)


def test_what_calibrates_is_apart_from_all_roles_and_moves_only_the_further_text(tokenizer):
    def cut(calibration):
        tokens = dataclasses.replace(SMALL, further=640, calibration=calibration)
        return load_splits("embedded", tokenizer, length=64, tokens=tokens, seed=3)

    without, splits = cut(0), cut(200)
    assert without.calibration is None
    assert splits.calibration.shape == (4, 64)
    assert (redrawn("embedded", tokenizer, splits.calibrating) == splits.calibration).all()
    for role in ("profile", "search", "selection", "further", "heldout"):
        windows = getattr(splits, role)
        assert not set(map(tuple, splits.calibration)) & set(map(tuple, windows))
        assert role == "further" or (windows == getattr(without, role)).all()


def test_text_too_short_for_what_calibrates_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("word " * 2000)
    tokens = TokenRequest(profile=64, search=0, selection=0, heldout=64, calibration=10**6)
    with pytest.raises(InputError, match="calibration part gives"):
        load_splits(str(tmp_path), tokenizer, length=64, tokens=tokens, seed=0)
