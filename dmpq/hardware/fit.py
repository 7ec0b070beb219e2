"""``python -m dmpq.hardware fit POINTS.csv``: calibrate devices by measured points."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.errors import InputError, unknown
from dmpq.hardware.files import check_out, write_out
from dmpq.hardware.tables import say

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.hw_models.calibration_errors import Calibration
    from dmpq.hw_models.device import Device
    from dmpq.hw_models.points import Outside, Point

_DESCRIPTION: Final = """\
Estimate the figures of a device's kernel stack from measured points, through
the same analytical model that costs are computed by, and say how far it is
off: on these points, and on the points of each model by a fit to the others.

The file has one row per point: kind (moe_layer, decode, prefill, speedup),
device, stack, model, precision, batch, context, value, unit (s, ms, us,
tokens/s, x), power_w (optional), source.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command ``fit`` to a parser's subcommands."""
    parser = subparsers.add_parser(
        "fit",
        help="calibrate a device by a CSV of measured points",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("points", type=Path, help="CSV file")
    parser.add_argument(
        "--device",
        metavar="NAME/STACK",
        help="fit this device and stack only (default: every one with enough points)",
    )
    parser.add_argument("--scope", type=Path, metavar="FILE.json", help="which points count")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write a device file; needs --device"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Run the command; returns the exit code.

    Raises:
        InputError: If the points, the scope or the device are refused.
    """
    from dmpq.hw_models.calibrated_file import file_bytes, only, updated
    from dmpq.hw_models.calibration_errors import calibrate
    from dmpq.hw_models.points import read_points
    from dmpq.hw_models.scope import Scope, read_scope

    if arguments.out is not None and arguments.device is None:
        raise InputError("--out writes one device file; say which by --device NAME/STACK.")
    if arguments.out is not None:
        check_out(arguments.out)
    scope = Scope() if arguments.scope is None else read_scope(arguments.scope)
    points, outside = read_points(arguments.points)
    groups = _groups(points, arguments.device)
    found: list[Calibration] = []
    for (device_name, stack), group in groups.items():
        try:
            device = _device(device_name)
        except InputError as error:
            if arguments.device is not None:
                raise
            outside += [_outside(p, _clause(error)) for p in group]
            continue
        inside, others = scope.split(group, device)
        outside += others
        try:
            found.append(calibrate(device, stack, inside))
        except InputError as error:
            if arguments.device is not None:
                raise
            outside += [_outside(p, _clause(error)) for p in inside]
    if not found:
        reasons = Counter(one.reason for one in outside)
        said = "; ".join(f"{count} outside, {reason}" for reason, count in reasons.most_common(3))
        raise InputError(
            f"The points file {arguments.points} has no device and kernel stack with enough "
            f"points to fit ({said}); give at least 3 of one."
        )
    if arguments.json:
        print(json.dumps(_as_json(found, outside, scope.words()), indent=2))  # noqa: T201
    else:
        for calibration in found:
            show(calibration, console)
        _show_outside(outside, console)
    if arguments.out is not None:
        origin = f"{arguments.points.name} (scope: {scope.words()})"
        content = _content(found[0].points[0].device)
        data = updated(content, found[0], origin=origin)
        write_out(arguments.out, file_bytes(only(data, [found[0].fit.stack.name])))
        if not arguments.json:
            console.print(f"  wrote {arguments.out}")
    return 0


def show(calibration: Calibration, console: Console) -> None:
    """Print a calibration at 80 columns: figures, then errors."""
    from rich import box
    from rich.table import Table

    from dmpq.hw_models.calibrated_file import percent

    fit = calibration.fit
    console.print(
        f"\n  {fit.device.name}/{fit.stack.name}: {fit.points} points, "
        f"{len(fit.estimates)} figures and tile rows fitted"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("figure", "left"), ("value", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for estimate in fit.estimates:
        note = "at its bound: the points do not tell it" if estimate.at_bound else ""
        table.add_row(estimate.name, f"{estimate.value:.4g}", note)
    table.add_row("tile_rows", str(fit.stack.tile_rows), "best of a few")
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("error", "MAPE", "bias", "points", "tau"):
        table.add_column(column, justify="left" if column == "error" else "right")
    for name, errors, order in (
        ("in-sample", calibration.in_sample, calibration.order),
        ("models left out", calibration.held_out, calibration.held_order),
        ("power, in-sample", calibration.power, None),
        ("power, models left out", calibration.held_power, None),
    ):
        if errors is not None:
            tau = "" if order is None else f"{order.tau:.2f}"
            bias = f"{100 * errors.bias:+.1f}%"
            table.add_row(name, percent(errors), bias, str(errors.n), tau)
    console.print(table)
    if calibration.held_out is None:
        console.print("  points of one model only: the error on other models is not known")
    if not calibration.calibrated:
        console.print(
            "  calibrated: no; it needs times of every width, and 15% or less on models left out"
        )


def _show_outside(outside: list[Outside], console: Console) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for one in outside:
        reasons[one.reason].append(f"{one.name} ({one.what})")
    for reason, rows in reasons.items():
        console.print(f"\n  {len(rows)} outside, {reason}:")
        for row in rows:
            say(console, row, indent=4)


def _groups(points: list[Point], wanted: str | None) -> dict[tuple[str, str], list[Point]]:
    """Return the points of each device and stack, in the file's order.

    Raises:
        InputError: If the one wanted has no points.
    """
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.device, point.stack].append(point)
    if wanted is None:
        return groups
    names = {f"{device}/{stack}": (device, stack) for device, stack in groups}
    if wanted not in names:
        raise unknown("device and stack of the points", wanted, names)
    return {names[wanted]: groups[names[wanted]]}


def _device(name: str) -> Device:
    """Return the facts of a shipped device, or of a user's own by its file.

    Raises:
        InputError: If there is no such device, or it is named otherwise than its file.
    """
    from dmpq.hw_models.catalogue import find_device

    device, _ = find_device(name)
    if device.name != name and not name.endswith(".json"):
        raise InputError(f"The points call the device {name!r}; write it as {device.name!r}.")
    return device


def _content(name: str) -> dict[str, Any]:
    """Return the JSON object of a device file that has been read before: shipped, or a path."""
    from importlib import resources

    shipped = resources.files("dmpq.hw_models") / f"{name}.json"
    file = Path(name) if name.endswith(".json") else shipped
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def _outside(point: Point, reason: str) -> Outside:
    from dmpq.hw_models.points import Outside

    what = f"{point.model}, {point.device}/{point.stack}, {point.precision.bits} bits"
    return Outside(point.name, what, reason)


def _clause(error: InputError) -> str:
    """Return what is wrong, without the remedy, to stand within a sentence."""
    text = str(error).partition(";")[0]
    return text[:1].lower() + text[1:]


def _as_json(found: list[Calibration], outside: list[Outside], scope: str) -> dict[str, Any]:
    return {
        "scope": scope,
        "profiles": [
            {
                "device": c.fit.device.name,
                "stack": c.fit.stack.name,
                "calibrated": c.calibrated,
                "points": c.fit.points,
                "tile_rows": c.fit.stack.tile_rows,
                "figures": [asdict(e) for e in c.fit.estimates],
                **{
                    name: None if value is None else asdict(value)
                    for name, value in (
                        ("in_sample", c.in_sample),
                        ("held_out", c.held_out),
                        ("order", c.order),
                        ("held_order", c.held_order),
                        ("power", c.power),
                        ("held_power", c.held_power),
                    )
                },
            }
            for c in found
        ],
        "outside": [asdict(one) for one in outside],
    }
