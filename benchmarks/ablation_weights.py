"""The reward's weights against the Pareto front of loss and a cost, on three devices.

:mod:`dmpq.sweep` searches at every weighting with PPO, and sets the exact knapsack's map of the
same weights and the uniform maps beside. One profile serves all; what is compared is held-out KL
and the cost that the weight is of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from ablation_pages import FOLDER, Ablation, Table, Verdict, listed, read_table

from dmpq.files import replace_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME: Final = "weights"
FILE: Final = f"{FOLDER}/weights.csv"
MADE_BY: Final = "python benchmarks/ablations.py weights --run"
EVALUATIONS: Final = 16
TOKENS: Final = 8192
"""Of an evaluation, and of the final choice."""
HELDOUT_TOKENS: Final = 32768
AGENTS: Final = ("mckp", "ppo")
UNIFORM: Final = "uniform "
_COLOURS: Final = {"mckp": "#d93025", "ppo": "#1a73e8"}


@dataclass(frozen=True)
class Setting:
    """One sweep.

    Attributes:
        hw: Device.
        term: The weight that varies; accuracy's is 1 and the others' 0.
        values: What it is.
        cost: The column that it weighs.
        unit: What the tables show it in, and how much one of it is.
        about: Why this device.
    """

    hw: str
    term: str
    values: tuple[float, ...]
    cost: str
    unit: tuple[str, float]
    about: str

    @property
    def part(self) -> str:
        """As ``dmpq.sweep --sweep`` reads it."""
        return f"{self.term}={','.join(f'{value:g}' for value in self.values)}"


SETTINGS: Final = (
    Setting(
        "m2-max",
        "mem",
        (0.1, 0.2, 0.3, 0.5, 1, 2, 5, 20),
        "memory_bytes",
        ("MB", 1e6),
        "memory adds up over experts",
    ),
    Setting(
        "raspberry-pi-5",
        "lat",
        (0.05, 0.2, 0.3, 0.5, 0.7, 1, 2, 10),
        "latency_s",
        ("ms", 1e-3),
        "latency is bytes, and 3 and 2 bits are slow to unpack",
    ),
    Setting(
        "rtx4090",
        "lat",
        (0.05, 0.2, 0.3, 0.5, 0.7, 1, 2, 10),
        "latency_s",
        ("ms", 1e-3),
        "latency is mostly launches, one for each width in a layer",
    ),
)


def measure(results: Path, *, threads: int, tell: Callable[[str], None]) -> None:
    """Sweep, and keep the figures; an interrupted run goes on in ``runs``.

    Args:
        results: Folder of all results.
        threads: CPU threads.
        tell: Called with what was done.
    """
    import torch

    from dmpq.config import SearchConfig
    from dmpq.console import plain_console
    from dmpq.sweep import sweep

    torch.set_num_threads(threads)
    profile: str | None = None
    found = []
    for setting in SETTINGS:
        out = Path("runs") / f"ablation-weights-{setting.hw}-{setting.term}"
        config = SearchConfig(
            hw=setting.hw,
            agent="ppo",
            weights="acc=1",
            evaluations=EVALUATIONS,
            profile=profile,
            search_tokens=TOKENS,
            selection_tokens=TOKENS,
            heldout_tokens=HELDOUT_TOKENS,
            threads=threads,
            out=str(out),
        )
        sweep(config, [setting.part], plain_console())
        profile = profile or str(out / "profile.safetensors")
        table = pd.read_csv(out / "sweep.csv")
        found.append(table.assign(hw=setting.hw, term=setting.term))
        tell(f"swept {setting.part} on {setting.hw}")
    path = results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, pd.concat(found).to_csv(index=False).encode())


def ablation(results: Path) -> Ablation:
    """Return the ablation, from what is kept.

    Args:
        results: Folder of all results.

    Raises:
        InputError: If figures are missing.
    """
    points = read_table(results / FILE, made_by=MADE_BY)
    parts = [(one, points[points.hw == one.hw].reset_index(drop=True)) for one in SETTINGS]
    return Ablation(
        name=NAME,
        title="The reward's weights against the Pareto front",
        about="`python -m dmpq.sweep` on the bundled model (costs at OLMoE-1B-7B's widths, "
        "analytical, decode, batch 1): the weight of one cost varies, accuracy's is 1, the "
        f"others' 0. PPO has {EVALUATIONS} evaluations of {TOKENS:,} tokens a weighting; `mckp` "
        "is the knapsack's map of the same weights, from the same profile (8,192 tokens). "
        f"Held-out KL on {HELDOUT_TOKENS:,} tokens, one draw; * marks what no map shown beats in "
        "KL and that cost together.",
        tables=tuple(_table(setting, part) for setting, part in parts),
        verdicts=tuple(_verdicts(parts)),
        draw=lambda: _figure(parts),
    )


def front(points: pd.DataFrame, cost: str) -> np.ndarray:
    """Return which maps no other beats: no larger in KL and cost, and smaller in one; (n,).

    Args:
        points: Maps, with a column ``heldout_kl``.
        cost: The other column.
    """
    values = points[["heldout_kl", cost]].to_numpy()
    no_larger = (values[:, None] <= values).all(2)
    smaller = (values[:, None] < values).any(2)
    return ~(no_larger & smaller).any(0)


def _table(setting: Setting, part: pd.DataFrame) -> Table:
    unit, size = setting.unit
    best = front(part, setting.cost)
    rows = []
    for i, row in part.iterrows():
        weight = row[setting.term]
        rows.append(
            (
                row["name"] + (" *" if best[i] else ""),
                "" if np.isnan(weight) else f"{weight:g}",
                f"{row.effective_bits:.2f}",
                f"{row.heldout_kl:.5f}",
                f"{row.heldout_ppl:.4f}",
                f"{row[setting.cost] / size:,.3f}",
                "" if np.isnan(row.reward) else f"{row.reward:.4f}",
            )
        )
    word = "memory" if setting.term == "mem" else "latency"
    return Table(
        f"{setting.hw}, {word} weighed ({setting.about})",
        ("map", setting.term, "bits", "KL", "ppl", f"{word}, {unit}", "reward"),
        tuple(rows),
    )


def distinct(part: pd.DataFrame, agent: str, cost: str) -> int:
    """Return how many different points an agent's maps are.

    Args:
        part: A sweep's maps.
        agent: Whose.
        cost: The cost's column.
    """
    own = part[part.name == agent]
    return len(own[["heldout_kl", cost]].drop_duplicates())


def uniform_maps(part: pd.DataFrame, agent: str, cost: str) -> int:
    """Return at how many weightings an agent's map costs and loses what a uniform one does."""
    uniform = part[part.name.str.startswith(UNIFORM)][["heldout_kl", cost]].to_numpy()
    own = part[part.name == agent][["heldout_kl", cost]].to_numpy()
    return int((own[:, None] == uniform).all(2).any(1).sum())


