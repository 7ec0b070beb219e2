"""Analytical against measured hardware: how well costs predict, and what searches make of them.

Everything is read: ``benchmarks/hardware_loop.py`` measured whole maps on a CPU and on an H200,
and ``docs/hardware_calibration.md`` has the analytical model's errors on published measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from ablation_pages import Ablation, Table, Verdict, listed, percent, read_json

from dmpq.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME: Final = "hardware"
MADE_BY: Final = (
    "python benchmarks/hardware_loop.py --corrections 9 --out FILE on that machine, and python "
    "benchmarks/hardware_fit.py"
)
MACHINES: Final = {"host": "One thread of a Xeon, torch's kernels", "h200": "An H200, gemlite"}
CALIBRATION: Final = Path(__file__).parents[1] / "docs" / "hardware_calibration.md"
AGAIN: Final = "measured again"

AIM_ERROR: Final = 15.0
"""Percent; the calibration page's own aim on models left out."""
AIM_TAU: Final = 0.8
LIMITS: Final = ("1st", "2nd", "3rd")


@dataclass(frozen=True)
class Profile:
    """An analytical profile's errors on published points.

    Attributes:
        name: Device and kernel stack.
        points: Number of them.
        in_sample: Mean absolute error of the fit on its own points, percent.
        left_out: On models, or shapes, that were left out, percent; ``None`` where unknown.
        tau: Kendall's on those left out; ``None`` likewise.
        calibrated: Whether times of every width were fitted, and others are met within 15%.
    """

    name: str
    points: int
    in_sample: float
    left_out: float | None
    tau: float | None
    calibrated: bool


def ablation(results: Path) -> Ablation:
    """Return the ablation, from what is kept.

    Args:
        results: Folder of all results.

    Raises:
        InputError: If figures are missing.
    """
    loops = {
        name: read_json(results / f"hardware_loop_{name}.json", made_by=MADE_BY)
        for name in MACHINES
    }
    profiles = read_profiles(CALIBRATION)
    return Ablation(
        name=NAME,
        title="Analytical against measured hardware",
        about="Routed experts of OLMoE's widths, decode, batch 1. Errors are those of predicted "
        "times on 16 maps that corrected nothing; tau is Kendall's rank correlation with the "
        "measured times; *measured again* is how well a second measurement predicts the first. "
        "The limits are a quarter, a half and three quarters of the way from the fastest "
        "measured map to the slowest; within each, each kind of costs chooses a map by the exact "
        "knapsack, which is then measured: over 0 the limit is broken, under 0 quality is left "
        "unused. Nothing was run for this page.",
        tables=(
            *(table for name, loop in loops.items() for table in _tables(name, loop)),
            _profiles_table(profiles),
        ),
        verdicts=tuple(_verdicts(loops, profiles)),
        draw=lambda: _figure(loops),
    )


def read_profiles(path: Path) -> list[Profile]:
    """Return the rows of the calibration page's table of errors.

    Raises:
        InputError: If the page is not there, or has no such table.
    """
    if not path.is_file():
        raise InputError(
            f"There are no figures at {path}; make them with: python benchmarks/hardware_fit.py."
        )
    _, found, rest = path.read_text(encoding="utf-8").partition("\n## Errors\n")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    if not found or len(lines) < 3:
        raise InputError(
            f"The page {path} has no table of errors; make it again with: python "
            "benchmarks/hardware_fit.py."
        )
    return [_profile([cell.strip() for cell in line.strip("|").split("|")]) for line in lines[2:]]


def _profile(cells: list[str]) -> Profile:
    name, points, in_sample, left_out, _, _, tau, _, calibrated = cells

    def number(text: str) -> float | None:
        word = text.strip("*").partition(" ")[0].rstrip("%")
        return float(word) if word and word != "unknown" else None

    own = number(in_sample)
    assert own is not None
    return Profile(name, int(points), own, number(left_out), number(tau), calibrated == "yes")


def kinds(loop: dict[str, Any]) -> dict[str, str]:
    """Return a machine's kinds of costs: as its file names them → in short."""
    found = {}
    for name in loop["predictions"]:
        base, _, corrected = name.partition(", corrected by ")
        short = {"isolated kernels": "isolated kernels", AGAIN: AGAIN}.get(base, "analytical")
        maps = corrected.removesuffix(" maps")
        found[name] = f"{short}, {maps} maps" if corrected else short
    return found


def over_limits(loop: dict[str, Any], name: str) -> list[float | None]:
    """Return by how much the maps that costs chose break each limit; ``None`` for no map.

    Args:
        loop: A machine's figures.
        name: The costs, as the file names them.
    """
    found = loop["searches"][name]
    limits = loop["limits_s"]
    return [
        None if one is None else one[0] / limit - 1
        for one, limit in zip(found, limits, strict=True)
    ]


