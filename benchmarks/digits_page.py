"""The pages and the picture of the digits report, made from its figures alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from digits_models import EXPERTS, TOP_K
from digits_training import evenness
from numpy.typing import NDArray

Figures = dict[str, Any]

PUBLISHED: Final = {
    "FFN fp32": (0.9784, 0.944),
    "FFN int8 static": (0.9780, 0.250),
    "MoE (report) fp32": (0.9764, 2.788),
    "MoE (report) int8 dynamic": (0.9758, 0.755),
}
"""The report's test accuracy and megabytes."""
BALANCE_NAMES: Final = {
    "none": "(a) none",
    "report": "(b) + H(counts)",
    "report's sign": "(b') + H(mean p)",
    "entropy rewarded": "(c) - H(mean p)",
    "Switch": "(d) + Switch",
}
_USED: Final = 0.01
"""Share of the selections from which an expert counts as used."""


def tables(figures: Figures) -> str:
    """Return the page of tables, Markdown of at most 80 columns."""
    data, recipe, machine = figures["data"], figures["recipe"], figures["machine"]
    parts = [
        "# The digits report, measured again",
        "",
        "Made by `python benchmarks/digits.py`; do not edit.",
        "",
        *_wrapped(f"- data: {data['source']}; {data['heldout']:,} training images held out"),
        f"- Adam, {recipe['learning_rate']:g} falling to 0, batch {recipe['batch']}, best of "
        f"{recipe['epochs']} epochs by the held-out images",
        f"- train: {recipe['train_scored']:,} of the {data['train']:,} images trained on; static "
        f"ranges: {recipe['calibration']:,}",
        f"- {recipe['seeds']} seed(s): mean ± standard deviation",
        f"- {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
        f"torchao {machine['torchao']}",
        "",
        "## Accuracy",
        "",
        *_scores(figures, "accuracy", 4),
        "",
        "*changed*: test predictions that differ from fp32, mean over seeds.",
        "",
        "## Loss",
        "",
        *_scores(figures, "loss", 3),
        "",
        "## Beside the report",
        "",
        *published(figures),
        "",
        "*ms (64)*: latency of a batch of 64, the fp32 MoE vectorised.",
        "",
        "## Latency",
        "",
        "Milliseconds per batch, median (interquartile range); the MoE is that of (d).",
        "",
        *_latencies(figures),
        "",
        "## Vectorised against loops",
        "",
        "Latency in FFN forwards of the same batch: by the thread's own time, to which",
        "other processes of the machine do not add, and (by the wall clock).",
        "",
        *ratios(figures),
        "",
        "## Expert utilisation on test images",
        "",
        *balances(figures),
        "",
        *_wrapped(
            "*H*: entropy, of the counts of selections (the report's) or of the router's mean "
            "probabilities p over a batch; *evenness*: entropy of the counts on test images over "
            f"ln {EXPERTS}; *used*: experts with at least {_USED:.0%} of the selections; *least*, "
            "*most*: shares of the selections."
        ),
        "",
        "## Gradients at the router",
        "",
        *_gradients(figures),
    ]
    return "\n".join(parts) + "\n"


def picture(figures: Figures, path: Path) -> None:
    """Write the picture of how experts are used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(BALANCE_NAMES), figsize=(13, 3.2), sharey=True)
    ranks = np.arange(1, EXPERTS + 1)
    for axis, (key, name) in zip(axes, BALANCE_NAMES.items(), strict=True):
        shares = np.sort(shares_of(figures, key), axis=1)[:, ::-1]
        axis.bar(ranks, shares.mean(0), color="#4878a8", width=0.8)
        for row in shares:
            axis.plot(ranks, row, ".", color="#222222", markersize=4)
        axis.axhline(1 / EXPERTS, color="#c04040", linestyle="--", linewidth=1)
        even = np.mean([evenness(row.tolist()) for row in shares])
        axis.set_title(f"{name}\nevenness {even:.2f}", fontsize=9)
        axis.set_xticks(ranks)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("experts, most used first", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the selections", fontsize=8)
    axes[0].set_ylim(0, 1 / TOP_K + 0.02)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _scores(figures: Figures, what: str, digits: int) -> Iterator[str]:
    short = {"accuracy": "acc.", "loss": "loss"}[what]
    rows = []
    for name in _names(figures["rows"], "model"):
        found = rows_of(figures["rows"], model=name)
        cells = [_spread([row[p][what] for row in found], digits) for p in ("test", "train")]
        changed = f"{np.mean([row['changed'] for row in found]):.1f}"
        rows.append((name, *cells, *([changed] if what == "accuracy" else [])))
    names = ("model", f"test {short}", f"train {short}", "changed")
    yield from _table(names[: len(rows[0])], rows)


def published(figures: Figures) -> Iterator[str]:
    """Return the table of what the report published beside what is measured."""
    names = ("model", "accuracy", "report's", "MB", "report's", "ms (64)")
    rows = []
    for name in _names(figures["rows"], "model"):
        found = rows_of(figures["rows"], model=name)
        if found[0]["bytes"] is None:
            continue
        accuracy = np.mean([row["test"]["accuracy"] for row in found])
        size = np.mean([row["bytes"] for row in found]) / 1e6
        said = PUBLISHED.get(name)
        theirs = ("", "") if said is None else (f"{said[0]:.4f}", f"{said[1]:.3f}")
        taken = latency(figures, _timed(name), 64) * 1e3
        rows.append((name, f"{accuracy:.4f}", theirs[0], f"{size:.3f}", theirs[1], f"{taken:.2f}"))
    yield from _table(names, rows)


def _timed(name: str) -> str:
    """Return the name that a row's model has among the latencies."""
    short = name.replace(" (report)", "").replace(" (Switch)", "")
    return "MoE fp32, vectorised" if short == "MoE fp32" else short


