"""The command that teaches a policy: what it writes, that it goes on, and what it refuses."""

import shutil

import pytest

from dmpq.agents.policy import Policy
from dmpq.moe import reference_path
from dmpq.pretrain import main
from dmpq.search import main as search

QUICK = [
    *("--profile-tokens=256", "--search-tokens=512", "--selection-tokens=128"),
    *("--heldout-tokens=256", "--further-tokens=8192", "--bits=2,4,16", "--threads=1"),
    *("--evaluations=5", "--above", "0.5", "1"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders with the bundled checkpoint: other names for one model."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        shutil.copytree(reference_path(), folder / name)
    return [str(folder / name) for name in ("one", "two")]


@pytest.fixture(scope="module")
def taught(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "policy"
    assert main([*QUICK, "--models", *models, f"--out={out}"]) == 0
    return out


def test_a_policy_for_any_model_is_written(taught):
    policy = Policy.load(taught)
    assert policy.training["lessons"] == "4"
    assert policy.training["models"] == "one, two"
    assert policy.config.embedding == 0
    assert {path.name for path in taught.glob("journal-*")} == {
        "journal-one.jsonl",
        "journal-two.jsonl",
    }


def test_a_search_asks_it(taught, tmp_path):
    flags = [flag for flag in QUICK[:-3] if not flag.startswith("--evaluations")]
    asked = [*flags, "--signal=gradient", f"--policy={taught}", "--evaluations=1"]
    assert search([*asked, "--avg-bits=4", f"--out={tmp_path / 'run'}"]) == 0


def test_the_same_command_goes_on_to_the_same_policy(models, taught, tmp_path):
    again = tmp_path / "policy"
    shutil.copytree(taught, again)
    for path in (again / "policy.json", *again.glob("weights-*")):
        path.unlink()
    journal = again / "journal-two.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert main([*QUICK, "--models", *models, f"--out={again}"]) == 0
    assert (again / "policy.json").read_bytes() == (taught / "policy.json").read_bytes()
    assert journal.read_text().splitlines(keepends=True) == lines


def test_other_budgets_are_another_policy_s(models, taught, capsys):
    kept = (taught / "policy.json").read_bytes()
    assert main([*QUICK[:-1], "0.9", "--models", *models, f"--out={taught}"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert (taught / "policy.json").read_bytes() == kept


def test_one_policy_learns_from_several_weightings(models, tmp_path, capsys):
    out = tmp_path / "policy"
    flags = [*QUICK[:-3], "--above", "1", "--models", models[0], f"--out={out}", "--weightings"]
    assert main([*flags, "acc=1", "acc=1,lat=3"]) == 0
    assert Policy.load(out).training["lessons"] == "2"
    kept = (out / "policy.json").read_bytes()
    assert main([*flags, "acc=1", "acc=1,lat=2"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main([*flags, "acc=1.0", "acc=1,lat=3,mem=0"]) == 0
    assert (out / "policy.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--models", "reference", "--weightings", "acc=1", "acc=1.0"], "gives one twice"),
        (["--models", "reference", "--weightings", "acc=0"], "cannot tell maps apart"),
        (["--models", "reference", "--weightings", "late=0"], "did you mean 'lat'"),
        (["--models", "x/one", "y/one"], "one folder name"),
        (["--models", "nowhere"], "There is no folder 'nowhere'"),
        (["--models", "reference", "--above", "-1"], "are no budgets"),
        ([], "--models"),
    ],
)
def test_what_cannot_be_taught_is_refused(flags, words, tmp_path, capsys):
    arguments = [*QUICK[:-3], *flags, f"--out={tmp_path / 'policy'}"]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
