"""The referee's grids that the README shows: run what is missing of them, and print its tables.

    python benchmarks/referee.py                    # the README's tables, from the kept outcomes
    python benchmarks/referee.py --run --jobs 2     # goes on in runs/, and keeps what is there
    python benchmarks/referee.py --run --grid qwen2_moe --seeds 5

A grid is one model with budgets near its narrowest width, and a latency, an energy and a joint
limit (:mod:`dmpq.compare`). Budgets differ between models because their menus do: the narrow
matrices of ``qwen2_moe`` ask for groups of 32, where a 2-bit weight takes 3 bits. Kept in
``benchmarks/results/referee``: the outcomes, the standings of each grid, and the picture.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dmpq.compare import compare
from dmpq.config import SearchConfig
from dmpq.console import plain_console, quiet_libraries
from dmpq.referee.contest import Contest
from dmpq.referee.referee import Plan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "referee"
LIMITS = ("m2-max:latency=94%", "raspberry-pi-5:energy=92%", "m2-max:{bits}+latency=95%")
AGENTS = ("ppo", "greedy-true", "gemq", "fisher", "mxmoe", "pmq-code", "error-model", "frequency")
SHOWN = ("ppo", "ppo, rate 0", "mckp, small", "evopress", "greedy-true", "clado", "gemq", "fisher")
SHARED = SearchConfig(
    evaluations=200,
    search_tokens=8192,
    selection_tokens=32768,
    weights="acc=1",
    threads=1,
    cost_geometry="olmoe-1b-7b",
)


@dataclass(frozen=True)
class Grid:
    """One model's contests.

    Attributes:
        model: Checkpoint.
        bits: The menu.
        budgets: Contests that limit bits alone.
        joint: The budget that is limited together with latency.
    """

    model: str
    bits: str
    budgets: tuple[str, ...]
    joint: str

    @property
    def contests(self) -> tuple[Contest, ...]:
        """All of them."""
        limits = (text.format(bits=self.joint) for text in LIMITS)
        return tuple(map(Contest.parse, (*self.budgets, *limits)))

    def plan(self, agents: tuple[str, ...], seeds: int, *, budgets: bool = False) -> Plan:
        """Return the plan of so many draws, of budgets alone or of all contests."""
        return Plan(
            config=replace(SHARED, bits=self.bits),
            models=(self.model,),
            seeds=tuple(range(seeds)),
            contests=self.contests[: len(self.budgets)] if budgets else self.contests,
            agents=agents,
        )


GRIDS = {
    "reference": Grid(
        model="reference",
        bits="2,3,4,8,16",
        budgets=("bits=2.5", "bits=2.75", "bits=3"),
        joint="bits=3",
    ),
    "qwen2_moe": Grid(
        model=str(HERE / "models" / "qwen2_moe"),
        bits="2g32,3g32,4g32,8g32,16",
        budgets=("bits=3.25", "bits=3.5", "bits=3.75"),
        joint="bits=3.75",
    ),
}


def main() -> int:
    """Run and keep grids where asked, and print the README's tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run what is missing of the grids")
    parser.add_argument("--grid", choices=GRIDS, nargs="+", default=list(GRIDS))
    parser.add_argument("--agents", nargs="+", default=list(AGENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", action="store_true", help="run the budgets alone")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    quiet_libraries()
    for name in arguments.grid:
        if arguments.run:
            folder = Path("runs") / f"referee-{name}"
            plan = GRIDS[name].plan(
                tuple(arguments.agents), arguments.seeds, budgets=arguments.budgets
            )
            compare(plan, folder, plain_console(), jobs=arguments.jobs)
            kept = RESULTS / name
            kept.mkdir(parents=True, exist_ok=True)
            for file in ("standings.md", "standings.csv", "outcomes.csv", "curves.png"):
                shutil.copy(folder / file, kept / file)
        print(f"\n**{name}**\n\n{readme_table(RESULTS / name / 'standings.csv')}")
    return 0


def readme_table(standings: Path) -> str:
    """Return, as Markdown, what agents lose over MCKP in each contest, with 95% intervals.

    Args:
        standings: A grid's ``standings.csv``.
    """
    rows = pd.read_csv(standings)
    contests = [one for one in dict.fromkeys(rows.contest) if one != "all"]
    lines = [
        "| | " + " | ".join(f"`{one}`" for one in contests) + " |",
        "| --- |" + " ---: |" * len(contests),
    ]
    for agent in (one for one in SHOWN if one in set(rows.agent)):
        cells = []
        for contest in contests:
            found = rows[(rows.agent == agent) & (rows.contest == contest)]
            if found.empty:
                cells.append("")
                continue
            row = found.iloc[0]
            interval = f"{100 * row.over_low:+.1f} to {100 * row.over_high:+.1f}"
            cells.append(f"{row.over:+.1%} ({interval if row.runs > 1 else 'one draw'})")
        lines.append(f"| {agent} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
