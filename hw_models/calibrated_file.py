"""Fitted figures in a device file: each with its source, and everything else as it was."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from dmpq.formats import FULL_WIDTH
from dmpq.hw_models.calibration_errors import Calibration, Errors

_KERNEL_FIGURES: Final = (
    "memory_efficiency",
    "compute_efficiency",
    "launch_s",
    "dequantized_weights_per_s",
)
_STEP_FIGURES: Final = (
    "dense_memory_efficiency",
    "dense_compute_efficiency",
    "layer_s",
    "step_s",
    "sequence_s",
)


def updated(data: dict[str, Any], calibration: Calibration, *, origin: str) -> dict[str, Any]:
    """Return a device file's content with the figures of a calibration written in.

    Args:
        data: The file's JSON object.
        calibration: What was fitted.
        origin: Where the points are from and what scope they were chosen by, as one clause.
    """
    data = copy.deepcopy(data)
    fit = calibration.fit
    stack, fitted = fit.stack, set(fit.stack.fitted)
    stacks: list[dict[str, Any]] = data["stacks"]
    entry = next((s for s in stacks if s["name"] == stack.name), None)
    if entry is None:
        entry = {**asdict(stack), "kernels": [], "assumed": [*_STEP_FIGURES, "tile_rows"]}
        stacks.append(entry)
    known = {kernel["bits"]: kernel for kernel in entry["kernels"]}
    own: dict[int, list[str]] = {}
    said = describe(calibration, origin=origin)
    for kernel in stack.kernels:
        new = asdict(kernel)
        names = [n.split(".")[2] for n in stack.fitted if n.startswith(f"kernels.{kernel.bits}.")]
        old = known.setdefault(kernel.bits, {**new, "assumed": list(_KERNEL_FIGURES)})
        if not names:
            _no_longer_assumed(old, ())
            continue
        own[kernel.bits] = names
        old |= {figure: new[figure] for figure in _KERNEL_FIGURES}
        held = [f for f in _KERNEL_FIGURES if f not in names and new[f] is not None]
        old["source"] = f"{', '.join(names)}: {said}" + (
            f"; {', '.join(held)}: held, as for 16 bits or before" if held else ""
        )
        _no_longer_assumed(old, names)
    _follow(known, own)
    entry["kernels"] = [known[bits] for bits in sorted(known)]
    entry["tile_rows"] = stack.tile_rows
    outer = [name for name in _STEP_FIGURES if name in fitted]
    for name in outer:
        entry[name] = getattr(stack, name)
    _no_longer_assumed(entry, [*outer, "tile_rows"])
    held = [name for name in _STEP_FIGURES if name not in fitted]
    entry["source"] = f"{', '.join([*outer, 'tile_rows'])} and kernels: {said}" + (
        f"; not fitted: {', '.join(held)}" if held else ""
    )
    entry["calibrated"] = calibration.calibrated
    entry["fitted"] = [*stack.fitted, "tile_rows"]
    data["sources"].setdefault(f"stacks.{stack.name}", "see the stack and each kernel")
    _no_longer_assumed(data, [f"stacks.{stack.name}"])
    if calibration.power is not None and fit.device.power is not None:
        data["power"] = asdict(fit.device.power)
        data["sources"]["power"] = (
            f"fitted to {calibration.power.n} of these points ({stack.name}), error "
            f"{percent(calibration.power)} in-sample, {percent(calibration.held_power)} on models "
            "left out"
        )
    data["calibrated"] = all(s.get("calibrated", False) for s in stacks)
    return data


def describe(calibration: Calibration, *, origin: str) -> str:
    """Return what was fitted to what, with its errors, as one clause."""
    bound = [e.name for e in calibration.fit.estimates if e.at_bound]
    held = (
        "points of one model only, so the error on others is not known"
        if calibration.held_out is None
        else f"{percent(calibration.held_out)} on models left out"
    )
    at = f"; at its bound, so not told by the points: {', '.join(bound)}" if bound else ""
    return (
        f"fitted to {calibration.fit.points} points of {origin}; error "
        f"{percent(calibration.in_sample)} in-sample, {held}{at}"
    )


def percent(errors: Errors | None) -> str:
    """Return a mean absolute error as text."""
    return "unknown" if errors is None else f"{100 * errors.mape:.1f}%"


def file_bytes(data: dict[str, Any]) -> bytes:
    """Return a device file's bytes: the same for the same content."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def only(data: dict[str, Any], stacks: Sequence[str]) -> dict[str, Any]:
    """Return a device file's content with these kernel stacks alone."""
    data = copy.deepcopy(data)
    gone = [s["name"] for s in data["stacks"] if s["name"] not in stacks]
    data["stacks"] = [s for s in data["stacks"] if s["name"] in stacks]
    for name in gone:
        data["sources"].pop(f"stacks.{name}", None)
        _no_longer_assumed(data, [f"stacks.{name}"])
    data["calibrated"] = all(s.get("calibrated", False) for s in data["stacks"])
    return data


def _follow(kernels: dict[int, dict[str, Any]], fitted: Mapping[int, Sequence[str]]) -> None:
    """Give a narrow kernel that is assumed as for another width that width's fitted figures."""
    for bits, kernel in kernels.items():
        like = re.match(r"assumed:? as for (\d+) bits", kernel["source"])
        if like and bits != FULL_WIDTH and int(like[1]) in fitted:
            width = int(like[1])
            kernel |= {figure: kernels[width][figure] for figure in fitted[width]}


def _no_longer_assumed(entry: dict[str, Any], names: Sequence[str]) -> None:
    """Take figures off the list of those that nobody has published, and absent ones with them."""
    absent = {name for name in _KERNEL_FIGURES if name in entry and entry[name] is None}
    gone = {*names, *absent}
    entry["assumed"] = [name for name in entry.get("assumed", ()) if name not in gone]
