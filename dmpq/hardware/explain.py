"""Explain a bit map's cost: where each microsecond, byte and joule of a step goes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.bitmap import BitMap
from dmpq.errors import InputError
from dmpq.hardware.tables import say
from dmpq.hw_models import (
    Explanation,
    HardwareModel,
    Part,
    Workload,
    explainable,
    load_hardware,
)
from dmpq.hw_models.catalogue import MEASURED, find_device
from dmpq.profile import Profile
from dmpq.solvers.limits import GIGABYTE, device_memory, usable_bytes
from dmpq.spec import ModelSpec, load_geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table

_LONG_S: Final = 0.1
"""From here on a step is shown in milliseconds and joules."""
_LARGE_BYTES: Final = 1e11
"""From here on a model is shown in GB."""


def add_parser(subparsers: Any) -> None:
    """Add ``explain``."""
    text = "show where each microsecond, byte and joule of a bit map goes"
    parser = subparsers.add_parser("explain", help=text, description=text)
    parser.add_argument("bitmap", type=Path, help="a bit map written by dmpq.search")
    parser.add_argument(
        "--hw",
        nargs="+",
        metavar="NAME",
        help="devices, DEVICE/STACK, or device files (default: the one the map was made for)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="a saved profile, whose measured routing is taken (default: uniform routing)",
    )
    parser.add_argument("--phase", help="decode or prefill (default: the map's own)")
    parser.add_argument("--batch", type=int, help="sequences per step (default: the map's own)")
    parser.add_argument("--context", type=int, help="tokens per sequence (default: the map's own)")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Explain a bit map on each device asked for; returns the exit code.

    Raises:
        InputError: If the map, a device or the profile cannot be used.
    """
    bitmap = BitMap.read(arguments.bitmap)
    spec = cost_geometry(bitmap)
    workload = _workload(bitmap, arguments)
    inclusion = None if arguments.profile is None else _routing(arguments.profile, bitmap)
    names = arguments.hw or [_own_name(bitmap)]
    models = [_load(name) for name in names]
    explanations = [
        explainable(model).explain(
            spec,
            bitmap.menu,
            bitmap.to_assignment(bitmap.geometry),
            workload,
            inclusion=inclusion,
        )
        for model in models
    ]
    for model, one in zip(models, explanations, strict=True):
        refuse_too_large(one, model.name)
    routing = "uniform" if inclusion is None else f"as measured in {arguments.profile}"
    notes = [
        (*model.unsupported(bitmap.menu), *_standing(model), *_other_figures(bitmap, model))
        for model in models
    ]
    if arguments.json:
        found = [
            {"routing": routing, "notes": list(said), **one.to_json()}
            for said, one in zip(notes, explanations, strict=True)
        ]
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
        return 0
    for said, one in zip(notes, explanations, strict=True):
        for note in said:
            say(console, f"note: {note}")
        print_explanation(one, console, routing=routing)
    return 0


def _standing(model: HardwareModel) -> tuple[str, ...]:
    """Return what a reader of the figures should know of them: assumed ones, no calibration."""
    fitted = () if model.calibrated else (f"{model.name}/{model.stack} is not calibrated",)
    return (*fitted, *model.notes())


def cost_geometry(bitmap: BitMap) -> ModelSpec:
    """Return the geometry that a bit map's costs were computed with."""
    name = bitmap.hardware["cost_geometry"]
    own = bitmap.geometry
    return own if name == "own" else own.with_widths_of(load_geometry(name))


def refuse_too_large(explanation: Explanation, name: str) -> None:
    """Refuse a map that the device cannot hold: no figure of such a step means anything.

    Args:
        explanation: Of the map.
        name: Of the device.

    Raises:
        InputError: With what takes most of the memory.
    """
    needed, capacity = Part.total(explanation.parts).stored_bytes, explanation.capacity_bytes
    if needed <= usable_bytes(capacity):
        return
    stored: dict[str, float] = {}
    for part in explanation.parts:
        stored[part.name] = stored.get(part.name, 0.0) + part.stored_bytes
    most = max(stored, key=lambda part: stored[part])
    raise InputError(
        f"The map takes {needed / GIGABYTE:,.2f} GB at {explanation.model}, of which "
        f"{stored[most] / GIGABYTE:,.2f} for {most}, and {name} has {device_memory(capacity)}; "
        "give a larger device, a smaller --batch or --context, or a map of narrower formats."
    )


def _own_name(bitmap: BitMap) -> str:
    """Return the name of the device that a bit map was made for, its kernel stack with it."""
    name, stack = bitmap.hardware["name"], bitmap.hardware["stack"]
    try:
        find_device(name)[0].stack(stack)
    except InputError as error:
        raise InputError(
            f"The bit map was made for {name} with stack {stack}, of which there is no device "
            "file here; name an analytical device, or give a device file, with --hw."
        ) from error
    return f"{name}/{stack}"