def _latencies(figures: Figures) -> Iterator[str]:
    batches = _names(figures["latency"], "batch")
    rows = []
    for name in _names(figures["latency"], "model"):
        cells = []
        for batch in batches:
            (found,) = rows_of(figures["latency"], model=name, batch=batch)
            middle, low, high = (found[f"{k}_s"] * 1e3 for k in ("median", "lower", "upper"))
            cells.append(f"{_three(middle)} ({_three(high - low)})")
        rows.append((name, *cells))
    yield from _table(("model", *(f"batch {batch}" for batch in batches)), rows)


def ratios(figures: Figures) -> Iterator[str]:
    """Return the table of the MoE's latencies in forwards of the baseline."""
    batches = _names(figures["latency"], "batch")
    rows = []
    for name in ("loop over tokens", "loop over experts", "vectorised"):
        cells = []
        for batch in batches:
            own, wall = (
                slower(figures, f"MoE fp32, {name}", "FFN fp32", batch, clock)
                for clock in ("cpu_s", "median_s")
            )
            cells.append(f"{own:.2f} ({wall:.2f})")
        rows.append((f"MoE, {name}", *cells))
    more = f"{work_ratio(figures):.2f}"
    rows.append(("multiplications, MoE to FFN", *(more for _ in batches)))
    rows.append(("weights read, MoE to FFN", *(f"{read_ratio(figures, b):.2f}" for b in batches)))
    yield from _table(("", *(f"batch {batch}" for batch in batches)), rows)


def balances(figures: Figures) -> Iterator[str]:
    """Return the table of how each balance uses the experts."""
    names = ("added to the loss", "test acc.", "evenness", "used", "least", "most")
    rows = []
    for key, name in BALANCE_NAMES.items():
        shares = shares_of(figures, key)
        found = rows_of(figures["balances"], balance=key)
        rows.append(
            (
                name,
                _spread([row["test"]["accuracy"] for row in found], 4),
                _spread([evenness(row.tolist()) for row in shares], 3),
                f"{(shares >= _USED).sum(1).mean():.1f}",
                f"{shares.min(1).mean():.3f}",
                f"{shares.max(1).mean():.3f}",
            )
        )
    yield from _table(names, rows)


def _gradients(figures: Figures) -> Iterator[str]:
    rows = []
    for key, name in BALANCE_NAMES.items():
        found = rows_of(figures["balances"], balance=key)
        apart = max(row["difference_from_none"] for row in found)
        if key != "none":
            largest = figures["gradients"][key]
            said = "none at all" if largest is None else f"{largest:.2g}"
            rows.append((name, said, f"{apart:.2g}"))
    yield from _table(("added to the loss", "largest gradient", "weights differ from (a)"), rows)


def latency(figures: Figures, model: str, batch: int, clock: str = "median_s") -> float:
    """Return a model's median latency on a batch, seconds; ``cpu_s`` for the thread's own."""
    (found,) = rows_of(figures["latency"], model=model, batch=batch)
    return float(found[clock])


def slower(
    figures: Figures, model: str, reference: str, batch: int, clock: str = "cpu_s"
) -> float:
    """Return a model's latency over another's."""
    return latency(figures, model, batch, clock) / latency(figures, reference, batch, clock)


def work_ratio(figures: Figures) -> float:
    """Return the MoE's multiplications with weights per image over the baseline's."""
    sizes = figures["sizes"]
    return float(sizes["MoE"]["multiplications"] / sizes["FFN"]["multiplications"])


def read_ratio(figures: Figures, batch: int) -> float:
    """Return the weights that one batch reads, the MoE's over the baseline's."""
    (read,) = (row["read"] for row in figures["experts_read"] if row["batch"] == batch)
    sizes = figures["sizes"]
    idle = (EXPERTS - read) * sizes["expert"]["parameters"]
    return float((sizes["MoE"]["parameters"] - idle) / sizes["FFN"]["parameters"])


def shares_of(figures: Figures, balance: str) -> NDArray[np.float64]:
    """Return (seeds, E), each expert's share of the selections."""
    return np.array([row["shares"] for row in rows_of(figures["balances"], balance=balance)])


def rows_of(rows: Sequence[dict[str, Any]], **place: Any) -> list[dict[str, Any]]:
    """Return the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in place.items())]


def _names(rows: Sequence[dict[str, Any]], field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))


def _spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text}±{np.std(values, ddof=1):.{digits}f}"


def _three(value: float) -> str:
    """Return a number to three digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return a table whose columns are aligned, so that a terminal shows it, too."""
    columns = [[str(cell) for cell in column] for column in zip(names, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    for number, cells in enumerate(zip(*columns, strict=True)):
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield f"| {' | '.join(padded)} |"
        if number == 0:
            rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            yield f"| {' | '.join(rules)} |"


def _wrapped(text: str) -> Iterator[str]:
    indent = "  " if text.startswith("- ") else ""
    yield from textwrap.wrap(text, 78, subsequent_indent=indent, break_on_hyphens=False)
