"""What a comparison leaves behind: tables for a terminal and for a page, CSV, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from dmpq.referee.referee import REFERENCE, Outcome
from dmpq.referee.standings import ALL, Standing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_MILLION: Final = 1e6
_PERCENT: Final = 100.0
_PANELS: Final = 3
"""Of the picture, in a row."""


def table(contest: str, rows: Sequence[Standing]) -> Table:
    """Return one contest's standings for a terminal of 80 columns."""
    from rich.table import Table

    shown = Table(title=contest, title_justify="left", box=None, pad_edge=False)
    shown.add_column("agent")
    names = ("KL", f"over {REFERENCE}, %", "95% interval", "P(better)", "Mtokens", "s")
    for name in names:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.agent,
            _number(row.kl, 4),
            _percent(row.over),
            _interval(row),
            _number(row.better, 2),
            _number(row.tokens / _MILLION, 2),
            _number(row.seconds, 0),
        )
    return shown


def markdown(rows: Iterable[Standing]) -> str:
    """Return all standings as Markdown, one table a contest."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        if row.contest not in parts:
            title = "All contests together" if row.contest == ALL else f"`{row.contest}`"
            parts[row.contest] = [
                f"### {title}",
                "",
                f"| agent | runs | KL | over {REFERENCE} | 95% interval | P(better) | "
                "perplexity | accuracy | regret | Mtokens | s |",
                "| --- | " + " | ".join(["---:"] * 10) + " |",
            ]
        parts[row.contest].append(
            f"| {row.agent} | {row.runs} | {_number(row.kl, 4)} | {_percent(row.over, '%')} | "
            f"{_interval(row, '%')} | {_number(row.better, 2)} | {_number(row.perplexity, 3)} | "
            f"{row.accuracy:.2%} | {_percent(row.regret, '%')} | "
            f"{_number(row.tokens / _MILLION, 2)} | {_number(row.seconds, 0)} |"
        )
    return "\n\n".join("\n".join(lines) for lines in parts.values()) + "\n"


def curves(outcomes: Sequence[Outcome]) -> Figure:
    """Draw the KL on the search text against metered tokens, a panel per model and contest.

    Means over draws of the best map so far. Agents of a single map are points.
    """
    from matplotlib.figure import Figure

    least = min(outcome.factor for outcome in outcomes)
    kept = [outcome for outcome in outcomes if outcome.factor == least]
    panels = list(dict.fromkeys((outcome.model, outcome.contest) for outcome in kept))
    agents = list(dict.fromkeys(outcome.agent for outcome in kept))
    rows = -(-len(panels) // _PANELS)
    figure = Figure(figsize=(14, 3.6 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, _PANELS, squeeze=False)
    colours = {agent: f"C{i % 10}" for i, agent in enumerate(agents)}
    marks = {agent: "os^Dv<>Ph*"[i // 10 % 10] for i, agent in enumerate(agents)}
    for axes, (model, contest) in zip(grid.flat, panels, strict=False):
        for agent in agents:
            runs = [o for o in kept if (o.model, o.contest, o.agent) == (model, contest, agent)]
            if runs:
                tokens, kl = _mean_curve(runs)
                style = {"color": colours[agent], "label": agent, "lw": 1.2}
                if len(tokens) > 1:
                    axes.step(tokens / _MILLION, kl, where="post", **style)
                else:
                    axes.plot(tokens / _MILLION, kl, marks[agent], ms=5, **style)
        axes.set_title(f"{model}, {contest}", fontsize=10)
        axes.grid(alpha=0.2)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("forwarded tokens, profile included, millions", fontsize=10)
    figure.supylabel("KL on the search text, nats/token", fontsize=10)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=6, fontsize=8
    )
    return figure


def _mean_curve(runs: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean best KL of several runs at the tokens where any of them improves.

    From where all of them have a map, up to what they spent; a single point for agents of one.
    """
    start = max(run.curve[0][0] for run in runs)
    at = sorted({tokens for run in runs for tokens, _ in run.curve if tokens >= start})
    spent = float(np.mean([run.tokens for run in runs]))
    if any(len(run.curve) > 1 for run in runs) and spent > at[-1]:
        at.append(spent)
    values = []
    for run in runs:
        tokens, kl = np.array(run.curve).T
        values.append(kl[np.searchsorted(tokens, at, side="right") - 1])
    return np.array(at), np.mean(values, axis=0)


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else ""


def _percent(value: float, unit: str = "") -> str:
    return f"{value * _PERCENT:+.2f}{unit}" if math.isfinite(value) else ""


def _interval(row: Standing, unit: str = "") -> str:
    if not math.isfinite(row.over_low):
        return ""
    return f"{_percent(row.over_low, unit)} to {_percent(row.over_high, unit)}"