def _load(name: str) -> HardwareModel:
    if name in MEASURED:  # before minutes of measuring
        raise InputError(
            f"{name} is measured as a whole, so its costs have no parts to explain; name a device "
            "with an analytical model with --hw, such as a100."
        )
    return load_hardware(name)


def _other_figures(bitmap: BitMap, model: HardwareModel) -> tuple[str, ...]:
    """Return a note where the map was made with other figures of the same device."""
    made_for = bitmap.hardware
    same = (made_for["name"], made_for["stack"]) == (model.name, model.stack)
    if not same or made_for["source"] == model.source:
        return ()
    return (
        f"the map was made with other figures of {model.name}/{model.stack} than those loaded "
        "here, so its own costs may differ",
    )


def _workload(bitmap: BitMap, arguments: argparse.Namespace) -> Workload:
    chosen = {name: getattr(arguments, name) for name in ("phase", "batch", "context")}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Workload(**{**bitmap.workload, **given})


def _routing(path: Path, bitmap: BitMap) -> NDArray[Any]:
    profile = Profile.load(path)
    if profile.fingerprint != bitmap.model["fingerprint"]:
        raise InputError(
            f"The profile {path} belongs to other weights than the bit map's; give the "
            "profile.safetensors that lies beside it."
        )
    return profile.frequency


def print_explanation(explanation: Explanation, console: Console, *, routing: str) -> None:
    """Print both tables, at most 80 columns wide.

    Args:
        explanation: Of one map.
        console: Where to.
        routing: What routing was assumed, in words.
    """
    work, total = explanation.workload, Part.total(explanation.parts)
    say(
        console,
        f"{explanation.device} (stack {explanation.stack}), {explanation.model}:\n"
        f"{work.phase}, batch {work.batch}, context {work.context}, {routing} routing",
    )
    console.print(parts_table(explanation))
    console.print(formats_table(explanation))
    say(
        console,
        "unpack: dequantizing weights; fixed: launches and overheads\n"
        f"energy: {explanation.power_w:,.0f} W on average, for the time of each part\n"
        f"memory: {total.stored_bytes / GIGABYTE:,.3g} of "
        f"{explanation.capacity_bytes / GIGABYTE:,.4g} GB",
    )


def parts_table(explanation: Explanation) -> Table:
    """Return where time, traffic, energy and memory go, one row per part, and their sum."""
    total = Part.total(explanation.parts)
    long, large = total.latency_s >= _LONG_S, total.stored_bytes >= _LARGE_BYTES
    second, joule = ("ms", 1e3) if long else ("µs", 1e6), ("J", 1.0) if long else ("mJ", 1e3)
    size = ("GB", 1e-9) if large else ("MB", 1e-6)
    table = _table(
        "part",
        (
            f"time\n{second[0]}",
            "%",
            "bound by",
            f"moved\n{size[0]}",
            f"energy\n{joule[0]}",
            f"stored\n{size[0]}",
        ),
    )
    for part in (*explanation.parts, total):
        time = part.latency_s
        if part is total:
            table.add_section()
        elif not time and not part.stored_bytes:
            continue
        table.add_row(
            f"{part.name} at {part.key}" if part.key else part.name,
            _number(time * second[1]),
            _number(100 * time / total.latency_s),
            part.bound_by if part is not total else "",
            _number(part.traffic_bytes * size[1]),
            _number(part.energy_j * joule[1], 2),
            _number(part.stored_bytes * size[1]),
        )
    return table


def formats_table(explanation: Explanation) -> Table:
    """Return what the experts of each format wait for."""
    total = Part.total(explanation.parts)
    unit, scale = ("ms", 1e3) if total.latency_s >= _LONG_S else ("µs", 1e6)
    waits = ("memory", "compute", "unpack", "launch")
    table = _table(
        "format", ("kernel", "experts", "active", *(f"{name}\n{unit}" for name in waits))
    )
    parts = {(part.name, part.key): part for part in explanation.parts}
    for use in explanation.formats:
        busy, launch = parts["experts", use.key], parts["launches", use.key]
        times = (busy.memory_s, busy.compute_s, busy.unpack_s, launch.fixed_s)
        table.add_row(
            use.key,
            f"{use.kernel_bits} bits" if use.kernel_bits else "none",
            f"{use.experts:,g}",
            f"{use.active:,.1f}",
            *(_number(time * scale) for time in times),
        )
    return table


def _table(first: str, others: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if value else ""
