"""What a sweep over the reward's weights shows: its front, a table, a picture, and one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.objective import Weights
from dmpq.report import Row, pareto, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Floats = NDArray[np.float64]

COSTS: Final[Mapping[str, str]] = {
    "lat": "latency_s",
    "mem": "memory_bytes",
    "eng": "energy_j",
}
"""Weight → the column of :class:`~dmpq.report.Row` that it weighs."""

WORDS: Final[Mapping[str, str]] = {"lat": "latency", "mem": "memory", "eng": "energy"}

UNIFORM: Final = "uniform "
"""What the names of uniform maps begin with; their format's key follows."""

_LARGE: Final = 100.0
"""From here on a number has one decimal, so that a row fits 80 columns."""
_COLOURS: Final = ("#d93025", "#1a73e8")
_MARKS: Final = "#9aa0a6"


@dataclass(frozen=True)
class Point:
    """One map of a sweep.

    Attributes:
        row: What it is worth on held-out text, and what it costs.
        weights: What it was made for; ``None`` for a uniform map, made for nothing.
        reward: At these weights, on held-out text; ``None`` likewise.
        optimal: Whether no other map shown is better; see :func:`marked`.
    """

    row: Row
    weights: Weights | None
    reward: float | None
    optimal: bool = False


def objectives(points: Sequence[Point], costs: Sequence[str]) -> Floats:
    """Return held-out KL and some costs of n points, (n, 1 + costs); all to be small.

    Args:
        points: The maps.
        costs: Names of weights, as in :data:`COSTS`.
    """
    columns = ("heldout_kl", *(COSTS[name] for name in costs))
    return np.array([[getattr(one.row, name) for name in columns] for one in points])


def optimal(values: Floats) -> NDArray[np.bool_]:
    """Return which points, (n, m), no other beats: as small in all, smaller in one; (n,)."""
    no_larger = (values[:, None] <= values).all(2)
    smaller = (values[:, None] < values).any(2)
    return np.logical_not((no_larger & smaller).any(0))


def marked(points: Sequence[Point], costs: Sequence[str]) -> list[Point]:
    """Return the points, and for each whether it is Pareto-optimal among them.

    Args:
        points: All that are shown.
        costs: What is compared beside the held-out KL.
    """
    found = optimal(objectives(points, costs)).tolist()
    return [replace(one, optimal=best) for one, best in zip(points, found, strict=True)]


def require_pymoo() -> None:
    """Refuse to start where the hypervolume could not be computed.

    Raises:
        InputError: If pymoo is not installed.
    """
    try:
        import pymoo  # noqa: F401
    except ImportError:
        raise InputError(
            "A sweep compares fronts by their hypervolume, which needs pymoo, and that is not "
            "installed; install the extra with: pip install 'dmpq[search]'."
        ) from None


def hypervolume(values: Floats, uniform: Floats) -> float:
    """Return the share of the uniform maps' box that a front dominates, 0 to about 1.

    The box reaches, in every objective, from the least to the largest of a uniform map, so that it
    depends on neither the front nor the sweep; in an objective in which all are alike it is as
    wide as they are large. By pymoo, after Fonseca, Paquete and Lopez-Ibanez, "An improved
    dimension-sweep algorithm for the hypervolume indicator", 2006.

    Args:
        values: Objectives of the front's points, (n, m), all to be small.
        uniform: Those of the uniform maps, (u, m).
    """
    from pymoo.indicators.hv import HV

    least, most = uniform.min(0), uniform.max(0)
    span = np.where(most > least, most - least, np.where(most > 0, most, 1.0))
    return float(HV(ref_point=np.ones(len(span)))((values - least) / span))


def flat(points: Sequence[Point]) -> pd.DataFrame:
    """Return the points as a table of plain columns, weights empty where there are none."""
    empty = dict.fromkeys(asdict(Weights()))
    return pd.DataFrame(
        [
            asdict(one.row)
            | (empty if one.weights is None else asdict(one.weights))
            | {"reward": one.reward, "pareto_optimal": one.optimal}
            for one in points
        ]
    )


