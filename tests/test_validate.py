import json

import pytest

from dmpq.search import main as search
from dmpq.validate import main as validate

QUICK = [
    "--agent=mckp",
    "--profile-tokens=256",
    "--search-tokens=256",
    "--selection-tokens=256",
    "--bits=2,4,16",
]


@pytest.fixture(scope="module")
def bitmap(tmp_path_factory):
    out = tmp_path_factory.mktemp("validate") / "run"
    assert search([*QUICK, "--heldout-tokens=512", f"--out={out}"]) == 0
    return out / "bitmap.json"


def test_what_the_search_claims_holds(bitmap, capsys):
    capsys.readouterr()
    assert validate([str(bitmap)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  ok  ") == 4
    assert "WRONG" not in shown


def test_a_claim_that_was_improved_is_found(bitmap, tmp_path, capsys):
    data = json.loads(bitmap.read_text())
    data["metrics"]["measured"]["heldout_kl"]["value"] /= 2
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(data))
    assert validate([str(forged)]) == 1
    assert "WRONG heldout_kl" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncate", "width", "missing"])
def test_a_damaged_bit_map_ends_with_two_and_one_sentence(bitmap, tmp_path, capsys, damage):
    path = tmp_path / "damaged.json"
    if damage == "truncate":
        path.write_text(bitmap.read_text()[:200])
    elif damage == "width":
        data = json.loads(bitmap.read_text())
        next(iter(data["assignment"].values()))[0] = "5"
        path.write_text(json.dumps(data))
    capsys.readouterr()
    assert validate([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--heldout-tokens=0", "--heldout-tokens 0 makes no sense"),
        ("--threads=0", "--threads 0 makes no sense"),
        ("--threads=1000000000", "give 1 to 1,024"),
        ("--sequence-length=1", "--sequence-length 1 makes no sense"),
        ("--hw=", "Unknown hardware ''"),
        ("--hw=A10", "did you mean 'a100'"),
        ("--tdp-w=300", "not of a100; give it with --hw cuda"),
        ("--model=", "There is no folder ''"),
        ("--device=meta", "device 'meta' cannot be used"),
    ],
)
def test_bad_options_end_with_two_and_one_line(bitmap, capsys, argument, message):
    capsys.readouterr()
    assert validate([str(bitmap), argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_map_of_other_weights_is_refused(bitmap, tmp_path, capsys):
    data = json.loads(bitmap.read_text())
    data["model"]["fingerprint"] = "0" * 64
    path = tmp_path / "other.json"
    path.write_text(json.dumps(data))
    assert validate([str(path)]) == 2
    assert "was made for weights 000000000000" in " ".join(capsys.readouterr().err.split())