def _tables(name: str, loop: dict[str, Any]) -> list[Table]:
    rows = []
    for full, short in kinds(loop).items():
        errors = loop["predictions"][full]
        over = [] if full == AGAIN else over_limits(loop, full)
        cells = [("no map" if one is None else percent(one)) for one in over] or [""] * 3
        rows.append(
            (
                short,
                f"{100 * errors['mape']:.1f}",
                percent(errors["bias"]),
                f"{errors['tau']:.2f}",
                *cells,
            )
        )
    uniform = listed([f"{1e6 * s:,.0f} µs ({k})" for k, s in loop["uniform_s"].items()])
    return [
        Table(
            f"{MACHINES[name]}: error and "
            "bias of times, %; Kendall's tau; measured time over three limits, %",
            ("costs", "error", "bias", "tau", *LIMITS),
            tuple(rows),
        ),
        Table(
            f"All experts in one format there: {uniform}. What the chosen maps lose (the "
            "profile's KL, nats per token)",
            ("costs", *LIMITS),
            tuple(
                (short, *("no map" if one is None else f"{one[1]:.6f}" for one in found))
                for full, short in kinds(loop).items()
                if full != AGAIN and (found := loop["searches"][full])
            ),
        ),
    ]


def _profiles_table(profiles: list[Profile]) -> Table:
    return Table(
        "The analytical model on published measurements, from the calibration page: mean "
        "absolute error, %, in-sample and on models (or shapes) left out",
        ("device/stack", "points", "in-sample", "left out", "tau, left out", "calibrated"),
        tuple(
            (
                one.name,
                str(one.points),
                f"{one.in_sample:.1f}",
                "unknown" if one.left_out is None else f"{one.left_out:.1f}",
                "" if one.tau is None else f"{one.tau:.2f}",
                "yes" if one.calibrated else "no",
            )
            for one in profiles
        ),
    )


def kept_limits(loop: dict[str, Any], name: str) -> int:
    """Return how many limits the chosen maps keep, to within what measuring again differs by."""
    noise = loop["predictions"][AGAIN]["mape"]
    return sum(one is not None and one <= noise for one in over_limits(loop, name))


def _verdicts(loops: dict[str, Any], profiles: list[Profile]) -> list[Verdict]:
    known = [one for one in profiles if one.left_out is not None]
    ranked = [one for one in profiles if one.tau is not None]
    close = [one for one in known if one.left_out <= AIM_ERROR]
    ordered = [one for one in ranked if one.tau >= AIM_TAU]
    plain = {name: next(iter(loop["predictions"])) for name, loop in loops.items()}

    def said(kind: str, field: str) -> str:
        return listed(
            [
                f"{loop['predictions'][full][field]:{'.1%' if field == 'mape' else '.2f'}} on "
                f"{_place(name)}"
                for name, loop in loops.items()
                for full in [_named(loop, kind)]
            ]
        )

    counts = listed(
        [
            f"{kept_limits(loop, plain[name])} of 3 limits on {_place(name)} "
            f"(corrected, {kept_limits(loop, _most_corrected(loop, 'analytical'))}; isolated "
            f"kernels, {kept_limits(loop, _named(loop, 'isolated kernels'))}, corrected "
            f"{kept_limits(loop, _most_corrected(loop, 'isolated kernels'))})"
            for name, loop in loops.items()
        ]
    )
    kept = sum(kept_limits(loop, plain[name]) for name, loop in loops.items())
    mended = sum(kept_limits(loop, _most_corrected(loop, "analytical")) for loop in loops.values())
    return [
        Verdict(
            "Do analytical costs of a device file predict a machine's times?",
            _where(loops, "analytical", lambda one: 100 * one["mape"] <= AIM_ERROR),
            f"their mean error is {said('analytical', 'mape')}: a file prices one grouped launch "
            "per width by data-sheet figures, and what ran there is torch's or gemlite's kernels, "
            "expert by expert.",
        ),
        Verdict(
            "Do they at least order maps?",
            _where(loops, "analytical", lambda one: one["tau"] >= AIM_TAU),
            f"Kendall's tau is {said('analytical', 'tau')}; that of isolated kernels is "
            f"{said('isolated kernels', 'tau')}, and of measuring again {said(AGAIN, 'tau')}.",
        ),
        Verdict(
            "Does correcting by measured maps mend it?",
            "times: "
            + _where(
                loops, "analytical", lambda one: 100 * one["mape"] <= AIM_ERROR, corrected=True
            )
            + "; order: "
            + _where(loops, "analytical", lambda one: one["tau"] >= AIM_TAU, corrected=True),
            listed(
                [
                    f"corrected by {full.partition('by ')[2]} the mean error is "
                    f"{loop['predictions'][full]['mape']:.1%} (tau "
                    f"{loop['predictions'][full]['tau']:.2f}) on "
                    f"{_place(name)}"
                    for name, loop in loops.items()
                    for full in [_most_corrected(loop, "analytical")]
                ]
            )
            + ".",
        ),
        Verdict(
            "Do searches on them keep limits on latency?",
            f"{kept} of {len(LIMITS) * len(loops)}, and {mended} after corrections",
            f"analytical costs keep {counts}, to within what measuring again differs by.",
        ),
        Verdict(
            "Do fitted device files predict published measurements?",
            f"{len(close)} of {len(known)} within {AIM_ERROR:.0f}%",
            f"on models or shapes left out; {len(ordered)} of {len(ranked)} order them with tau "
            f"of {AIM_TAU} or more. The published points are mostly of single layers and kernels, "
            "not of maps that mix widths.",
        ),
    ]


