"""Reinforcement learning against heuristics, published allocators and other searches.

Everything is read: the referee's outcomes (``benchmarks/referee.py``), where all agents of a
contest may forward the same number of tokens, and the rows of ``benchmarks/allocators.py``, where
the knapsack's profile takes what PPO spends. Agents are compared on the draws that both ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from ablation_pages import Ablation, Table, Verdict, listed, percent, read_json, read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME: Final = "rl"
GRIDS: Final = {"reference": "The bundled model", "qwen2_moe": "Qwen2-MoE, a second model"}
REFEREE: Final = "python benchmarks/referee.py --run"
ALLOCATORS: Final = "python benchmarks/allocators.py --out benchmarks/results/allocators.json"
MADE_BY: Final = f"{REFEREE} and {ALLOCATORS}"

RL: Final = "ppo"
CONTROL: Final = "ppo, rate 0"
KNAPSACK: Final = "mckp"
SMALL: Final = "mckp, small"
SEARCHES: Final = ("clado", "evopress", "greedy-true")
ONE_MAP: Final = ("gemq", "fisher", "mxmoe", "pmq-code", "error-model", "frequency")
"""The published allocators and the heuristics of one map, on a profile as large as the others'
tokens pay for."""
ORDER: Final = (RL, CONTROL, KNAPSACK, SMALL, *SEARCHES, *ONE_MAP)

LEVEL: Final = 0.01
"""Share of KL within which agents of a single draw are called level: among draws, PPO's KL over
MCKP's varies by about that much (the intervals of the tables)."""


@dataclass(frozen=True, eq=False)
class Grid:
    """One model's contests.

    Attributes:
        outcomes: A row per contest, draw and agent.
        standings: What :mod:`dmpq.referee.standings` makes of them.
    """

    outcomes: pd.DataFrame
    standings: pd.DataFrame

    @property
    def contests(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(self.outcomes.contest))

    @property
    def agents(self) -> list[str]:
        """Who took part, in the order of :data:`ORDER`."""
        return [agent for agent in ORDER if agent in set(self.outcomes.agent)]

    def paired(self, contest: str, other: str) -> np.ndarray:
        """Return PPO's KL over another's, less 1, on every draw that both ran, (n,)."""
        part = self.outcomes[self.outcomes.contest == contest].set_index(["agent", "seed"]).kl
        if RL not in part.index or other not in part.index:
            return np.zeros(0)
        both = pd.concat([part[RL], part[other]], axis=1, join="inner").to_numpy()
        return both[:, 0] / both[:, 1] - 1


def ablation(results: Path) -> Ablation:
    """Return the ablation, from what is kept.

    Args:
        results: Folder of all results.

    Raises:
        InputError: If figures are missing.
    """
    grids = {name: _grid(results / "referee" / name) for name in GRIDS}
    draws = pd.DataFrame(read_json(results / "allocators.json", made_by=ALLOCATORS))
    tables = [table for name, grid in grids.items() for table in _tables(name, grid)]
    return Ablation(
        name=NAME,
        title="Reinforcement learning against heuristics and published allocators",
        about="Held-out KL at equal forwarded tokens, profiles included: about 3.2 M (bundled "
        "model) and 3.0 M (Qwen2-MoE) a run in the referee's contests, about 5 M in the last "
        "table. `ppo` is the searching agent, `ppo, rate 0` the same that learns nothing, `mckp` "
        "the exact knapsack on a profile that takes all tokens, `mckp, small` that on a third; "
        "`clado`, `evopress` and `greedy-true` search by true evaluations; `gemq`, `fisher`, "
        "`mxmoe`, `pmq-code`, `error-model` and `frequency` give one map of their signal. Nothing "
        "was run for this page; draws of one model share the held-out text.",
        tables=(*tables, _seeds_table(draws)),
        verdicts=tuple(_verdicts(grids, draws)),
        draw=lambda: _figure(grids, draws),
    )


def _grid(folder: Path) -> Grid:
    outcomes, standings = (
        read_table(folder / name, made_by=REFEREE) for name in ("outcomes.csv", "standings.csv")
    )
    return Grid(outcomes[outcomes.factor == outcomes.factor.min()], standings)


def _budgets(grid: Grid) -> list[str]:
    return [one for one in grid.contests if one.startswith("bits=")]


def _short(contest: str) -> str:
    """Return a contest as the head of a column."""
    device, _, limits = contest.rpartition(":")
    words = limits.replace("bits=", "").replace("latency=", "lat ").replace("energy=", "energy ")
    return words.replace("+", " bits, ") if device else f"{words} bits"


