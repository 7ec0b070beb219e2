"""What a search leaves behind: the table, its machine-readable twin, and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.evaluation import LossUnit
from dmpq.files import replace_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from dmpq.agents import Candidate
    from dmpq.hw_models import Cost, Workload
    from dmpq.problem import Problem

_FAINT: Final = "#9aa0a6"
_STRONG: Final = "#1a73e8"
_FRONT: Final = "#d93025"

_LINES: Final = (_FAINT, _STRONG, _FRONT)

_SAME: Final = 1e-3
"""Costs closer than this share are the same on the front: no cost model tells them apart."""
_LEAST_SPAN: Final = 0.02
"""Share of the costs that an axis spans at least, so that no rounding looks like a choice."""


_BYTES: Final = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
_SECONDS: Final = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}
_JOULES: Final = {"mJ": 1e-3, "J": 1.0, "kJ": 1e3}
_LONGEST: Final = 1e4
"""The table's numbers stay below this, so that a row fits 80 columns."""
_HEADS: Final = {
    "accuracy": "acc %",
    "f1": "F1 %",
    "precision": "prec\n%",
    "recall": "rec\n%",
    "exact_match": "EM %",
    "bleu": "BLEU",
}
_FEW_TOKENS: Final = 10.0
_LARGE_PERPLEXITY: Final = 100.0
_KL: Final = LossUnit()
_MANY_METRICS: Final = 3


@dataclass(frozen=True)
class Row:
    """One allocation in the final table.

    Attributes:
        name: The allocation.
        effective_bits: Bits per expert weight, scales and zero-points included.
        heldout_kl: KL to the full-precision logits on held-out text, nats per token.
        heldout_ppl: Perplexity per token on held-out text.
        memory_bytes: Memory of the whole model at the cost geometry.
        latency_s: Time of one step of the workload.
        tokens_per_s: Tokens per second in that workload.
        energy_j: Energy of one step.
        evaluations: True evaluations that finding it took.
    """

    name: str
    effective_bits: float
    heldout_kl: float
    heldout_ppl: float
    memory_bytes: float
    latency_s: float
    tokens_per_s: float
    energy_j: float
    evaluations: int

    @classmethod
    def of(
        cls,
        name: str,
        *,
        bits: float,
        kl: float,
        nll: float,
        cost: Cost,
        workload: Workload,
        evaluations: int,
    ) -> Row:
        """Return the row of one map.

        Args:
            name: The allocation.
            bits: Effective bits per expert weight.
            kl: Held-out KL, nats per token.
            nll: Held-out negative log-likelihood, nats per token.
            cost: Of the one map (K = 1).
            workload: That the costs are for.
            evaluations: True evaluations that finding it took.
        """
        return cls(
            name=name,
            effective_bits=float(bits),
            heldout_kl=float(kl),
            heldout_ppl=float(np.exp(nll)),
            memory_bytes=float(cost.memory_bytes[0]),
            latency_s=float(cost.latency_s[0]),
            tokens_per_s=float(cost.tokens_per_s(workload)[0]),
            energy_j=float(cost.energy_j[0]),
            evaluations=evaluations,
        )


@dataclass(frozen=True)
class TaskRow(Row):
    """One allocation in the final table of a task, whose KL and perplexity are per answer.

    Attributes:
        metrics: On held-out examples, by name, in percent.
    """

    metrics: Mapping[str, float]

    @classmethod
    def judged(cls, row: Row, metrics: Mapping[str, float]) -> TaskRow:
        """Return a row with a task's metrics."""
        return cls(**vars(row), metrics=metrics)


def table(rows: Sequence[Row], *, caption: str, best: str, marked: Sequence[str] = ()) -> Table:
    """Return the final table for the terminal, at most 80 columns wide.

    Tokens per second, which latency says too, make room for a task's metrics.

    Args:
        rows: The allocations.
        caption: What the costs were computed for.
        best: Name of the row to set in bold.
        marked: Names of the rows that get an asterisk.
    """
    from rich import box
    from rich.table import Table

    task = isinstance(rows[0], TaskRow)
    judged = tuple(rows[0].metrics) if isinstance(rows[0], TaskRow) else ("ppl",)
    around = (0, 1) if len(judged) < _MANY_METRICS else (0, 0, 0, 1)
    shown = Table(caption=caption, box=box.SIMPLE_HEAD, padding=around, caption_justify="left")
    shown.add_column("allocation", justify="left", overflow="fold")
    (memory, unit_bytes), (latency, unit_s), (energy, unit_j) = units_of(rows).values()
    quality = (_HEADS.get(name, name) for name in judged)
    costs = (f"memory\n{memory}", f"latency\n{latency}", *(() if task else ("tokens\n/s",)))
    for head in ("bits", "KL", *quality, *costs, f"energy\n{energy}"):
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.name} *" if row.name in marked else row.name,
            f"{row.effective_bits:.2f}",
            f"{row.heldout_kl:.5f}",
            *_quality(row),
            f"{row.memory_bytes / unit_bytes:,.1f}",
            f"{row.latency_s / unit_s:,.1f}",
            *(() if task else (_speed(row.tokens_per_s),)),
            f"{row.energy_j / unit_j:,.2f}",
            style="bold" if row.name == best else None,
        )
    return shown


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.{0 if tokens_per_s >= _FEW_TOKENS else 2}f}"


def _quality(row: Row) -> list[str]:
    """Return what stands between the KL and the costs: perplexity, or a task's metrics."""
    if isinstance(row, TaskRow):
        places = 2 if len(row.metrics) < _MANY_METRICS else 1
        return [f"{value:.{places}f}" for value in row.metrics.values()]
    return [f"{row.heldout_ppl:.{4 if row.heldout_ppl < _LARGE_PERPLEXITY else 1}f}"]


