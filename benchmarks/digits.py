"""The digits report again: a feed-forward network and a sparse MoE, in fp32 and in 8 bits.

    python benchmarks/digits.py --data ../shared/data/mnist     # 8 minutes on an idle core
    python benchmarks/digits.py --pages       # writes the pages of the figures that are there
    python benchmarks/digits.py --check       # says whether the pages are what the figures say

Trains both models with several seeds, quantizes them with what torch and torchao have today, and
prints accuracy, loss, size and latency beside what the report published; then how experts are
used under five ways to balance them. Where the folder has no idx files it runs on scikit-learn's
digits instead, says so, and writes other files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

from dmpq.console import CommandParser, exit_code, quiet_libraries

quiet_libraries()  # before torchao is imported, which writes a line per kernel that it lacks

import torch
from digits_data import Digits, Split, load_digits
from digits_document import document
from digits_latency import ROUNDS, latencies
from digits_models import SparseMoE, by_expert, by_token, multiplications
from digits_page import picture, tables
from digits_quantize import (
    dynamic_int8,
    dynamic_int8_eager,
    lowered,
    save_dynamic,
    save_float,
    save_static,
    static_int8,
    static_int8_eager,
)
from digits_training import (
    BALANCES,
    BATCH,
    ENTROPY_WEIGHT,
    LEARNING_RATE,
    SWITCH_WEIGHT,
    expert_shares,
    largest_difference,
    router_gradients,
    score,
    train_feed_forward,
    train_moe,
)
from torch import nn

from dmpq.files import replace_atomically
from dmpq.hw_models.machine import cpu_name

RESULTS: Final = Path(__file__).parent / "results"
DOCS: Final = Path(__file__).parents[1] / "docs" / "digits.md"
FILES: Final = {"idx": "digits", "scikit-learn": "digits_scikit_learn"}
EPOCHS: Final = {"idx": 6, "scikit-learn": 40}
"""At most; the small set has fewer batches in each."""
SCORED: Final = 10_000
"""Images trained on that training accuracy is measured on: as many as there are test images."""
CALIBRATION: Final = 1024
"""Training images that ranges of activations are observed on."""


def main() -> int:
    """Measure and write, or check what was written."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist"))
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--epochs", type=_positive, help="at most; default 6, or 40 where small")
    parser.add_argument("--out", type=Path, default=RESULTS)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--pages", action="store_true", help="write pages of the kept figures")
    kept.add_argument("--check", action="store_true", help="compare pages with the kept figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def work() -> int:
        if arguments.check:
            return check(RESULTS)
        if arguments.pages:
            return write(RESULTS / FILES["idx"], _kept(RESULTS / FILES["idx"]))
        return run(arguments)

    return exit_code(work, memory="close other programs")


def run(arguments: argparse.Namespace) -> int:
    """Measure everything, print the tables, write figures, pages and the picture."""
    digits = load_digits(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(textwrap.fill(f"Data: {digits.source}.", 80), flush=True)
    epochs = arguments.epochs or EPOCHS[digits.name]
    begun = time.perf_counter()
    figures = measure(digits, seeds=arguments.seeds, epochs=epochs, say=_say)
    print(f"{time.perf_counter() - begun:.0f} s\n")
    stem = arguments.out / FILES[digits.name]
    replace_atomically(stem.with_suffix(".json"), (json.dumps(figures, indent=1) + "\n").encode())
    print(tables(figures))
    return write(stem, figures)


def write(stem: Path, figures: dict[str, Any]) -> int:
    """Write the pages and the picture of some figures; returns 0."""
    for path, text in pages(stem, figures).items():
        replace_atomically(path, text.encode())
        print(f"written: {path}")
    picture(figures, stem.with_suffix(".png"))
    print(f"written: {stem.with_suffix('.png')}")
    return 0


def check(folder: Path) -> int:
    """Return 0 where the pages are what the committed figures make them, else 1."""
    stem = folder / FILES["idx"]
    figures = _kept(stem)
    stale = [
        path
        for path, text in pages(stem, figures).items()
        if not path.is_file() or path.read_text(encoding="utf8") != text
    ]
    for path in stale:
        print(f"{path} does not say what {stem}.json says; run this command without --check.")
    if not stale:
        print(f"The pages say what {stem.name}.json says.")
    return 1 if stale else 0


def pages(stem: Path, figures: dict[str, Any]) -> dict[Path, str]:
    """Return the text of each page by its path; the one in docs is of the committed figures."""
    found = {stem.with_suffix(".md"): tables(figures)}
    return found | ({DOCS: document(figures)} if stem == RESULTS / FILES["idx"] else {})


def measure(
    digits: Digits, *, seeds: int, epochs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return all figures.

    Args:
        digits: The data.
        seeds: How many; they are 0, 1 and so on.
        epochs: Of each training, at most.
        say: Gets a line per trained model.
    """
    rows: list[dict[str, Any]] = []
    balances: list[dict[str, Any]] = []
    kept: dict[str, nn.Module] = {}
    for seed in range(seeds):
        trained = train_feed_forward(digits, seed=seed, epochs=epochs)
        say(f"seed {seed}: FFN, epoch {trained.epoch} of {epochs}")
        rows += _rows(_baselines(trained.model, digits), digits, seed)
        kept.setdefault("FFN", trained.model)
        plain: nn.Module | None = None
        for name, balance in BALANCES.items():
            trained = train_moe(digits, balance, seed=seed, epochs=epochs)
            moe = trained.model
            assert isinstance(moe, SparseMoE)
            say(f"seed {seed}: MoE, balance: {name}, epoch {trained.epoch} of {epochs}")
            plain = moe if plain is None else plain
            balances.append(
                {
                    "balance": name,
                    "seed": seed,
                    "epoch": trained.epoch,
                    "heldout_accuracy": trained.heldout_accuracy,
                    "test": asdict(score(moe, digits.test)),
                    "shares": expert_shares(moe, digits.test),
                    "difference_from_none": largest_difference(moe, plain),
                }
            )
            if name in {"report", "Switch"}:
                rows += _rows(_mixtures(name, moe, digits), digits, seed)
                kept.setdefault(name, moe)
    say("latency")
    baseline, moe = kept["FFN"], kept["Switch"]
    assert isinstance(baseline, nn.Sequential)
    assert isinstance(moe, SparseMoE)
    return {
        "data": {
            "name": digits.name,
            "source": digits.source,
            "sha256": digits.sha256,
            "train": len(digits.train),
            "heldout": len(digits.heldout),
            "test": len(digits.test),
        },
        "recipe": {
            "seeds": seeds,
            "epochs": epochs,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "entropy_weight": ENTROPY_WEIGHT,
            "switch_weight": SWITCH_WEIGHT,
            "train_scored": min(SCORED, len(digits.train)),
            "calibration": min(CALIBRATION, len(digits.train)),
        },
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()}
        | {name: version(name) for name in ("torch", "torchao")},
        "sizes": {
            name: {
                "parameters": sum(one.numel() for one in model.parameters()),
                "multiplications": multiplications(model),
            }
            for name, model in (("FFN", baseline), ("MoE", moe))
        }
        | {"expert": {"parameters": sum(one[0].numel() for one in moe.experts.parameters())}},
        "experts_read": [
            {
                "batch": batch,
                "read": sum(share > 0 for share in expert_shares(moe, _batch(digits, batch))),
            }
            for batch in ROUNDS
        ],
        "rows": rows,
        "balances": balances,
        "gradients": router_gradients(moe, digits.train.images[:BATCH]),
        "latency": _latency(baseline, moe, digits),
    }


Variant = tuple[str, Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], int | None]
"""A model's name, what returns it ready for a batch of images, and the bytes of its file."""


def _baselines(model: nn.Module, digits: Digits) -> Iterator[Variant]:
    assert isinstance(model, nn.Sequential)
    seen = digits.train.images[:CALIBRATION]
    static, eager = static_int8(model, seen), static_int8_eager(model, seen)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        yield "FFN fp32", lambda _: model, save_float(model, file)
        yield "FFN int8 static", lambda x: lowered(static, *x.shape), save_static(static, file)
        yield "FFN int8 static, FBGEMM", lambda _: eager, None


def _mixtures(balance: str, model: SparseMoE, digits: Digits) -> Iterator[Variant]:
    dynamic, eager = dynamic_int8(model), dynamic_int8_eager(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        yield f"MoE ({balance}) fp32", lambda _: model, save_float(model, file)
        yield f"MoE ({balance}) int8 dynamic", lambda _: dynamic, save_dynamic(dynamic, file)
        yield f"MoE ({balance}) int8 dynamic, FBGEMM", lambda _: eager, None


def _rows(variants: Iterator[Variant], digits: Digits, seed: int) -> list[dict[str, Any]]:
    """Return the scores of each variant; others' predictions are held against the first's."""
    rows: list[dict[str, Any]] = []
    seen = digits.train.first(SCORED)
    reference: torch.Tensor | None = None
    for name, ready, size in variants:
        test = ready(digits.test.images)
        with torch.no_grad():
            answers = test(digits.test.images).argmax(-1)
        reference = answers if reference is None else reference
        rows.append(
            {
                "model": name,
                "seed": seed,
                "bytes": size,
                "test": asdict(score(test, digits.test)),
                "train": asdict(score(ready(seen.images), seen)),
                "changed": int((answers != reference).sum()),
            }
        )
    return rows


def _latency(baseline: nn.Sequential, moe: SparseMoE, digits: Digits) -> list[dict[str, Any]]:
    looped, through = copy(moe), copy(moe)
    looped.dispatch, through.dispatch = by_token, by_expert
    seen = digits.train.images[:CALIBRATION]
    static, eager = static_int8(baseline, seen), static_int8_eager(baseline, seen)
    models: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "FFN fp32": baseline,
        "MoE fp32, loop over tokens": looped,
        "MoE fp32, loop over experts": through,
        "MoE fp32, vectorised": moe,
        "FFN int8 static": baseline,
        "FFN int8 static, FBGEMM": eager,
        "MoE int8 dynamic": dynamic_int8(moe),
        "MoE int8 dynamic, FBGEMM": dynamic_int8_eager(moe),
    }
    found = []
    for batch, rounds in ROUNDS.items():
        images = _batch(digits, batch).images
        models["FFN int8 static"] = lowered(static, *images.shape)
        for name, taken in latencies(models, images, rounds=rounds).items():
            found.append({"model": name, "batch": batch, "rounds": rounds} | asdict(taken))
    return found


def _kept(stem: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text(encoding="utf8"))
    return figures


def _batch(digits: Digits, size: int) -> Split:
    """Return the training images that latency is measured on; a small set's are repeated."""
    which = torch.arange(size) % len(digits.train)
    return Split(digits.train.images[which], digits.train.labels[which])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is none; give 1 or more")
    return number


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
