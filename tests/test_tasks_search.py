"""A search on a task, from the command line to the map that is validated again."""

import json
import sys

import pytest
import torch
from test_tasks import model_of, rows_of, tokenizer

from dmpq.bank import Bank
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.harness import harness_scores
from dmpq.search import main as search
from dmpq.tasks.splits import TASKS
from dmpq.validate import main as validate

QUICK = [
    "--hw=a100",
    "--bits=2g16,4g16,16",
    "--avg-bits=6",
    "--weights=acc=1",
    "--agent=greedy",
    "--evaluations=6",
    "--profile-tokens=80",
    "--search-tokens=200",
    "--selection-tokens=200",
]


@pytest.fixture(scope="module", params=["classification", "token-classification"])
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    model = model_of(request.param)
    model.save_pretrained(out / "model")
    tokenizer().save_pretrained(out / "model")
    rows = labelled(model.eval(), request.param)
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return request.param, out


def labelled(model, task):
    """Return rows whose right answers are the model's own, so that every other map loses."""
    rows = rows_of(task, 80)
    for row in rows:
        words = row.get("tokens") or row["sentence"].split()
        ids = torch.tensor([tokenizer()(words, is_split_into_words=True).input_ids])
        with torch.inference_mode():
            found = model(input_ids=ids).logits[0].argmax(-1)
        if task == "classification":
            row["label"] = int(found)
        else:
            row["ner_tags"] = [int(one) for one in found[: len(words)]]
    return rows


def command(task, out, name, *more):
    options = [f"--model={out / 'model'}", f"--dataset={out / 'data.jsonl'}", f"--task={task}"]
    return [*QUICK, *options, f"--out={out / name}", *more]


def test_a_search_prints_and_keeps_the_metrics(folder, capsys):
    task, out = folder
    assert search(command(task, out, "kl")) == 0
    shown = capsys.readouterr().out
    assert {"classification": "acc %", "token-classification": "F1 %"}[task] in shown
    assert "16 held-out examples" in " ".join(shown.split())
    facts = json.loads((out / "kl" / "summary.json").read_text())
    full = facts["rows"][0]
    assert full["name"] == "bf16"
    assert full["heldout_kl"] == 0
    assert all(0 <= value <= 100 for value in full["metrics"].values())
    bitmap = json.loads((out / "kl" / "bitmap.json").read_text())
    assert bitmap["text"]["task"] == task
    assert bitmap["objective"]["signal"] == f"kl of {task}"
    assert validate([str(out / "kl" / "bitmap.json")]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 3 + len(full["metrics"])
    name, value = next(iter(full["metrics"].items()))
    bitmap["metrics"]["measured"][f"heldout_{name}"]["value"] = value + 7
    (out / "forged.json").write_text(json.dumps(bitmap))
    assert validate([str(out / "forged.json")]) == 1


def test_a_search_by_the_metric_goes_on_from_its_journal(folder, capsys):
    task, out = folder
    assert search(command(task, out, "metric", "--signal=task")) == 0
    first = (out / "metric" / "bitmap.json").read_bytes()
    journal = (out / "metric" / "journal.jsonl").read_bytes()
    history = [json.loads(x) for x in (out / "metric" / "history.jsonl").read_text().splitlines()]
    # The narrowest map's own drop is what 1 of reward stands for.
    assert all(one["reward"] <= 1 for one in history)
    assert json.loads(first)["objective"]["signal"].endswith(f" of {task}")
    assert not json.loads(first)["objective"]["signal"].startswith("kl")
    assert search(command(task, out, "metric", "--signal=task")) == 0
    assert (out / "metric" / "bitmap.json").read_bytes() == first
    assert (out / "metric" / "journal.jsonl").read_bytes() == journal
    capsys.readouterr()


@pytest.mark.parametrize(
    ("signal", "axis", "unit"),
    [
        ("sensitivity", "KL to full precision on search examples, nats/answer", "nats of KL"),
        ("task", "{metric} lost on search examples, points", "points of {metric}"),
    ],
)
def test_figure_and_price_have_the_unit_of_the_signal(
    folder, signal, axis, unit, capsys, monkeypatch
):
    task, out = folder
    metric, drawn = TASKS[task].metric, []
    monkeypatch.setattr("dmpq.report.save_figure", lambda figure, path: drawn.append(figure))
    assert search(command(task, out, f"unit-{signal}", f"--signal={signal}")) == 0
    assert drawn[0].axes[0].get_ylabel() == axis.format(metric=metric)
    shown = " ".join(capsys.readouterr().out.split())
    assert f" {unit.format(metric=metric)}, " in shown
    facts = json.loads((out / f"unit-{signal}" / "summary.json").read_text())
    (price,) = facts["shadow_prices"].values()
    assert f"{unit.split()[0]}_per_effective_bit" in price
    scale = 100 if signal == "task" else 1
    lines = (out / f"unit-{signal}" / "history.jsonl").read_text().splitlines()
    losses = {round(scale * json.loads(line)["kl"], 9) for line in lines}
    dots = drawn[0].axes[0].collections[0].get_offsets().data[:, 1]
    assert {round(float(y), 9) for y in dots} == losses


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--signal=task"], "--signal task belongs to a task, and none is asked for"),
        (["--text-column=x"], "--text-column belongs to a task"),
        (["--task=classify"], "Unknown --task 'classify' (did you mean 'classification'?)"),
        (["--task=classification"], "is of family 'olmoe'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, more, said):
    assert search([*QUICK, f"--out={tmp_path}", *more]) == 2
    assert said in capsys.readouterr().err


def test_without_a_task_a_configuration_keeps_its_name():
    assert SearchConfig().digest() == "0c5ddf7895ca"
    assert SearchConfig(task="translation").digest() != SearchConfig().digest()


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"need it installed, and it is not.*install lm-eval"):
        harness_scores(Bank(tiny(), Menu.parse("4g16,16")), None, None, ["hellaswag"])
