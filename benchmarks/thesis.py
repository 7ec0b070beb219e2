r"""The thesis: sentiment and named entities with mixed precision, experts and quantization.

    python benchmarks/thesis.py                                     # the pages again, as kept
    python benchmarks/thesis.py --run --data ../shared/data --work runs/thesis
    python benchmarks/thesis.py --run --dataset reviews.csv --task classification \
        --work runs/mine --results runs/mine/results
    python benchmarks/thesis.py --run --dataset ... --task ... --model path/to/encoder ...

A small BERT is trained from nothing (or a user's encoder, ``--model``) for the first half of its
epochs; then it goes on as it is, and, by sparse upcycling, as an MoE of 4 experts in each layer,
two per token. Beside them that MoE is trained from nothing, for both halves. The MoE's experts are
quantized uniformly and by a map that a search finds, and trained under the narrowest and the found
map. On the first data set MoE and dense model are also trained in FP32, BF16 and FP16, at several
batch sizes and seeds. Every training is a command in a process of its own; those that are finished
are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from thesis_data import CLASSIFICATION, ENTITIES, OURS, Study, bare_encoder, our_studies, texts_of
from thesis_pages import write_pages
from thesis_runs import (
    RECIPES,
    Answers,
    Recipe,
    answers_of,
    bench_of,
    changed,
    command,
    facts,
    judged,
    map_of,
    told,
    training,
)

from dmpq.console import quiet_libraries
from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.formats import Menu
from dmpq.training.workbench import Workbench

RESULTS = Path(__file__).parent / "results" / "thesis"
PAGE = Path(__file__).parent.parent / "docs" / "thesis.md"
EXPERTS, TOP_K = 4, 2
BITS = "2,3,4,8,16"
BUDGET = 2.75
PRECISIONS = ("fp32", "bf16", "fp16")
BATCHES = (8, 16, 32)
SHOWN = 6
"""Predictions of each kind on the page."""
Formats = tuple[NDArray[np.int64] | None, Menu | None]
"""Menu indices (N, 2) and what they point into; none for full precision."""


def main() -> int:
    """Run what is missing where asked, and write the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run what is missing, and keep it")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/thesis"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="(default: docs/thesis.md for our data)")
    parser.add_argument("--dataset", help="your own data: a file, a folder, or a hub name")
    parser.add_argument("--task", choices=(CLASSIFICATION, ENTITIES))
    parser.add_argument("--model", help="your own dense encoder (default: a small one, untrained)")
    parser.add_argument("--only", nargs="+", choices=OURS, help="some of our data sets")
    parser.add_argument("--amp-steps", type=int, default=60, help="of each run in low precision")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the runs at the middle batch size"
    )
    parser.add_argument("--epochs", type=float, help="of each half (default: by the task)")
    arguments = parser.parse_args()
    quiet_libraries()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        if arguments.run:
            for study in _studies(arguments):
                run(study, arguments)
        kept = [json.loads(f.read_text()) for f in sorted(arguments.results.glob("data-*.json"))]
        if not kept:
            raise InputError(f"{arguments.results} holds no results; run with --run first.")
        own = arguments.results != RESULTS
        page = arguments.page or (arguments.results / "thesis.md" if own else PAGE)
        for table in write_pages(kept, arguments.results, page):
            print(table)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _studies(arguments: argparse.Namespace) -> list[Study]:
    if arguments.dataset is None:
        if not (arguments.data / "sst2").is_dir():
            raise InputError(
                f"{arguments.data} holds no sst2; give --data, or your own --dataset."
            )
        found = our_studies(arguments.data, arguments.work)
        return [one for one in found if not arguments.only or one.name in arguments.only]
    if arguments.task is None:
        raise InputError("--dataset needs --task: classification, or token-classification.")
    name = Path(arguments.dataset).stem or "data"
    return [Study(name, arguments.task, arguments.dataset)]


def run(study: Study, arguments: argparse.Namespace) -> None:
    """Train, quantize and judge everything on one data set, and keep the figures."""
    work = arguments.work / study.name
    work.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[study.task]
    if arguments.epochs is not None:
        recipe = Recipe(arguments.epochs, recipe.batch_size, recipe.learning_rate)
    first = _first(study, work, recipe, arguments.model)
    second = ("--epochs", recipe.epochs, "--seed", 1)
    dense = training(study, first / "model", work / "dense", recipe, *second)
    upcycled = command(
        *("train", "upcycle", "--model", first / "model", "--experts", EXPERTS),
        *("--top-k", TOP_K, "--noise", 0.05),
        out=work / "upcycled",
    )
    moe = training(study, upcycled, work / "moe", recipe, *second)
    whole = ("--epochs", 2 * recipe.epochs, "--seed", 1)
    anew = training(study, upcycled, work / "anew", recipe, *whole, "--from-scratch")
    bench = bench_of(study, moe / "model")
    kept: dict[str, Any] = {
        "name": study.name,
        "task": study.task,
        "source": bench.source,
        "trained": {
            "dense, first half": facts(first),
            "dense, both halves": facts(dense),
            "MoE, second half": facts(moe),
            "MoE from nothing, both halves": facts(anew),
        },
        "bits": quantized(study, work, moe, anew, recipe),
        "predictions": {},
        "precision": [],
    }
    kept["predictions"] = kept["bits"].pop("predictions")
    plain = bench_of(study, dense / "model")
    kept["dense"] = judged(plain, answers_of(plain, None, None))
    if study.name in ("sst2", Path(arguments.dataset or "").stem):
        kept["precision"] = list(precisions(study, work, first, upcycled, recipe, arguments))
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"data-{study.name}.json"
    replace_atomically(file, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())


