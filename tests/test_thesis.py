"""The thesis's experiment: its encoder, its metrics, its pages; the whole of it by hand (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import examples
from transformers import AutoTokenizer, BertForSequenceClassification

ROOT = Path(__file__).parent.parent
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import thesis_data as data
    import thesis_pages as pages
    import thesis_runs as runs

GREEK = ["η Άννα μένει στην Αθήνα", "Νίκος και Ελένη αγαπούν τη θάλασσα", "κακή μέρα σήμερα"]


def test_the_encoder_reads_any_script(tmp_path):
    folder = data.bare_encoder(tmp_path / "bare", GREEK, vocabulary=400, hidden=16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(GREEK[0]).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == data.CLS
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == data.SEP
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == GREEK[0]
    config = BertForSequenceClassification.config_class.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer)
    assert not list(folder.glob("*.safetensors"))


def test_texts_are_found_whatever_columns_are_called(tmp_path):
    texts = [*GREEK, "我喜欢这部电影"]
    rows = [{"review": text, "label": "x y"} for text in texts] * 2
    study = data.Study("x", data.CLASSIFICATION, str(examples(tmp_path, rows)))
    assert set(data.texts_of(study)) <= set(texts)
    rows = [{"tokens": text.split(), "ner_tags": ["B-PER"] * len(text.split())} for text in texts]
    study = data.Study("x", data.ENTITIES, str(examples(tmp_path, rows * 2, name="words")))
    assert set(data.texts_of(study)) == set(texts)


def test_our_files_are_split_without_overlap(tmp_path):
    text = "a O\nb B-PER\n\t\n-DOCSTART- O\n\nc O\n"
    assert data._sentences(text) == [
        {"tokens": ["a", "b"], "ner_tags": ["O", "B-PER"]},
        {"tokens": ["c"], "ner_tags": ["O"]},
    ]


def test_changed_selections_are_counted():
    full = runs.Answers([], [], [torch.tensor([[0, 1], [2, 3]])])
    mine = runs.Answers([], [], [torch.tensor([[1, 0], [2, 1]])])
    assert runs.changed(mine, full) == 0.25
    assert runs.changed(full, full) == 0
    assert runs.changed(full, runs.Answers([], [], [])) is None


@pytest.mark.parametrize("name", ["sst2", "wikigold", "wnut17"])
def test_the_kept_figures_agree_with_themselves(name):
    """Accuracy and F1 recomputed from the confusion matrix; the page says what the figures say."""
    kept = json.loads((ROOT / f"benchmarks/results/thesis/data-{name}.json").read_text())
    for row in kept["bits"]["rows"].values():
        counts = np.array(row["confusion"], float)
        assert row["accuracy"] == pytest.approx(100 * counts.trace() / counts.sum())
        if kept["task"] == data.CLASSIFICATION:
            f1 = 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))
            assert row["f1"] == pytest.approx(100 * f1.mean())
    assert kept["bits"]["rows"]["16 bits"]["changed"] == 0
    page = (ROOT / "docs" / "thesis.md").read_text()
    assert pages.widths(kept) in page
    assert pages.models(kept) in page
    if kept["precision"]:
        assert pages.precision(kept) in page
        assert pages.verdict(kept) in page


def test_predictions_say_which_are_right():
    rows = {
        "16 bits": [("good film", "positive", "positive")],
        "2 bits": [("good film", "positive", "negative")],
    }
    text = pages.predictions({"name": "x", "predictions": rows})
    assert "- 16 bits: positive (right)" in text
    assert "- 2 bits: negative (wrong)" in text


def run(*options):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "thesis.py"), *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_to_show_is_said_in_one_sentence(tmp_path):
    done = run("--results", tmp_path)
    assert done.returncode == 2
    assert "holds no results; run with --run first" in done.stderr


@pytest.mark.slow
def test_the_whole_experiment_on_a_user_s_data(tmp_path):
    names, places = ["Άννα", "Νίκος", "Ελένη"], ["Αθήνα", "Πάτρα", "Χανιά"]
    rows = [
        {"tokens": [name, "μένει", "στην", place], "ner_tags": ["B-PER", "O", "O", "B-LOC"]}
        for name in names
        for place in places
    ] * 20
    file = examples(tmp_path, rows, name="greek")
    options = ["--run", "--dataset", file, "--task", "token-classification"]
    options += ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    options += ["--amp-steps", 4, "--seeds", 2]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "greek: Quantized" in done.stdout
    assert (tmp_path / "results" / "thesis.md").exists()
    kept = json.loads((tmp_path / "results" / "data-greek.json").read_text())
    assert kept["bits"]["rows"]["16 bits"]["f1"] > 90
    stamp = (tmp_path / "work/greek/moe/summary.json").stat().st_mtime_ns
    assert run(*options).returncode == 0  # nothing is trained again
    assert (tmp_path / "work/greek/moe/summary.json").stat().st_mtime_ns == stamp
