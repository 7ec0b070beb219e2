"""Measure how far a policy moves: trained on all models but one, asked on that one.

    python benchmarks/leave_one_out.py --write

On each of four small MoE models of other families, widths, depths and numbers of experts, PPO
searches at several budgets from a profile of one forward and backward pass (``--signal
gradient``); what it found out on three of them teaches a policy, which proposes maps for the
fourth. Compared on held-out text with the exact knapsack on measured sensitivities (``mckp``),
whose price is that of every variant's evaluation:

- *gradient*: the exact knapsack on the gradients' estimates, without a policy;
- *zero-shot*: the policy's map, at the same price: nothing is evaluated;
- *refined*: PPO from that policy with 20% of MCKP's price, and *refined, no policy* from none.

``--write`` puts the table into ``benchmarks/results/leave_one_out.csv``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import pandas as pd
import torch

from dmpq.agents.lessons import Lesson, learn
from dmpq.agents.policy import Policy
from dmpq.agents.ppo import PPOAgent
from dmpq.config import SearchConfig
from dmpq.console import quiet_libraries
from dmpq.model_evaluator import ModelEvaluator
from dmpq.objective import Constraints
from dmpq.problem import Problem
from dmpq.session import Session

MODELS = ("reference", "mixtral", "deepseek_v2", "qwen2_moe")
ABOVE = (0.3, 0.8, 1.3)
"""Budgets, effective bits above the narrowest uniform map."""
GRADIENT_TOKENS = 4096
PIECE = 8192
SMALL_PIECE = 2048
"""Of text, where there are tokens for few maps: more of them, on more texts."""
LESSON_EVALUATIONS = 200
REFINED = 0.2
MOST = 10**6
"""Evaluations: more than the tokens pay for, which are what counts."""
RESULTS = Path(__file__).parent / "results" / "leave_one_out.csv"


class Subject:
    """A model with its profiles and its text.

    Args:
        name: Of its folder.
        seed: Of the calibration draw.
    """

    def __init__(self, name: str, seed: int) -> None:
        folder = Path(__file__).parent / "models" / name
        self.name = name
        self.seed = seed
        config = SearchConfig(
            model="reference" if name == "reference" else str(folder),
            bits="2g32,3g32,4g32,8g32,16",
            weights="acc=1",
            cost_geometry="olmoe-1b-7b" if name == "reference" else "own",
            seed=seed,
            search_tokens=PIECE,
            selection_tokens=PIECE,
            threads=1,
        )
        self.session = Session(config)
        self.measured = self.session.profile()
        cheap = self.session.with_text(signal="gradient", profile_tokens=GRADIENT_TOKENS)
        self.estimated = cheap.profile()
        self.heldout = self.session.evaluator("heldout")

    def budgets(self) -> list[float]:
        """Return limits on effective bits."""
        free = replace(self.session.problem(self.estimated), constraints=Constraints())
        least = float(free.effective_bits(free.uniform(free.menu.keys[0])[None])[0])
        return [least + above for above in ABOVE]

    def problem(
        self, bits: float, *, measured: bool = False, tokens: float = 0.0, piece: int = PIECE
    ) -> Problem:
        """Return the problem at a budget, with so many tokens for evaluations."""
        session = self.session
        windows = session.splits.search
        plain = session.problem(
            self.measured if measured else self.estimated,
            evaluator=ModelEvaluator(
                session.bank, windows[: piece // windows.shape[1]], label="search"
            ),
            further=session.further(piece),
        )
        return replace(plain, constraints=Constraints(avg_bits=bits), max_tokens=tokens or None)

    def kl(self, problem: Problem, assignment: np.ndarray) -> float:
        """Return a map's KL on held-out text."""
        return float(self.heldout.evaluate(problem.expand(assignment[None])).kl[0])

    def lessons(self) -> list[Lesson]:
        """Search at every budget."""
        tokens = LESSON_EVALUATIONS * PIECE
        found = []
        for bits in self.budgets():
            problem = self.problem(bits, tokens=tokens)
            result = PPOAgent().search(problem, evaluations=MOST, seed=self.seed)
            found.append(Lesson.of(problem, result))
        return found

    def rows(self, policy: Policy) -> list[dict[str, object]]:
        """Return what a policy is worth here, a row per budget."""
        price = self.measured.cost_tokens
        left = REFINED * price - self.estimated.cost_tokens
        found: list[dict[str, object]] = []
        for bits in self.budgets():
            plain = self.problem(bits)
            known = self.problem(bits, measured=True)
            reference = self.kl(known, known.mckp())
            small = self.problem(bits, tokens=left, piece=SMALL_PIECE)
            searched = {
                name: PPOAgent(start=start).search(small, evaluations=MOST, seed=self.seed)
                for name, start in (("refined", policy), ("refined, no policy", None))
            }
            maps = {
                "gradient": plain.mckp(),
                "zero-shot": policy.propose(plain),
                **{name: result.assignment for name, result in searched.items()},
            }
            over = {name: self.kl(plain, one) / reference - 1 for name, one in maps.items()}
            found.append(
                {
                    "model": self.name,
                    "seed": self.seed,
                    "bits": round(bits, 3),
                    "mckp KL": reference,
                    **over,
                    "price": self.estimated.cost_tokens / price,
                    "refined price": (self.estimated.cost_tokens + searched["refined"].tokens)
                    / price,
                }
            )
        return found


def main(argv: list[str] | None = None) -> int:
    """Run and print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws")
    parser.add_argument("--write", action="store_true", help=f"write results/{RESULTS.name}")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    quiet_libraries()
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        subjects = [Subject(name, seed) for name in arguments.models]
        lessons = {subject.name: subject.lessons() for subject in subjects}
        for subject in subjects:
            others = [one for name, own in lessons.items() if name != subject.name for one in own]
            for row in subject.rows(learn(others, seed=seed)):
                print(row, flush=True)
                rows.append(row)
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False))
    print(
        frame.groupby("model")[["gradient", "zero-shot", "refined", "refined, no policy"]].mean()
    )
    if arguments.write:
        frame.to_csv(RESULTS, index=False, float_format="%.5g")
        print(f"wrote benchmarks/results/{RESULTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
