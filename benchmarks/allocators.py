"""Compare PPO with the exact knapsack at equal metered tokens, over seeds and budgets.

    python benchmarks/allocators.py

For each seed a calibration draw of its own, and the defaults of ``python -m dmpq.search`` but for
``--weights acc=1``. PPO profiles, searches, and chooses among its finalists on fresh text.
The same agent that learns nothing tries as many random perturbations of MCKP, and chooses
likewise; one more learns without PPO's own gradient. MCKP spends the tokens that PPO has spent on
a profile of more text. All are judged on held-out text, on which nothing is chosen. ``--out``
keeps every row as JSON, and ``--read`` prints the table of such files.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import pandas as pd
import torch

from dmpq import agents
from dmpq.agents.ppo import PPOAgent
from dmpq.config import SearchConfig
from dmpq.objective import Constraints
from dmpq.problem import Problem
from dmpq.profile import Profile
from dmpq.profiling import measure_profile
from dmpq.session import Session

BUDGETS = (2.5, 3.0, 3.5)
SEARCHED: dict[str, dict[str, Any]] = {
    "ppo": {},
    "imitation": {"epochs": 0},  # the same without PPO's own gradient
    "perturbations": {"learning_rate": 0.0, "imitation": 0, "probe_share": 0.0},
}


def compare(seed: int, arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    """Return one row per budget and method for one calibration draw."""
    rows: list[dict[str, float | str]] = []
    config = SearchConfig(seed=seed, weights="acc=1", heldout_tokens=arguments.heldout_tokens)
    session = Session(config)
    heldout = session.evaluator("heldout")
    profile = session.profile()
    spent = 0.0
    searched = [name for name in arguments.methods.split(",") if name in SEARCHED]
    for budget in BUDGETS:
        for name in searched:
            problem = _problem(session, profile, budget)
            agent = PPOAgent(**SEARCHED[name])
            result = agent.search(problem, evaluations=config.evaluations, seed=seed)
            tokens = profile.cost_tokens + result.tokens
            if name == "ppo":
                spent = max(spent, tokens)
            kl = heldout.evaluate(problem.expand(result.assignment[None])).kl[0]
            rows.append(_row(seed, budget, name, kl, tokens, float(result.scores.kl[0])))
        if "mckp" not in arguments.methods.split(","):
            continue
        problem = _problem(session, profile, budget)
        small = heldout.evaluate(problem.expand(problem.mckp()[None])).kl[0]
        rows.append(_row(seed, budget, "mckp, the agent's profile", small, profile.cost_tokens))
    if "mckp" not in arguments.methods.split(","):
        return rows
    per_token = profile.cost_tokens / profile.tokens
    larger = Session(replace(config, profile_tokens=round(spent / per_token)))
    rich = measure_profile(larger.evaluator("profile"), text=larger.splits.source)
    for budget in BUDGETS:
        problem = _problem(larger, rich, budget)
        kl = heldout.evaluate(problem.expand(problem.mckp()[None])).kl[0]
        rows.append(_row(seed, budget, "mckp", kl, rich.cost_tokens))
        found = agents.make("frequency").search(problem, evaluations=1, seed=seed)
        kl = heldout.evaluate(problem.expand(found.assignment[None])).kl[0]
        rows.append(_row(seed, budget, "frequency", kl, float(rich.tokens)))
    return rows


def _problem(session: Session, profile: Profile, budget: float) -> Problem:
    problem = session.problem(
        profile,
        evaluator=session.evaluator("search"),
        selector=session.evaluator("selection"),
        further=session.further(),
    )
    return replace(problem, constraints=Constraints(avg_bits=budget))


def _row(
    seed: int, budget: float, name: str, kl: float, tokens: float, search_kl: float = float("nan")
) -> dict[str, float | str]:
    return {
        "seed": seed,
        "budget": budget,
        "method": name,
        "heldout_kl": float(kl),
        "search_kl": search_kl,
        "tokens": tokens,
    }


def show(rows: list[dict[str, float | str]]) -> None:
    """Print held-out KL by budget and method, and its ratio to MCKP's at equal tokens."""
    table = pd.DataFrame(rows)
    if not {"mckp", "ppo", "perturbations"} <= set(table.method):
        print(table.to_string())  # a part, to be read together with others
        return
    reference = table[table.method == "mckp"].set_index(["seed", "budget"]).heldout_kl
    index = pd.MultiIndex.from_frame(table[["seed", "budget"]])
    table["over_mckp"] = table.heldout_kl / reference.loc[index].to_numpy()
    summary = table.groupby(["budget", "method"]).agg(
        kl_mean=("heldout_kl", "mean"),
        kl_std=("heldout_kl", "std"),
        over_mckp_mean=("over_mckp", "mean"),
        over_mckp_error=("over_mckp", "sem"),
        over_mckp_worst=("over_mckp", "max"),
        tokens=("tokens", "mean"),
    )
    searched = table.pivot_table(index=["seed", "budget"], columns="method", values="search_kl")
    wins = int((searched["ppo"] < searched["perturbations"]).sum())
    print(f"PPO below the perturbations on its search text in {wins} of {len(searched)} runs")
    print(summary.to_string(float_format=lambda v: f"{v:,.5g}"))


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="calibration draws, comma-separated")
    parser.add_argument("--methods", default=f"{','.join(SEARCHED)},mckp", help="what to compare")
    parser.add_argument("--read", type=Path, nargs="+", help="rows of earlier runs to show")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heldout-tokens", type=int, default=262144)
    parser.add_argument("--out", type=Path, default=None, help="write every row as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.read is not None:
        show([row for file in arguments.read for row in json.loads(file.read_text())])
        return
    rows: list[dict[str, float | str]] = []
    started = time.monotonic()
    for seed in map(int, arguments.seeds.split(",")):
        rows += compare(seed, arguments)
        print(f"seed {seed} done after {time.monotonic() - started:.0f} s", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