def beaten_by_uniform(part: pd.DataFrame, agent: str, cost: str) -> int:
    """Return how many of an agent's maps some uniform map beats."""
    uniform = part[part.name.str.startswith(UNIFORM)]
    return sum(
        not front(pd.concat([uniform, row.to_frame().T]), cost)[-1]
        for _, row in part[part.name == agent].iterrows()
    )


def _verdicts(parts: list[tuple[Setting, pd.DataFrame]]) -> list[Verdict]:
    traced, between, learned = [], [], []
    better = worse = 0
    for setting, part in parts:
        cost, count = setting.cost, len(setting.values)
        traced.append(
            listed([f"{distinct(part, agent, cost)} ({agent})" for agent in AGENTS])
            + f" different points for {count} weights on {setting.hw}"
        )
        between.append(
            f"on {setting.hw} {uniform_maps(part, 'ppo', cost)} of PPO's {count} maps are uniform "
            f"ones, and {beaten_by_uniform(part, 'ppo', cost)} are beaten by one "
            f"(mckp: {uniform_maps(part, 'mckp', cost)} and "
            f"{beaten_by_uniform(part, 'mckp', cost)})"
        )
        gain = part[part.name == "ppo"].reward.to_numpy()
        gain = gain - part[part.name == "mckp"].reward.to_numpy()
        better, worse = better + int((gain > 0).sum()), worse + int((gain < 0).sum())
        learned.append(
            f"{int((gain > 0).sum())} of {count} on {setting.hw} (worse at "
            f"{int((gain < 0).sum())}, the same at {int((gain == 0).sum())})"
        )
    memory = parts[0][1]
    best = front(memory, "memory_bytes")
    mixed = memory.name.isin(AGENTS).to_numpy()
    fronts = [
        setting.hw
        for setting, part in parts
        if distinct(part, "ppo", setting.cost) > len(setting.values) / 2
    ]
    corners = [setting.hw for setting, _ in parts if setting.hw not in fronts]
    narrow, wide = (_uniform_bits(memory, key) for key in ("3", "4"))
    own = memory[(memory.name == "ppo") & memory.effective_bits.between(narrow, wide)]
    between_widths = listed([f"{weight:g}" for weight in own.mem])
    first = _bits(memory, "mem", 0.1)
    return [
        Verdict(
            "Do the weights trace a front?",
            f"on {listed(fronts)}" + (f", not on {listed(corners)}" if corners else ""),
            f"they give {'; '.join(traced)}.",
        ),
        Verdict(
            "Does the front offer what uniform maps do not?",
            "sizes between theirs" if (best & mixed).any() else "no",
            f"{int((best & mixed).sum())} of the {int(mixed.sum())} maps found for memory are on "
            f"the front of all; {'; '.join(between)}.",
        ),
        Verdict(
            "Does searching at every weighting beat the knapsack's maps of the same weights?",
            _how_often(better, worse),
            f"PPO's held-out reward is higher at {listed(learned)}, with {EVALUATIONS} "
            "evaluations on one draw.",
        ),
        Verdict(
            "Does the default weight of 0.1 ask for narrow maps?",
            "no" if first > wide else "yes",
            f"mem=0.1 leaves PPO's map at {first:.2f} bits; sizes between uniform 3 and 4 bits "
            f"({narrow:.2f} to {wide:.2f}) are asked for by mem={between_widths}. Whoever has a "
            "size in mind sets a limit (`--avg-bits`, `--memory-gb`), not a weight.",
        ),
    ]


