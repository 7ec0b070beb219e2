"""Measure how much of what a search gains on its calibration text holds on other modules' text.

    python benchmarks/transfer.py

The calibration modules of the embedded text are halved by a hash of their names. PPO profiles,
searches and chooses on one half, with the defaults of ``python -m dmpq.search`` but for
``--weights acc=1``; its map and the knapsack's are then compared on fresh text of that half and on
the other half, whose standard error is bootstrapped over files. Held-out text plays no part.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq.agents.ppo import PPOAgent
from dmpq.config import SearchConfig
from dmpq.data import TokenRequest, load_splits
from dmpq.embedded import side_documents, texts_told_once
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import load_model
from dmpq.objective import Constraints
from dmpq.session import Session

BUDGETS = (2.5, 3.0, 3.5)
FRESH_TOKENS = 65536
TOKENS_PER_FILE = 16384
RESAMPLES = 2000


def write_halves(folder: Path) -> tuple[Path, list[Path]]:
    """Write each calibration file as text; return the first half's folder, the second's files."""
    told = set(texts_told_once("calibration"))
    own, others = folder / "own", []
    own.mkdir()
    for i, document in enumerate(side_documents("calibration")):
        if document.text in told:
            first = hashlib.sha256(f"half of {document.module}".encode()).digest()[0] % 2 == 0
            path = (own if first else folder) / f"{i:03}.txt"
            path.write_text(document.text, encoding="utf-8")
            if not first:
                others.append(path)
    return own, others


def main() -> None:
    """Print one line per seed and budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1", help="calibration draws, comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _, tokenizer = load_model("reference")
    with tempfile.TemporaryDirectory() as folder:
        own, others = write_halves(Path(folder))
        for seed in map(int, arguments.seeds.split(",")):
            compare(seed, own, others, tokenizer)


def compare(seed: int, own: Path, others: list[Path], tokenizer: object) -> None:
    """Search on one half and print KL relative to the knapsack's on both."""
    config = SearchConfig(seed=seed, weights="acc=1", dataset=str(own), heldout_tokens=1)
    chosen_on = config.selection_tokens
    session = Session(replace(config, selection_tokens=chosen_on + FRESH_TOKENS))
    windows = session.splits.selection
    length = windows.shape[1]

    def evaluator(text: np.ndarray, label: str) -> ModelEvaluator:
        return ModelEvaluator(session.bank, text, label=label)

    selector = evaluator(windows[: chosen_on // length], "selection")
    fresh = evaluator(windows[chosen_on // length :], "fresh")
    elsewhere = [
        evaluator(text, path.name)
        for path in others
        if len(text := _text_of(path, tokenizer, length, seed))
    ]
    profile = session.profile()
    for budget in BUDGETS:
        problem = session.problem(
            profile, evaluator=session.evaluator("search"), selector=selector
        )
        problem = replace(problem, constraints=Constraints(avg_bits=budget))
        result = PPOAgent().search(problem, evaluations=config.evaluations, seed=seed)
        maps = problem.expand(np.array([problem.mckp(), result.assignment]))
        knapsack, found = fresh.evaluate(maps).kl
        sums = np.array([e.tokens * e.evaluate(maps).kl for e in elsewhere])
        drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        resampled = sums[drawn].sum(1)
        there = sums[:, 1].sum() / sums[:, 0].sum() - 1
        error = (resampled[:, 1] / resampled[:, 0]).std()
        print(
            f"seed {seed}, {budget} bits: {found / knapsack - 1:+.2%} on fresh text of its own "
            f"modules, {there:+.2%} (standard error {error:.2%}) on {len(sums)} files of others",
            flush=True,
        )


def _text_of(path: Path, tokenizer: object, length: int, seed: int) -> np.ndarray:
    """Return a file's windows, at most as many as hold :data:`TOKENS_PER_FILE` tokens."""
    whole = len(path.read_text(encoding="utf-8").encode()) * 4 // 5 // length
    wanted = min(whole, TOKENS_PER_FILE // length) * length
    if not wanted:
        return np.empty((0, length), np.int64)
    tokens = TokenRequest(0, wanted, 0, 0)
    return load_splits(str(path), tokenizer, length=length, tokens=tokens, seed=seed).search


if __name__ == "__main__":
    main()