def table(points: Sequence[Point], *, terms: Sequence[str], best: str, caption: str) -> Table:
    """Return the table for the terminal, at most 80 columns wide.

    Args:
        points: The maps; those that no other beats get an asterisk.
        terms: Names of the weights that were varied.
        best: Name of the rows to set in bold.
        caption: What is below it.
    """
    from rich import box
    from rich.table import Table

    shown = Table(caption=caption, box=box.SIMPLE_HEAD, padding=0, caption_justify="left")
    units = units_of([one.row for one in points])
    shown.add_column("weights", overflow="fold")
    shown.add_column("allocation", overflow="fold")
    for head in ("bits", "KL", "ppl"):
        shown.add_column(head, justify="right")
    for name, (unit, _) in units.items():
        shown.add_column(f"{name}\n{unit}", justify="right")
    shown.add_column("reward", justify="right")
    before = None
    for one in points:
        row, label = one.row, label_of(one.weights, terms)
        sizes = {"memory": row.memory_bytes, "latency": row.latency_s, "energy": row.energy_j}
        shown.add_row(
            "" if label == before else label,
            f"{row.name} *" if one.optimal else row.name,
            f"{row.effective_bits:.2f}",
            f"{row.heldout_kl:.5f}",
            f"{row.heldout_ppl:.{4 if row.heldout_ppl < _LARGE else 1}f}",
            *(f"{sizes[name] / size:,.1f}" for name, (_, size) in units.items()),
            "" if one.reward is None else f"{one.reward:.{4 if one.reward > -_LARGE else 1}f}",
            style="bold" if row.name == best else None,
        )
        before = label
    return shown


def label_of(weights: Weights | None, terms: Sequence[str]) -> str:
    """Return the varied weights, one a line; nothing where there are none."""
    if weights is None:
        return ""
    return "\n".join(f"{name}={getattr(weights, name):g}" for name in terms)


def sweep_figure(points: Sequence[Point]) -> Figure:
    """Draw held-out loss against latency, memory and energy, a panel each.

    In every panel the points of an allocation that none of its others beats there are joined;
    uniform maps are marks to compare with. The scale is logarithmic above the least loss drawn,
    and linear below it, so that full precision, which loses nothing, has a place.

    Args:
        points: The maps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    units = units_of([one.row for one in points])
    uniform = [one for one in points if one.weights is None]
    names = dict.fromkeys(one.row.name for one in points if one.weights is not None)
    for axes, (name, column) in zip(panels, COSTS.items(), strict=True):
        unit, size = units[WORDS[name]]
        for colour, allocation in zip(_COLOURS, names, strict=False):
            own = [one for one in points if one.row.name == allocation and one.weights is not None]
            kl, cost = objectives(own, [name]).T
            cost = cost / size
            front = pareto(cost, kl)
            axes.plot(cost, kl, "o", color=colour, ms=4, alpha=0.4)
            axes.plot(cost[front], kl[front], "o-", color=colour, ms=4, lw=1, label=allocation)
        for one in uniform:
            place = (getattr(one.row, column) / size, one.row.heldout_kl)
            axes.plot(*place, "s", color=_MARKS, ms=4, zorder=1)
            key = one.row.name.removeprefix(UNIFORM)
            axes.annotate(
                key, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=_MARKS
            )
        axes.set_xlabel(f"{WORDS[name]}, {unit}")
        axes.grid(alpha=0.2)
        axes.margins(x=0.12)
    positive = [one.row.heldout_kl for one in points if one.row.heldout_kl > 0]
    if positive:
        panels[0].set_yscale("symlog", linthresh=min(positive))
    panels[0].set_ylabel("KL on held-out text, nats/token")
    panels[0].legend(frameon=False)
    return figure
