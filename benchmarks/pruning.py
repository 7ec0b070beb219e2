"""What 0 bits on the menu are worth: the knapsack's maps with and without them, on held-out text.

    python benchmarks/pruning.py --threads 1
    python benchmarks/pruning.py --threads 1 --signal gradient

Both maps of a budget come from one profile of the bundled model; budgets below the narrowest
stored width can be met by pruning alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch

from dmpq.config import SearchConfig
from dmpq.console import quiet_libraries
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.objective import Constraints
from dmpq.profile import Profile
from dmpq.session import Session

STORED = "2,3,4,8,16"
BUDGETS = (1.75, 2.0, 2.25, 2.5, 2.75, 3.0)


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--signal", choices=("sensitivity", "gradient"), default="sensitivity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile-tokens", type=int, default=8192)
    parser.add_argument("--heldout-tokens", type=int, default=32768)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    config = SearchConfig(bits=f"0,{STORED}", weights="acc=1", **vars(arguments))
    session = Session(config)
    every = session.profile()
    held = session.evaluator("heldout")
    print(f"held-out KL, nats per token; {arguments.signal}, seed {arguments.seed}")
    print("| bits | with 0 | experts pruned | without 0 | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for bits in BUDGETS:
        cells = []
        for profile in (every, without_pruning(every)):
            try:
                problem = replace(session.problem(profile), constraints=Constraints(avg_bits=bits))
            except InputError:
                cells.append(None)
                continue
            chosen = problem.mckp()
            # The menu without 0 begins one place later.
            shown = chosen + (len(every.menu) - len(profile.menu))
            cells.append((float(held.evaluate(shown[None]).kl[0]), int((shown == 0).sum())))
        (kl, pruned), other = cells
        said = (
            ("not possible", "") if other is None else (f"{other[0]:.4f}", f"{kl / other[0]:.3f}")
        )
        print(f"| {bits:.2f} | {kl:.4f} | {pruned} | {said[0]} | {said[1]} |", flush=True)
    return 0


def without_pruning(profile: Profile) -> Profile:
    """Return a profile of the stored formats alone."""
    kept = {
        name: getattr(profile, name)[:, 1:] for name in ("sensitivity", "output_error", "proxy")
    }
    return replace(profile, menu=Menu.parse(STORED), uniform_kl=profile.uniform_kl[1:], **kept)


if __name__ == "__main__":
    sys.exit(main())