def _tables(name: str, grid: Grid) -> list[Table]:
    """Return a model's standings, and PPO against each other agent."""
    rows = [
        (agent, *(_over(grid, contest, agent) for contest in _budgets(grid)))
        for agent in grid.agents
    ]
    found = [
        Table(
            f"{GRIDS[name]}: KL over mckp's, %, with 95% intervals where there are two or three "
            "draws (the referee's bootstrap: at most their range)",
            ("", *map(_short, _budgets(grid))),
            tuple(rows),
        )
    ]
    rows = []
    for other in grid.agents:
        if other != RL:
            pairs = [grid.paired(contest, other) for contest in grid.contests]
            rows.append((other, *(percent(p.mean()) if p.size else "" for p in pairs)))
    found.append(
        Table(
            f"{GRIDS[name]}: ppo's KL over each other's on the same draws, mean, %; "
            "below 0 ppo is better",
            ("", *map(_short, grid.contests)),
            tuple(rows),
        )
    )
    return found


def _standing(grid: Grid, contest: str, agent: str) -> pd.Series | None:
    rows = grid.standings
    found = rows[(rows.contest == contest) & (rows.agent == agent)]
    return None if found.empty else found.iloc[0]


def _over(grid: Grid, contest: str, agent: str) -> str:
    row = _standing(grid, contest, agent)
    if row is None:
        return ""
    if row.runs < 2 or agent == KNAPSACK:
        return percent(row.over)
    return f"{percent(row.over)} ({percent(row.over_low)}, {percent(row.over_high)})"


def ratios(draws: pd.DataFrame, method: str, budget: float) -> np.ndarray:
    """Return a method's held-out KL over MCKP's at equal tokens, less 1, one a draw.

    Args:
        draws: Rows of ``benchmarks/allocators.py``.
        method: One of them.
        budget: Effective bits.
    """
    part = draws[draws.budget == budget].set_index(["method", "seed"]).heldout_kl
    both = pd.concat([part[method], part[KNAPSACK]], axis=1, join="inner").to_numpy()
    return both[:, 0] / both[:, 1] - 1


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of n draws, 2 or more, and its 95% interval by Student's t."""
    from scipy.stats import sem, t

    mean, error = float(values.mean()), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return mean, mean - error, mean + error


_METHODS: Final = {
    "ppo": "ppo",
    "perturbations": "perturbations",
    "mckp, the agent's profile": "mckp, small",
    "frequency": "frequency",
}


def _seeds_table(draws: pd.DataFrame) -> Table:
    budgets = sorted(draws.budget.unique())
    rows = []
    for method, shown in _METHODS.items():
        cells = []
        for budget in budgets:
            mean, low, high = mean_interval(ratios(draws, method, budget))
            cells.append(f"{percent(mean)} ({percent(low)}, {percent(high)})")
        rows.append((shown, *cells))
    return Table(
        "The bundled model, the command's defaults, five draws: KL over mckp's at equal tokens, "
        "%, with 95% intervals of the mean (Student's t)",
        ("", *(f"{budget:g} bits" for budget in budgets)),
        tuple(rows),
    )


def _verdicts(grids: dict[str, Grid], draws: pd.DataFrame) -> list[Verdict]:
    against = [
        (name, contest, other, grid.paired(contest, other).mean())
        for name, grid in grids.items()
        for contest in grid.contests
        for other in ONE_MAP
        if grid.paired(contest, other).size
    ]
    ahead = [one for one in against if one[3] < -LEVEL]
    behind = [one for one in against if one[3] > LEVEL]
    level = [one for one in against if abs(one[3]) <= LEVEL]
    searches = [
        (name, contest, other, grid.paired(contest, other).mean())
        for name, grid in grids.items()
        for contest in grid.contests
        for other in SEARCHES
        if grid.paired(contest, other).size
    ]
    return [
        Verdict(
            "Is PPO better than the heuristics and published allocators of one map?",
            "yes" if not behind else "mostly",
            f"it is more than {LEVEL:.0%} ahead in {len(ahead)} of {len(against)} meetings (one "
            "draw each), level in "
            + (f"{len(level)} ({_meetings(level)})" if level else "none")
            + ", behind in "
            + (f"{len(behind)} ({_meetings(behind)})" if behind else "none")
            + ".",
        ),
        _against_knapsack(grids, draws),
        Verdict(
            "Is it better than other searches by true evaluations?",
            "no" if all(one[3] > -LEVEL for one in searches) else "not everywhere",
            f"PPO's KL over theirs is {_meetings(searches)}, on one draw each.",
        ),
        _learning(grids, draws),
    ]


def _meetings(found: list[tuple[str, str, str, float]]) -> str:
    """Return meetings in words."""
    words = [
        f"{percent(over)}% against `{other}` at {_short(contest)}"
        + ("" if name == "reference" else " on Qwen2-MoE")
        for name, contest, other, over in found
    ]
    return listed(words)


