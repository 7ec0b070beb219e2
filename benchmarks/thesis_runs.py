"""What `benchmarks/thesis.py` runs: commands in processes of their own, and what each is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from thesis_data import CLASSIFICATION, ENTITIES, Study

from dmpq.bitmap import BitMap
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.tasks.examples import TaskBatch
from dmpq.training.config import FinetuneConfig
from dmpq.training.fake_quant import FakeQuantizedModel
from dmpq.training.objective import own_experts
from dmpq.training.qat import check_map
from dmpq.training.routing import Routers
from dmpq.training.workbench import Workbench, workbench


@dataclass(frozen=True)
class Recipe:
    """How a data set's models are trained.

    Attributes:
        epochs: Of each half: the first is the dense model's, the second everybody's.
        batch_size: Examples per step.
        learning_rate: At its highest.
    """

    epochs: float
    batch_size: int
    learning_rate: float


RECIPES = {
    CLASSIFICATION: Recipe(epochs=3, batch_size=32, learning_rate=2e-3),
    ENTITIES: Recipe(epochs=8, batch_size=32, learning_rate=3e-3),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of the held-out examples.

    Attributes:
        found: Answers, in the order of the batches.
        examples: The examples, likewise.
        selected: Of each layer, the experts that each token selects (tokens, k).
    """

    found: list[Any]
    examples: list[Any]
    selected: list[torch.Tensor]


def command(*words: object, out: Path, threads: int = 1) -> Path:
    """Run a command of dmpq unless its folder is finished, and return the folder."""
    done = out / ".finished"
    if not done.exists():
        given = [str(word) for word in words]
        options = [] if given[0] == "train" and given[1] == "upcycle" else ["--threads", threads]
        line = [sys.executable, "-m", f"dmpq.{given[0]}", *given[1:], *map(str, options)]
        ended = subprocess.run(
            [*line, "--out", str(out)], stdout=subprocess.DEVNULL, check=False
        ).returncode
        if ended:
            raise InputError(
                f"{' '.join(line[2:5])} ended with {ended}; its own message is above."
            )
        done.touch()
    return out


def facts(folder: Path) -> dict[str, Any]:
    """Return what a training says of itself."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    last = (folder / "training" / "log.jsonl").read_text().splitlines()[-1]
    examples = json.loads(last)["step"] * found["config"]["batch_size"]
    return {**found, "samples_per_second": examples / found["seconds"]}


def training(study: Study, model: Path | str, out: Path, recipe: Recipe, *more: object) -> Path:
    """Train a model on a data set by the command."""
    return command(
        *("train", "finetune", "--model", model, "--dataset", study.dataset),
        *("--task", study.task, "--batch-size", recipe.batch_size, "--save-every", 0),
        *("--learning-rate", recipe.learning_rate, *more),
        out=out,
    )


def bench_of(study: Study, model: Path) -> Workbench:
    """Return a trained model with the held-out examples."""
    return workbench(
        FinetuneConfig(model=str(model), dataset=study.dataset, task=study.task, save_every=0)
    )


def answers_of(bench: Workbench, formats: NDArray[np.int64] | None, menu: Menu | None) -> Answers:
    """Return what a model answers under a map; in full precision where none is given.

    Args:
        bench: The model and the examples.
        formats: Menu indices (N, 2).
        menu: What they point into.
    """
    assert bench.task is not None
    found: list[Any] = []
    examples: list[Any] = []
    parts: list[list[torch.Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        routers = None
        if bench.model.containers:
            routers = Routers(bench.model.model)
            if formats is None or menu is None:
                stack.enter_context(own_experts(bench.model))
            else:
                learner = FakeQuantizedModel(bench.moe, menu)
                learner.choose(formats)
                stack.enter_context(bench.moe.experts_forward(learner.forwards))
        for batch in bench.heldout:
            assert isinstance(batch, TaskBatch)
            with nullcontext([]) if routers is None else routers.recording() as logged:
                logits = batch.logits(bench.model)
            found.extend(bench.task.answers(bench.model, batch, logits))
            examples.extend(batch.examples)
            real = batch.mask.flatten() == 1
            parts.append([one[real].topk(2).indices for one in logged])
    selected = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    return Answers(found, examples, selected)


def changed(answers: Answers, full: Answers) -> float | None:
    """Return the share of token-expert selections that full precision does not make."""
    if not full.selected:
        return None
    moved = total = 0
    for mine, theirs in zip(answers.selected, full.selected, strict=True):
        same = (mine[:, :, None] == theirs[:, None]).any(-1)
        moved, total = moved + int((~same).sum()), total + same.numel()
    return moved / total


def judged(bench: Workbench, answers: Answers) -> dict[str, Any]:
    """Return the metrics of answers: of whole texts, or of entities and of single words."""
    assert bench.task is not None
    task = bench.config.task
    metrics: dict[str, Any] = dict(bench.task.judge(answers.found, answers.examples))
    right, said = labels(answers, task)
    names = list(bench.model.model.config.id2label.values())
    if task == CLASSIFICATION:
        scores = precision_recall_fscore_support(right, said, average="macro", zero_division=0)
        metrics |= dict(
            zip(("precision", "recall", "f1"), (100 * s for s in scores[:3]), strict=True)
        )
    else:
        metrics["accuracy"] = 100 * float(np.mean(np.array(right) == np.array(said)))
    matrix = confusion_matrix(right, said, labels=range(len(names)))
    return {**metrics, "labels": names, "confusion": matrix.tolist()}


def labels(answers: Answers, task: str | None) -> tuple[list[int], list[int]]:
    """Return right and given classes, of texts or of words."""
    if task == CLASSIFICATION:
        return [one.targets[0] for one in answers.examples], list(answers.found)
    right = [tag for one in answers.examples for tag in one.targets]
    return right, [tag for tags in answers.found for tag in tags]


def map_of(file: Path, bench: Workbench) -> tuple[NDArray[np.int64], Menu]:
    """Return the formats of a map that was made for a model."""
    bitmap = BitMap.read(file)
    return np.array(check_map(bitmap, bench.moe)), bitmap.menu


def told(bench: Workbench, answers: Answers, pick: Sequence[int]) -> list[tuple[str, str, str]]:
    """Return text, right and given labels of some examples."""
    names = bench.model.model.config.id2label
    rows = []
    for i in pick:
        example, answer = answers.examples[i], answers.found[i]
        text = bench.tokenizer.decode(example.ids, skip_special_tokens=True).strip()
        if bench.config.task == CLASSIFICATION:
            rows.append((text, names[example.targets[0]], names[answer]))
        else:
            say: Callable[[Sequence[int]], str] = lambda tags: " ".join(names[t] for t in tags)  # noqa: E731
            rows.append((text, say(example.targets), say(answer)))
    return rows
