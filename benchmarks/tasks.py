r"""Tasks as the accuracy term: models that 2 bits visibly hurt, and searches by their metrics.

    python benchmarks/tasks.py train classification --data ../shared/data --work /tmp/tasks
    python benchmarks/tasks.py uniform classification --work /tmp/tasks
    python benchmarks/tasks.py search classification --work /tmp/tasks --avg-bits 3

``train`` makes the data's files and the checkpoint in ``--work``, ``uniform`` prints the held-out
metrics of uniform 16, 8, 4, 3 and 2 bits, ``search`` runs ``dmpq.search`` once by the KL and once
by the metric. The last two write what they print into ``benchmarks/results/tasks.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from task_models import Recipe, encode, save, tokenizer_for, train, untrained
from task_switch import SWITCH, SWITCH_RECIPE, untrained_switch

from dmpq.config import SearchConfig
from dmpq.console import quiet_libraries
from dmpq.files import replace_atomically
from dmpq.session import Session
from dmpq.tasks.choices import LETTERS
from dmpq.tasks.evaluator import TaskEvaluator
from dmpq.tasks.tables import read_tables

RESULTS = Path(__file__).parent / "results" / "tasks.json"
TOPICS = "classification-topics"
"""Classification into 48 classes; the other is into two."""
RECIPES = {
    "classification": Recipe(vocabulary=4000, epochs=8, dropout=0.2),
    TOPICS: Recipe(vocabulary=4000, epochs=8, dropout=0.1),
    "token-classification": Recipe(vocabulary=3000, epochs=20, dropout=0.2),
    "question-answering": Recipe(vocabulary=3000, epochs=12, dropout=0.1),
    "translation": Recipe(vocabulary=2000, epochs=8),
    "multiple-choice": Recipe(vocabulary=4000, epochs=8, dropout=0.05),
}
SEARCH = ("--profile-tokens", "2048", "--search-tokens", "8192", "--selection-tokens", "8192")
HELDOUT = 65536
RECIPES[SWITCH] = SWITCH_RECIPE


def main() -> None:
    """Run one step for one task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("train", "uniform", "search"))
    parser.add_argument("task", choices=tuple(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="of training, at most")
    parser.add_argument("--avg-bits", type=float, default=3.0)
    parser.add_argument("--evaluations", type=int, default=32)
    parser.add_argument("--signals", nargs="+", default=["sensitivity", "task"])
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    {"train": make, "uniform": uniform, "search": search}[arguments.step](arguments)


def make(arguments: argparse.Namespace) -> None:
    """Write the data as the search reads it, then train and save the model."""
    task, folder = arguments.task, arguments.work / arguments.task
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, rows in PREPARED[task](arguments.data).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    rows = read_tables(str(data)).calibration
    recipe = RECIPES[task]
    texts = [text for row in rows for text in _texts(row)]
    goes_on = task in ("translation", "multiple-choice")
    tokenizer = tokenizer_for(texts, recipe.vocabulary, ends=not goes_on)
    labels = sorted({str(one) for row in rows for one in _labels(task, row)})
    if task == SWITCH:
        model = untrained_switch(recipe, tokenizer)
    else:
        model = untrained(_kind(task), recipe, tokenizer, labels)
    kind, examples = encode(_kind(task), rows, model, tokenizer)
    spent = train(kind, examples, model, recipe, seconds=arguments.seconds, say=_say)
    save(model, tokenizer, folder / "model")
    print(f"{task}: {len(examples):,} examples, {spent:.0f} s of training")
    _record(task, {"training_examples": len(examples), "training_seconds": round(spent)})


def _kind(recipe: str) -> str:
    """Return the task as ``--task`` spells it."""
    return {SWITCH: "translation", TOPICS: "classification"}.get(recipe, recipe)


def _texts(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if name == "tokens":
            yield " ".join(value)
        elif name == "choices":
            yield "\n".join(f"{a}. {one}" for a, one in zip(LETTERS, value, strict=False))
            yield "Answer:" + "".join(f" {letter}" for letter in LETTERS)
        elif isinstance(value, str) and name != "label":
            yield value


def _labels(task: str, row: dict[str, Any]) -> list[Any]:
    if _kind(task) == "classification":
        return [row["label"]]
    return list(row["ner_tags"]) if task == "token-classification" else []


def _say(text: str) -> None:
    print(text, flush=True)


def _unpacked(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode("utf8")


def _sst2(data: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for split in ("train", "test"):
        lines = _unpacked(data / f"sst2/{split}.tsv.gz")
        pairs = [line.rsplit("\t", 1) for line in lines.splitlines()]
        names = ("negative", "positive")
        found[split] = [{"sentence": s.strip(), "label": names[int(n)]} for s, n in pairs]
    return found


def _topics(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return SQuAD's questions with the article that each is about; every fifth is held out."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for article in json.loads(_unpacked(data / "squad/dev-v1.1.json.gz"))["data"]:
        asked = [one["question"].strip() for part in article["paragraphs"] for one in part["qas"]]
        for number, question in enumerate(asked):
            row = {"sentence": question, "label": article["title"]}
            found["test" if number % 5 == 4 else "train"].append(row)
    return found


def _ten_topics(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return questions with ten articles, always the same, that each may be about.

    They are those with the most questions. Choices in another order each time are beyond a model
    of this size and data.
    """
    rows = _topics(data)
    counts = Counter(row["label"] for row in rows["train"])
    ten = sorted(name for name, _ in counts.most_common(10))
    return {
        split: [
            {"question": row["sentence"], "choices": ten, "answer": row["label"]}
            for row in rows[split]
            if row["label"] in ten
        ]
        for split in rows
    }


def _wikigold(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return sentences, every fifth of which is held out."""
    whole = _unpacked(data / "wikigold/wikigold.conll.txt.gz")
    rows: list[dict[str, Any]] = []
    for block in whole.split("\n\n"):
        pairs = [line.split() for line in block.splitlines() if line.strip()]
        pairs = [pair for pair in pairs if pair[0] != "-DOCSTART-"]
        if pairs and len(pairs) < 90:
            rows.append({"tokens": [p[0] for p in pairs], "ner_tags": [p[-1] for p in pairs]})
    test = [row for i, row in enumerate(rows) if i % 5 == 0]
    return {"train": [row for i, row in enumerate(rows) if i % 5], "test": test}


def _squad(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return questions on the sentence that answers them; every sixth article is held out.

    A model of this size, from nothing and 10,000 questions, does not learn to read paragraphs.
    """
    articles = json.loads(_unpacked(data / "squad/dev-v1.1.json.gz"))["data"]
    found: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, article in enumerate(articles):
        rows = found["test" if number % 6 == 5 else "train"]
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            cuts = [i + 2 for i in range(len(context)) if context.startswith(". ", i)]
            for asked in paragraph["qas"]:
                first = asked["answers"][0]
                begin = max([0, *(cut for cut in cuts if cut <= first["answer_start"])])
                end = min(
                    (c for c in cuts if c >= first["answer_start"] + len(first["text"])),
                    default=len(context),
                )
                kept = [
                    (one["text"], one["answer_start"] - begin)
                    for one in asked["answers"]
                    if begin <= one["answer_start"]
                    and one["answer_start"] + len(one["text"]) <= end
                ]
                texts, starts = [list(x) for x in zip(*kept, strict=True)]
                if end - begin < 400 and len(asked["question"]) < 200:
                    answers = {"text": texts, "answer_start": starts}
                    part = context[begin:end]
                    row = {"question": asked["question"].strip(), "context": part}
                    rows.append(row | {"answers": answers})
    return found


def _multi30k(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return German captions with English ones."""
    found = {}
    for split, name in (("train", "train"), ("test", "test_2016_flickr")):
        sides = [_unpacked(data / f"multi30k/{name}.{x}.gz").splitlines() for x in ("de", "en")]
        rows = zip(*sides, strict=True)
        found[split] = [{"source": de.strip(), "target": en.strip()} for de, en in rows]
    return found


PREPARED: dict[str, Callable[[Path], dict[str, list[dict[str, Any]]]]] = {
    "classification": _sst2,
    TOPICS: _topics,
    "token-classification": _wikigold,
    "question-answering": _squad,
    "translation": _multi30k,
    "multiple-choice": _ten_topics,
    SWITCH: _multi30k,
}


def uniform(arguments: argparse.Namespace) -> None:
    """Print and keep the held-out metrics of every uniform width."""
    task, folder = arguments.task, arguments.work / arguments.task
    config = SearchConfig(
        model=str(folder / "model"),
        dataset=str(folder / "data"),
        task=_kind(task),
        bits="2,3,4,8,16",
        profile_tokens=0,
        search_tokens=0,
        selection_tokens=0,
        heldout_tokens=HELDOUT,
    )
    session = Session(config)
    heldout = session.evaluator("heldout")
    assert isinstance(heldout, TaskEvaluator)
    formats, experts = len(session.menu), session.moe.spec.num_experts
    maps = np.arange(formats)[:, None].repeat(experts, 1)
    kl, metrics = heldout.evaluate(maps).kl, heldout.metrics(maps)
    rows = [
        {"bits": int(session.menu.bits[i]), "kl": float(kl[i]), **metrics[i]}
        for i in reversed(range(formats))
    ]
    print(f"{task}: {len(session.splits.heldout):,} held-out examples")
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    _record(task, {"heldout_examples": len(session.splits.heldout), "uniform": rows})


def search(arguments: argparse.Namespace) -> None:
    """Search by the KL and by the metric, and keep both tables."""
    task, folder = arguments.task, arguments.work / arguments.task
    for signal in arguments.signals:
        out = folder / f"search-{signal}-{arguments.avg_bits:g}"
        command = [sys.executable, "-m", "dmpq.search", "--model", str(folder / "model")]
        command += ["--task", _kind(task), "--dataset", str(folder / "data"), "--signal", signal]
        command += ["--weights", "acc=1", "--avg-bits", str(arguments.avg_bits), "--threads", "1"]
        command += [*SEARCH, "--heldout-tokens", str(HELDOUT), "--out", str(out)]
        subprocess.run([*command, "--evaluations", str(arguments.evaluations)], check=True)
        facts = json.loads((out / "summary.json").read_text())
        rows = [
            {"name": row["name"], "bits": row["effective_bits"], "kl": row["heldout_kl"]}
            | row["metrics"]
            for row in facts["rows"]
        ]
        key = "by_kl" if signal == "sensitivity" else "by_metric"
        _record(task, {key: {"avg_bits": arguments.avg_bits, "rows": rows}})


def _record(task: str, facts: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[task] = known.get(task, {}) | facts
    replace_atomically(RESULTS, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