def _where(
    loops: dict[str, Any],
    kind: str,
    holds: Callable[[dict[str, float]], bool],
    *,
    corrected: bool = False,
) -> str:
    """Return on which machines something holds of a kind of costs, in words."""
    yes, no = [], []
    for name, loop in loops.items():
        full = _most_corrected(loop, kind) if corrected else _named(loop, kind)
        (yes if holds(loop["predictions"][full]) else no).append(_place(name))
    if not yes or not no:
        return "yes" if yes else "no"
    return f"on {listed(yes)}, not on {listed(no)}"


def _place(name: str) -> str:
    """Return a machine within a sentence."""
    words = MACHINES[name].partition(",")[0]
    return words[0].lower() + words[1:]


def _named(loop: dict[str, Any], kind: str) -> str:
    """Return a machine's costs of a kind without corrections, as its file names them."""
    return next(full for full, short in kinds(loop).items() if short == kind)


def _most_corrected(loop: dict[str, Any], kind: str) -> str:
    """Return those corrected by the most maps."""
    return [full for full, short in kinds(loop).items() if short.startswith(kind)][-1]


def _figure(loops: dict[str, Any]) -> Figure:
    """Draw each machine's errors and orders, and what the maps within limits took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=(1, 1, 1.4))
    for row, (name, loop) in zip(panels, loops.items(), strict=True):
        shown = kinds(loop)
        places = np.arange(len(shown))[::-1]
        for axes, field, scale in ((row[0], "mape", 100), (row[1], "tau", 1)):
            values = [scale * loop["predictions"][full][field] for full in shown]
            colours = ["#1a73e8" if s.startswith("anal") else "#d93025" for s in shown.values()]
            colours[-1] = "#9aa0a6"
            bars = axes.barh(places, values, color=colours)
            axes.bar_label(bars, fmt="%.1f" if field == "mape" else "%.2f", padding=2, fontsize=8)
            axes.margins(x=0.2)
        row[0].set_yticks(places, shown.values(), fontsize=8)
        row[0].set_xscale("log")
        row[0].set_xlim(0.1, 400)
        row[0].set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        row[0].set_xlabel("mean error of times, %", fontsize=9)
        row[0].set_title(f"{MACHINES[name]}", fontsize=10, loc="left")
        row[1].set_yticks([])
        row[1].set_xlim(-0.3, 1.2)
        row[1].axvline(0, color="#9aa0a6", lw=1)
        row[1].set_xlabel("Kendall's tau", fontsize=9)
        searched = [full for full in shown if full != AGAIN]
        for i, mark in enumerate("osD"):
            over = [over_limits(loop, full)[i] for full in searched]
            drawn = [
                (100 * value, place)
                for value, place in zip(over, places, strict=False)
                if value is not None
            ]
            row[2].plot(*zip(*drawn, strict=True), mark, ms=5, label=f"limit {i + 1}")
        for full, place in zip(searched, places, strict=False):
            if all(one is None for one in over_limits(loop, full)):
                row[2].text(0.3, place, "no map found", fontsize=8, va="center")
        row[2].set_xscale("symlog", linthresh=5)
        row[2].set_xticks([-5, 0, 5, 10, 50, 100], ["-5", "0", "5", "10", "50", "100"])
        row[2].minorticks_off()
        row[2].set_yticks(places, [""] * len(places))
        row[2].set_ylim(row[0].get_ylim())
        row[2].axvline(0, color="#9aa0a6", lw=1)
        row[2].grid(alpha=0.2)
        row[2].set_xlabel("measured time of the chosen map over its limit, %", fontsize=9)
    panels[0, 2].legend(frameon=False, fontsize=8)
    return figure