def units_of(rows: Sequence[Row]) -> dict[str, tuple[str, float]]:
    """Return in what unit a table shows memory, latency and energy: name → (unit, its size)."""
    return {
        "memory": _unit(max(row.memory_bytes for row in rows), _BYTES),
        "latency": _unit(max(row.latency_s for row in rows), _SECONDS),
        "energy": _unit(max(row.energy_j for row in rows), _JOULES),
    }


def _unit(largest: float, units: Mapping[str, float]) -> tuple[str, float]:
    """Return the first unit, of those from small to large, in which a number has few digits."""
    fitting = ((name, size) for name, size in units.items() if largest / size < _LONGEST)
    return next(fitting, [*units.items()][-1])


def write_summary(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Write the table and the run's facts as JSON, atomically; returns the text."""
    data = {"rows": [asdict(row) for row in rows], **facts}
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    replace_atomically(path, text.encode())
    return text


def pareto(cost: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the points that no other point beats in both, by rising cost."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    return order[loss[order] < best]


def plane(
    problem: Problem,
    history: Sequence[Candidate],
    named: Mapping[str, NDArray[np.integer]],
    *,
    lost: LossUnit = _KL,
) -> Figure:
    """Draw loss against cost for every evaluated map, with the front.

    Args:
        problem: Says what a map costs.
        history: Every evaluated map; those on the search's own text are drawn.
        named: Maps to label, where the history has them.
        lost: What the search makes small.
    """
    from matplotlib.figure import Figure

    own = [c for c in history if c.text is None]
    maps = np.array([c.assignment for c in own])
    kl = np.array([c.kl * lost.shown for c in own])
    latency = problem.costs(maps).latency_s * 1e6
    bits = problem.effective_bits(maps)
    labels: dict[int, list[str]] = {}
    for name, one in named.items():
        for i in np.flatnonzero((maps == one).all(1)).tolist():
            labels.setdefault(i, []).append(name)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, cost, label in zip(
        figure.subplots(1, 2, sharey=True),
        (bits, latency),
        (
            "effective bits per expert weight",
            f"latency of a step on {problem.hardware.name}, µs\n"
            f"(computed for {problem.cost_spec.name})",
        ),
        strict=True,
    ):
        axes.scatter(cost, kl, s=14, color=_FAINT, label="evaluated maps", linewidths=0)
        front = pareto(np.round(cost / (_SAME * cost.max())), kl)
        axes.plot(cost[front], kl[front], "o-", color=_FRONT, ms=4, lw=1, label="front")
        # Maps of one loss and cost share a label: written over each other nobody could read them.
        spots: dict[tuple[float, float], list[str]] = {}
        for i, names in labels.items():
            spots.setdefault((float(cost[i]), float(kl[i])), []).extend(names)
        for spot, names in spots.items():
            axes.plot(*spot, "D", color=_STRONG, ms=6)
            text = ", ".join(dict.fromkeys(names))
            axes.annotate(text, spot, xytext=(6, 6), textcoords="offset points", fontsize=9)
        axes.set_xlabel(label)
        axes.grid(alpha=0.2)
        axes.margins(x=0.12)
        middle, half = (cost.min() + cost.max()) / 2, _LEAST_SPAN * cost.max() / 2
        axes.set_xlim(
            min(axes.get_xlim()[0], middle - half), max(axes.get_xlim()[1], middle + half)
        )
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", useOffset=False)
    figure.axes[0].set_ylabel(lost.axis)
    figure.axes[0].legend(frameon=False)
    return figure


def front_figure(rows: Sequence[Row], *, lost: LossUnit = _KL) -> Figure:
    """Draw held-out loss against size, a line per allocation.

    Args:
        rows: Of one name for each line, at several sizes.
        lost: The KL, of tokens or of answers.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(dict.fromkeys(row.name for row in rows), _LINES, strict=False):
        own = sorted((row.effective_bits, row.heldout_kl) for row in rows if row.name == name)
        axes.plot(*zip(*own, strict=True), "o-", color=colour, ms=4, lw=1, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("effective bits per expert weight")
    axes.set_ylabel(f"KL to full precision on held-out {lost.text}, {lost.unit}/{lost.per}")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure


def heat_map(problem: Problem, assignment: NDArray[np.integer], *, title: str) -> Figure:
    """Draw the chosen format of every expert, layers down and experts across.

    Where projections differ, each expert takes two cells: gate+up above down.
    """
    from matplotlib.figure import Figure

    spec, menu = problem.spec, problem.menu
    per_expert = problem.expand(assignment[None])[0].reshape(spec.num_experts, -1)
    counts = [layer.num_experts for layer in spec.moe_layers]
    sides = per_expert.shape[1]
    grid = np.full((len(counts) * sides, max(counts)), np.nan)
    start = 0
    for layer, count in enumerate(counts):
        block = per_expert[start : start + count].T
        grid[layer * sides : (layer + 1) * sides, :count] = block
        start += count
    figure = Figure(
        figsize=(min(16, 1.6 + 0.42 * grid.shape[1]), 1.4 + 0.42 * grid.shape[0]),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=len(menu) - 1, aspect="equal")
    middle = (len(menu) - 1) / 2
    for (y, x), index in np.ndenumerate(grid):
        if np.isfinite(index):
            colour = "black" if index > middle else "white"
            key = menu.keys[int(index)]
            axes.text(x, y, key, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.set_yticks(
        np.arange(len(counts)) * sides + (sides - 1) / 2, [str(i) for i in range(len(counts))]
    )
    axes.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=range(len(menu)), fraction=0.03)
    bar.ax.set_yticklabels(menu.keys)
    bar.set_label("bits")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    replace_atomically(path, buffer.getvalue())