def _against_knapsack(grids: dict[str, Grid], draws: pd.DataFrame) -> Verdict:
    """Return the verdict on the exact knapsack, by intervals alone."""
    said: dict[str, list[str]] = {"below": [], "level": [], "above": []}
    for name, grid in grids.items():
        for contest in _budgets(grid):
            row = _standing(grid, contest, RL)
            if row is not None and row.runs > 1:
                where = f"{_short(contest)} ({name}, {row.runs} draws)"
                said[_side(row.over_low, row.over_high)].append(where)
    for budget in sorted(draws.budget.unique()):
        values = ratios(draws, RL, budget)
        _, low, high = mean_interval(values)
        said[_side(low, high)].append(f"{budget:g} bits ({len(values)} draws at the defaults)")
    grid = grids["reference"]
    limits = [
        f"{percent(grid.paired(contest, KNAPSACK).mean())}% ({_short(contest)})"
        for contest in grid.contests
        if contest not in _budgets(grid)
    ]
    return Verdict(
        "Is it better than the exact knapsack on as many tokens?",
        "at some budgets"
        if said["below"] and said["level"] + said["above"]
        else "yes"
        if said["below"]
        else "no",
        "; ".join(
            f"the 95% interval of its KL over mckp's is {words} 0 at {listed(where)}"
            if side != "level"
            else f"it holds 0 at {listed(where)}"
            for side, words in (("below", "below"), ("level", ""), ("above", "above"))
            if (where := said[side])
        )
        + f". Within limits on latency and energy it is {listed(limits)}, on one draw.",
    )


def _side(low: float, high: float) -> str:
    """Return on which side of 0 an interval lies."""
    return "below" if high < 0 else "above" if low > 0 else "level"


def same_maps(draws: pd.DataFrame) -> tuple[int, int]:
    """Return in how many runs PPO without its own gradient ends with the same KL, and of how many.

    Args:
        draws: Rows of ``benchmarks/allocators.py``.
    """
    keyed = draws.set_index(["method", "seed", "budget"]).heldout_kl
    both = pd.concat([keyed["ppo"], keyed["imitation"]], axis=1, join="inner").to_numpy()
    return int((both[:, 0] == both[:, 1]).sum()), len(both)


def _learning(grids: dict[str, Grid], draws: pd.DataFrame) -> Verdict:
    same, runs = same_maps(draws)
    grid = grids["reference"]
    pairs = {contest: grid.paired(contest, CONTROL) for contest in _budgets(grid)}
    text = listed(
        [
            f"{percent(p.mean())}% at {_short(contest)} ({percent(p.min())} to {percent(p.max())})"
            for contest, p in pairs.items()
        ]
    )
    wins = sum(float(p.mean()) < -LEVEL for p in pairs.values())
    return Verdict(
        "Is it the learning that wins?",
        f"at {wins} of {len(pairs)} budgets, and not PPO's own gradient",
        f"its KL is {text} over its control's at learning rate 0, mean and range over draws; "
        f"without PPO's own gradient {same} of {runs} runs end with the same KL to the last digit "
        "(what is learned is the regression that the policy imitates).",
    )


def _figure(grids: dict[str, Grid], draws: pd.DataFrame) -> Figure:
    """Draw KL over MCKP's: a panel for each model's budgets, and one for the five draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(grids) + 1, sharey=False)
    for axes, (name, grid) in zip(panels, grids.items(), strict=False):
        agents = [agent for agent in reversed(grid.agents) if agent != KNAPSACK]
        for i, contest in enumerate(_budgets(grid)):
            for place, agent in enumerate(agents):
                row = _standing(grid, contest, agent)
                if row is None:
                    continue
                over, low, high = 100 * row[["over", "over_low", "over_high"]].astype(float)
                axes.errorbar(
                    over,
                    place + 0.22 * (1 - i),
                    xerr=None if row.runs < 2 else [[over - low], [high - over]],
                    fmt="osD"[i],
                    color=f"C{i}",
                    ms=4,
                    label=_short(contest) if place == len(agents) - 1 else None,
                )
        axes.set_yticks(range(len(agents)), agents)
        axes.set_title(f"{GRIDS[name]}: contests", fontsize=10)
        _scaled(axes)
    axes = panels[-1]
    methods = list(reversed(_METHODS.items()))
    for i, budget in enumerate(sorted(draws.budget.unique())):
        for place, (method, _) in enumerate(methods):
            values = 100 * ratios(draws, method, budget)
            mean, low, high = mean_interval(values)
            height = place + 0.22 * (1 - i)
            axes.plot(values, [height] * len(values), "|", color=f"C{i}", ms=6, alpha=0.6)
            label = f"{budget:g} bits" if place == len(methods) - 1 else None
            axes.errorbar(
                mean,
                height,
                xerr=[[mean - low], [high - mean]],
                fmt="osD"[i],
                color=f"C{i}",
                ms=4,
                label=label,
            )
    axes.set_yticks(range(len(methods)), [shown for _, shown in methods])
    axes.set_title("The bundled model: five draws", fontsize=10)
    _scaled(axes)
    figure.supxlabel("held-out KL over the exact knapsack's at equal tokens, %", fontsize=10)
    return figure


def _scaled(axes: object) -> None:
    """Show differences of percents and of tens of percents on one axis."""
    from matplotlib.ticker import FormatStrFormatter

    axes.set_xscale("symlog", linthresh=2, linscale=1.5)
    axes.set_xticks([-5, -2, -1, 0, 1, 2, 5, 10, 50])
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.axvline(0, color="#9aa0a6", lw=1)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
