import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from dmpq.data import TokenRequest, load_splits
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
    ],
)
def test_bad_text_is_refused_in_one_sentence(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_splits(str(path), tokenizer, length=64, tokens=SMALL, seed=0)


def test_a_hub_name_without_network_is_refused(tokenizer):
    with pytest.raises(InputError, match="hub has not delivered"):
        load_splits("nobody/nothing", tokenizer, length=64, tokens=SMALL, seed=0)
