"""What GPTQ's profiles promise and held-out text shows, calibrated on the profile's text or apart.

    python benchmarks/calibration_gap.py

Until GPTQ had text of its own the profile's calibrated it, on which a width loses less than
elsewhere. Both rules here, on the bundled model and the same roles of the embedded text: the KL of
uniform maps on the profile's text and on held-out text, and of the exact knapsack's map the sum of
its sensitivities beside its held-out KL.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq.config import SearchConfig
from dmpq.console import quiet_libraries
from dmpq.data import CalibrationText
from dmpq.session import Session

CONFIG = SearchConfig(
    quantizer="gptq,affinity",
    bits="2,3,4",
    avg_bits=2.75,
    weights="acc=1",
    search_tokens=128,
    selection_tokens=0,
    further_tokens=0,
    heldout_tokens=32768,
)


def rows(rule: str, session: Session) -> list[str]:
    """Return what one rule promises and keeps, as rows of Markdown, KL in nats per byte."""
    profile, evaluator = session.profile(), session.evaluator("heldout")
    chosen = session.problem(profile).project(profile.sensitivity)
    experts = np.arange(len(chosen))
    uniform = np.arange(len(profile.menu))[:, None].repeat(len(chosen), 1)
    promised = [*profile.uniform_kl, profile.sensitivity[experts, chosen].sum()]
    kept = evaluator.evaluate(np.vstack([uniform, chosen[None]])).kl
    maps = [*(f"uniform {key}" for key in profile.menu.keys), f"knapsack at {CONFIG.avg_bits}"]
    return [
        f"| {rule} | {name} | {before:.4f} | {after:.4f} | {after / before:.2f} |"
        for name, before, after in zip(maps, promised, kept, strict=True)
    ]


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    apart = Session(replace(CONFIG, seed=arguments.seed))
    profiled = Session(
        apart.config, calibration=CalibrationText(CONFIG.dataset, apart.splits.drawn)
    )
    profiled.take(*apart._loaded)
    profiled.__dict__["splits"] = apart.splits  # a cached property: the same roles for both
    print("| calibrated on | map | promised | held-out | ratio |")
    print("| --- | --- | ---: | ---: | ---: |")
    for rule, session in (("the profile's text", profiled), ("text of its own", apart)):
        print("\n".join(rows(rule, session)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