def _first(study: Study, work: Path, recipe: Recipe, model: str | None) -> Path:
    """Return the dense model after the first half of its training."""
    half = ("--epochs", recipe.epochs)
    if model is not None:
        return training(study, model, work / "first", recipe, *half, "--new-head")
    bare = work / "bare"
    if not (bare / "config.json").exists():
        bare_encoder(bare, texts_of(study), vocabulary=3000, hidden=64)
    return training(study, bare, work / "first", recipe, *half, "--from-scratch")


def quantized(study: Study, work: Path, moe: Path, anew: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what every width, a found map, and training under maps are worth.

    Args:
        study: The data.
        work: Where searches and trainings are.
        moe: The upcycled model.
        anew: The one from nothing, of which 16 and 2 bits are shown.
        recipe: Of the trainings.
    """
    data = ("--model", moe / "model", "--dataset", study.dataset, "--task", study.task)
    own = (*data, "--bits", BITS, "--weights", "acc=1", "--profile-tokens", 2048)
    small = ("--search-tokens", 4096, "--selection-tokens", 4096, "--heldout-tokens", 65536)
    found = command(
        *("search", *own, *small, "--avg-bits", BUDGET, "--evaluations", 24), out=work / "search"
    )
    narrowest = command(
        *("search", *data, "--bits", "2", "--agent", "uniform", "--weights", "acc=1"),
        *("--profile-tokens", 512, *small, "--evaluations", 1, "--avg-bits", 3),
        out=work / "search-2",
    )
    rows: dict[str, Any] = {}
    pages: dict[str, Any] = {}
    bench = bench_of(study, moe / "model")
    full = answers_of(bench, None, None)
    menu = Menu.parse(BITS)
    shape = (bench.moe.spec.num_experts, 2)
    formats: dict[str, Formats] = {"16 bits": (None, None)}
    for key in ("8", "4", "3", "2"):
        formats[f"{key} bits"] = (np.full(shape, menu.keys.index(key)), menu)
    formats["found map"] = map_of(found / "bitmap.json", bench)
    pick = _pick(full, study.task)
    for name, (chosen, on) in formats.items():
        answers = answers_of(bench, chosen, on)
        rows[name] = _row(bench, (chosen, on), answers, full)
        pages[name] = told(bench, answers, pick)
    for name, bitmap in (("2 bits", narrowest), ("found map", found)):
        out = work / f"qat-{name.replace(' ', '-')}"
        command(
            *("train", "qat", bitmap / "bitmap.json", "--labels", 1, "--steps", 200),
            *("--batch-size", recipe.batch_size, "--save-every", 0),
            *("--learning-rate", recipe.learning_rate / 4),
            out=out,
        )
        trained = bench_of(study, out / "model")
        chosen, on = map_of(out / "bitmap.json", trained)
        answers = answers_of(trained, chosen, on)
        rows[f"{name}, trained"] = _row(trained, (chosen, on), answers, full)
        pages[f"{name}, trained"] = told(trained, answers, pick)
    other = bench_of(study, anew / "model")
    full = answers_of(other, None, None)
    for name in ("16 bits", "2 bits"):
        rows[f"from nothing, {name}"] = _row(
            other, formats[name], answers_of(other, *formats[name]), full
        )
    return {"rows": rows, "predictions": pages}


def _row(bench: Workbench, given: Formats, answers: Answers, full: Answers) -> dict[str, Any]:
    """Return what answers under a map are worth, and how far they route as in full precision."""
    chosen, menu = given
    bits = 16.0
    if chosen is not None and menu is not None:
        spec = bench.moe.spec
        stored = np.take_along_axis(spec.stored_bits(menu), chosen[:, :, None], 2)
        bits = float(stored.sum()) / float(spec.expert_parameters)
    return {
        **judged(bench, answers),
        "effective_bits": bits,
        "changed": changed(answers, full),
    }


def _pick(full: Any, task: str) -> list[int]:
    """Return examples that full precision has right, and such that it has wrong."""
    right, wrong = [], []
    for i, (answer, example) in enumerate(zip(full.found, full.examples, strict=True)):
        hit = (
            answer == example.targets[0]
            if task == CLASSIFICATION
            else tuple(answer) == example.targets
        )
        told_anything = task == CLASSIFICATION or len(set(example.targets)) > 1
        if told_anything and len(example.ids) < 40:
            (right if hit else wrong).append(i)
    return [*right[:SHOWN], *wrong[:SHOWN]]


def precisions(
    study: Study,
    work: Path,
    first: Path,
    upcycled: Path,
    recipe: Recipe,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield what training in each precision gives, by model, batch size and seed."""
    for kind, model in (("MoE", upcycled), ("dense", first / "model")):
        for batch in BATCHES:
            middle = batch == BATCHES[1]
            if kind == "dense" and not middle:
                continue
            for seed in range(arguments.seeds if middle and kind == "MoE" else 1):
                for precision in PRECISIONS:
                    out = work / f"amp-{kind}-{batch}-{seed}-{precision}"
                    own = Recipe(recipe.epochs, batch, recipe.learning_rate / 2)
                    training(
                        *(study, model, out, own, "--precision", precision, "--seed", 10 + seed),
                        *(
                            "--steps",
                            arguments.amp_steps,
                            "--probe-every",
                            arguments.amp_steps // 2,
                        ),
                    )
                    yield {
                        "kind": kind,
                        "batch": batch,
                        "seed": seed,
                        "precision": precision,
                        "steps": arguments.amp_steps,
                        **facts(out),
                    }


if __name__ == "__main__":
    sys.exit(main())