def _how_often(better: int, worse: int) -> str:
    """Return in words how often something is better, of the times that it is not the same."""
    if better > 2 * worse:
        return "mostly"
    return "about as often as not" if 2 * better >= worse else "no"


def _uniform_bits(part: pd.DataFrame, key: str) -> float:
    """Return the effective bits of a uniform map."""
    return float(part[part.name == UNIFORM + key].effective_bits.iloc[0])


def _bits(part: pd.DataFrame, term: str, weight: float) -> float:
    """Return the effective bits of PPO's map at a weight."""
    own = part[(part.name == "ppo") & np.isclose(part[term], weight)]
    return float(own.effective_bits.iloc[0])


def _figure(parts: list[tuple[Setting, pd.DataFrame]]) -> Figure:
    """Draw loss against cost, a panel a device; points by their weights, and the front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    panels = figure.subplots(1, len(parts))
    for axes, (setting, whole) in zip(panels, parts, strict=True):
        unit, size = setting.unit
        part = whole[whole.heldout_kl > 0].reset_index(drop=True)  # the scale has no place for 0
        cost = part[setting.cost] / size
        shown = part.heldout_kl
        best = front(part, setting.cost)
        order = np.argsort(cost[best].to_numpy())
        axes.step(
            cost[best].to_numpy()[order],
            shown[best].to_numpy()[order],
            where="post",
            color="#9aa0a6",
            lw=1,
            label="front of all maps shown",
        )
        uniform = part.name.str.startswith(UNIFORM)
        axes.plot(cost[uniform], shown[uniform], "s", color="#5f6368", ms=6, label="uniform")
        for i in part.index[uniform]:
            key = part.name[i].removeprefix(UNIFORM)
            axes.annotate(f"{key} bits", (cost[i], shown[i]), xytext=(8, -3), **_SMALL)
        for agent, colour in _COLOURS.items():
            own = part.name == agent
            mark = "o" if agent == "ppo" else "x"
            axes.plot(cost[own], shown[own], mark, color=colour, ms=5, label=agent)
            together: dict[tuple[float, float], list[str]] = {}
            for i in part.index[own]:
                place = (float(cost[i]), float(shown[i]))
                together.setdefault(place, []).append(f"{part[setting.term][i]:g}")
            above = agent == "mckp"
            for place, weights in together.items():
                few = len(weights) <= _FEW
                axes.annotate(
                    ", ".join(weights) if few else f"{weights[0]} to {weights[-1]}",
                    place,
                    xytext=(1, 5) if above else (-1, -5),
                    color=colour,
                    ha="left" if above else "right",
                    va="bottom" if above else "top",
                    rotation=50,
                    rotation_mode="anchor",
                    **_SMALL,
                )
        axes.set_yscale("log")
        axes.set_xlabel(f"{'memory' if setting.term == 'mem' else 'latency'}, {unit}")
        axes.set_title(f"{setting.hw}: points by the weight {setting.term}", fontsize=10)
        if setting.term == "mem":
            axes.set_xscale("log")
            axes.set_xticks(
                [320, 360, 400, 450, 500, 600], ["320", "360", "400", "450", "500", "600"]
            )
            axes.minorticks_off()
        axes.margins(x=0.15, y=0.15)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("held-out KL, nats/token (16 bits, which lose nothing, are left out)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


_FEW: Final = 2
"""Weights at one point that are written out."""
_SMALL: Final = {"textcoords": "offset points", "fontsize": 7}
