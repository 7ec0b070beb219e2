"""Fit every profile that published points tell, write the device files, and report the errors.

    python benchmarks/hardware_fit.py            # fits, writes hw_models/*.json and the report
    python benchmarks/hardware_fit.py --check    # fits, and says whether the files would change

The points and their scope are in ``benchmarks/points``. The report is
``docs/hardware_calibration.md``. The same points write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.formats import Menu
from dmpq.hw_models import AnalyticalModel, Workload, list_hardware
from dmpq.hw_models.base import Floats
from dmpq.hw_models.calibrated_file import file_bytes, percent, updated
from dmpq.hw_models.calibration import BOUNDS, LAYER_TILES, MATRIX_TILES, predict
from dmpq.hw_models.calibration_errors import LARGEST_MAPE, Calibration, calibrate, ordering
from dmpq.hw_models.device import Device, read_device
from dmpq.hw_models.points import Outside, Point, read_points
from dmpq.hw_models.published import PROMPT_TOKENS
from dmpq.hw_models.scope import Scope, read_scope
from dmpq.spec import load_geometry

ROOT = Path(__file__).resolve().parents[1]
POINTS = ROOT / "benchmarks" / "points"
DEVICES = ROOT / "hw_models"
REPORT = ROOT / "docs" / "hardware_calibration.md"
FILES = ("moe_points.csv", "kernel_speedups.csv")
AIM_MAPE, AIM_TAU = 0.15, 0.8
CLEAR = 0.05
"""A narrow width within 5% of 16 bits has no sign."""


def main(argv: list[str] | None = None) -> int:
    """Fit, write, report; with ``--check`` 1 where a file would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    scope = read_scope(POINTS / "scope.json")
    contents: dict[str, dict[str, Any]] = {}
    found: list[Calibration] = []
    outside: list[Outside] = []
    few: list[Point] = []
    for (name, stack), points, file in _groups(outside):
        path = DEVICES / f"{name}.json"
        if not path.exists():
            outside += [_outside(p, "no device file of this name") for p in points]
            continue
        device = read_device(path)
        inside, others = scope.split(points, device)
        outside += others
        try:
            calibration = calibrate(device, stack, inside)
        except InputError:
            few += inside
            continue
        print(f"{name}/{stack}: {_line(calibration)}", flush=True)
        found.append(calibration)
        content = contents.setdefault(name, json.loads(path.read_text("utf-8")))
        origin = f"benchmarks/points/{file} (scope: scope.json)"
        contents[name] = updated(content, calibration, origin=origin)
    written = {DEVICES / f"{n}.json": file_bytes(c) for n, c in contents.items()}
    changed = [p for p, data in written.items() if p.read_bytes() != data]
    if not arguments.check:
        for path, data in written.items():
            replace_atomically(path, data)
        REPORT.parent.mkdir(exist_ok=True)
        replace_atomically(REPORT, report(found, outside, few, scope).encode())
        print(f"wrote {REPORT.relative_to(ROOT)} and {len(written)} device files")
        return 0
    print("\n".join(f"would change: {p.relative_to(ROOT)}" for p in changed) or "no change")
    return int(bool(changed))


def report(
    found: list[Calibration], outside: list[Outside], few: list[Point], scope: Scope
) -> str:
    """Return the report, Markdown."""
    tiles = {"layers": _words(LAYER_TILES), "matrices": _words(MATRIX_TILES)}
    lines = [_HEAD.format(prompt=PROMPT_TOKENS, **tiles), ""]
    lines += [f"Scope ([scope.json](../benchmarks/points/scope.json)): {scope.words()}.", ""]
    lines += ["## Errors", "", *_errors_table(found), "", *_summary(found), ""]
    lines += ["## Ordering on each device", "", *_orders(found), ""]
    lines += ["## By width", "", *_width_table(found), ""]
    lines += ["## Signs", "", *_signs(found), ""]
    lines += ["## Power", "", *_power(found), ""]
    lines += ["## Fitted figures", "", *_figures(found), ""]
    lines += ["## Too few points to fit", "", *_few(few), ""]
    lines += ["## Points outside the scope", "", *_listed(outside)]
    return "\n".join(lines).rstrip() + "\n"


_HEAD = """\
# Calibration of the hardware profiles

Made by `python benchmarks/hardware_fit.py`; do not edit. Every figure is fitted on the committed
points alone, through the analytical model itself. *In-sample*: the fit on its own points. *Left
out*: each model's points (of speed-ups: each matrix shape's) predicted by a fit to the others.
MAPE is the mean absolute relative error of seconds (or of the speed-up); tau is Kendall's, among
points of one device, stack, model and token count; a group of speed-ups holds the 16-bit product.

What was assumed: prompts of {prompt} tokens where a source states none (context is that plus half
the mean output); uniform routing in whole models, balanced routing in MoE layers; files quantized
throughout (llama.cpp, gpt-fast) keep 1 byte per weight outside the experts. Qwen3-Coder-30B-A3B
has Qwen3-30B-A3B's geometry and is left out together with it. Tile rows are the best of {layers}
(layers) or {matrices} (speed-ups) on the training points. The rule about caches below and the
terms of the model were chosen with these points in view, and the scope file was written after a
first look at them: only the left-out models are unseen by the figures, not by the author."""


def _errors_table(found: list[Calibration]) -> list[str]:
    lines = [
        "| profile | points | in-sample | left out | its bias | tau, in-sample | tau, left out "
        "| signs | calibrated |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for c in found:
        right, pairs = _sign_count(c.points, c.predicted)
        bias = "" if c.held_out is None else f"{100 * c.held_out.bias:+.1f}%"
        lines.append(
            f"| {_name(c)} | {c.fit.points} | {percent(c.in_sample)} | "
            f"{_bold(c)} | {bias} | {_tau(c.order)} | {_tau(c.held_order)} | "
            f"{right}/{pairs} | {'yes' if c.calibrated else 'no'} |"
        )
    return lines


def _summary(found: list[Calibration]) -> list[str]:
    held = [c for c in found if c.held_out is not None]
    near = [c for c in held if c.held_out is not None and c.held_out.mape <= AIM_MAPE]
    taus = [c for c in held if c.held_order is not None]
    good = [c for c in taus if c.held_order is not None and c.held_order.tau >= AIM_TAU]
    missed = [_name(c) for c in held if c not in near]
    low = [_name(c) for c in taus if c not in good]
    return [
        f"Aim on models left out: MAPE at most {AIM_MAPE:.0%}, tau at least {AIM_TAU}. Reached by "
        f"{len(near)} of {len(held)} profiles in MAPE (missed: {', '.join(missed) or 'none'}) and "
        f"by {len(good)} of {len(taus)} in tau (missed: {', '.join(low) or 'none'}).",
        "",
        "*Signs* counts pairs of a narrow width and 16 bits at the same model and tokens, more "
        f"than {CLEAR:.0%} apart, where the fit has the right one faster. *Calibrated* is `yes` "
        "where times (not only ratios) of every width of the stack were fitted, and models left "
        f"out are met within {LARGEST_MAPE:.0%}.",
    ]


def _orders(found: list[Calibration]) -> list[str]:
    lines = [
        "Kendall's tau among all points of one device, model and token count, whatever their "
        "stack and width.",
        "",
        "| device | groups | pairs | in-sample | left out |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for device in sorted({c.fit.device.name for c in found}):
        own = [c for c in found if c.fit.device.name == device]
        whole = ordering(*_joined((c.points, c.predicted) for c in own))
        left = ordering(*_joined((c.points, c.left_out) for c in own if c.left_out is not None))
        if whole is not None:
            tau = "" if left is None else f"{left.tau:.2f}"
            lines.append(
                f"| {device} | {whole.groups} | {whole.pairs} | {whole.tau:.2f} | {tau} |"
            )
    return lines


def _joined(parts: Iterable[tuple[tuple[Point, ...], Floats]]) -> tuple[list[Point], Floats]:
    listed = list(parts)
    points = [point for points, _ in listed for point in points]
    return points, np.concatenate([np.zeros(0), *(values for _, values in listed)])


def _width_table(found: list[Calibration]) -> list[str]:
    lines = [
        "| profile | kind | bits | model | n | in-sample | left out |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for c in found:
        groups = defaultdict(list)
        for i, point in enumerate(c.points):
            groups[point.kind, point.precision.bits, point.model].append(i)
        measured = np.array([p.value for p in c.points])
        for (kind, bits, model), rows in sorted(groups.items()):
            inside = np.abs(c.predicted / measured - 1)[rows].mean()
            left = "" if c.left_out is None else _share(np.abs(c.left_out / measured - 1)[rows])
            lines.append(
                f"| {_name(c)} | {kind} | {bits} | {model} | {len(rows)} | {100 * inside:.1f}% | "
                f"{left} |"
            )
    return lines


def _signs(found: list[Calibration]) -> list[str]:
    lines = [
        "Measured, and what the fitted profile says; the claims are those of the points.",
        "",
        "| claim | measured | profile | holds |",
        "| --- | --- | --- | --- |",
    ]
    for claim, measured, said, holds in (*_named_signs(found), *_facts()):
        lines.append(f"| {claim} | {measured} | {said} | {'yes' if holds else '**no**'} |")
    return lines


def _named_signs(found: list[Calibration]) -> Iterator[tuple[str, str, str, bool]]:
    by_name = {_name(c): c for c in found}
    for name in ("a100/gemlite", "a100/torchao", "h100/gemlite", "h100/torchao"):
        if name in by_name:
            yield _speedup_sign(by_name[name], name, 4, 1024, lose=True)
            yield _speedup_sign(by_name[name], name, 4, 1, lose=False)
    for bits in (2, 3, 4, 8):
        if "rtx4090/gemlite" in by_name:
            yield _speedup_sign(by_name["rtx4090/gemlite"], "rtx4090/gemlite", bits, 1, lose=False)
    for name, lose in (("h100/vllm", True), ("h100/sglang", False), ("a100/sglang", False)):
        if name in by_name:
            yield _layer_sign(by_name[name], name, 4, 1024, lose=lose)
    if "m2-max/llama.cpp" in by_name:
        c = by_name["m2-max/llama.cpp"]
        slow = [i for i, p in enumerate(c.points) if p.precision.bits == 3]
        fast = [i for i, p in enumerate(c.points) if p.precision.bits == 4]
        real = [1e3 * c.points[i].value for i in (*slow, *fast)]
        said = [1e3 * float(c.predicted[i]) for i in (*slow, *fast)]
        yield (
            "m2-max/llama.cpp: 3 bits are slower than 4",
            f"{real[0]:.1f} ms to {max(real[1:]):.1f}",
            f"{said[0]:.1f} ms to {max(said[1:]):.1f}",
            said[0] > max(said[1:]),
        )


def _speedup_sign(
    c: Calibration, name: str, bits: int, rows: int, *, lose: bool
) -> tuple[str, str, str, bool]:
    which = [
        i
        for i, p in enumerate(c.points)
        if p.kind == "speedup" and p.precision.bits == bits and p.batch == rows
    ]
    real = [c.points[i].value for i in which]
    said = [float(c.predicted[i]) for i in which]
    verb = "loses to" if lose else "beats"
    return (
        f"{name}: {bits}-bit {verb} 16-bit at {rows} rows",
        _range(real, "x"),
        _range(said, "x"),
        all((s < 1) == lose for s in said),
    )


def _layer_sign(
    c: Calibration, name: str, bits: int, tokens: int, *, lose: bool
) -> tuple[str, str, str, bool]:
    real, said = [], []
    for model in sorted({p.model for p in c.points if p.kind == "moe_layer"}):
        at = {
            p.precision.bits: i
            for i, p in enumerate(c.points)
            if p.kind == "moe_layer" and p.model == model and p.batch == tokens
        }
        real.append(c.points[at[16]].value / c.points[at[bits]].value)
        said.append(float(c.predicted[at[16]] / c.predicted[at[bits]]))
    verb = "loses to" if lose else "beats"
    return (
        f"{name}: {bits}-bit MoE layer {verb} the 16-bit one at {tokens} tokens",
        _range(real, "x"),
        _range(said, "x"),
        all((s < 1) == lose for s in said),
    )


def _facts() -> Iterator[tuple[str, str, str, bool]]:
    """Yield the sign tests that need no points."""
    h100 = read_device(DEVICES / "h100.json")
    none = h100.peak_int4_flops_per_s is None
    yield "h100 has no INT4 peak", "no such tensor path", "none" if none else "a peak", none
    if "coral-edge-tpu" in list_hardware():
        edge = read_device(DEVICES / "coral-edge-tpu.json")
        times = _uniform_times(edge, ("2", "3", "4", "8"))
        spread = float(times.max() / times.min())
        yield (
            "coral-edge-tpu: flat below 8 bits",
            "8-bit integers only",
            f"slowest to fastest of 2, 3, 4, 8 bits: {spread:.3f}",
            abs(spread - 1) < 1e-9,
        )


def _uniform_times(device: Device, keys: tuple[str, ...]) -> Floats:
    spec, menu = load_geometry("olmoe-1b-7b"), Menu.parse(keys)
    maps = np.repeat(np.arange(len(keys))[:, None], spec.num_experts, axis=1)
    model = AnalyticalModel(device, device.stack())
    return model.cost(spec, menu, maps, Workload()).latency_s


def _power(found: list[Calibration]) -> list[str]:
    told = [c for c in found if c.power is not None]
    lines = ["| profile | points | in-sample | left out |", "| --- | ---: | ---: | ---: |"]
    for c in told:
        assert c.power is not None
        lines.append(
            f"| {_name(c)} | {c.power.n} | {percent(c.power)} | {percent(c.held_power)} |"
        )
    return lines if told else ["No profile has points with power enough to fit."]


def _figures(found: list[Calibration]) -> list[str]:
    lines = [
        "A figure at a bound of the search is not told by the points.",
        "",
        "| profile | figure | value | at a bound |",
        "| --- | --- | ---: | --- |",
    ]
    for c in found:
        for e in c.fit.estimates:
            bounds = BOUNDS[e.name.rpartition(".")[2]]
            at = f"of {bounds[0]:g} to {bounds[1]:g}" if e.at_bound else ""
            lines.append(f"| {_name(c)} | {e.name} | {e.value:.4g} | {at} |")
        lines.append(f"| {_name(c)} | tile_rows | {c.fit.stack.tile_rows} | |")
    return lines


def _few(few: list[Point]) -> list[str]:
    if not few:
        return ["None."]
    lines = [
        "In scope, but fewer than three of their stack. What the device's default stack, which is "
        "another one and was not fitted to them, says:",
        "",
        "| point | model | measured | default stack | error |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for point in few:
        device = read_device(DEVICES / f"{point.device}.json")
        said = float(predict(device, device.stacks[0], [point])[0])
        lines.append(
            f"| {point.name}, {point.device}/{point.stack}, {point.precision.bits} bits | "
            f"{point.model} | {1e3 * point.value:.2f} ms | {1e3 * said:.2f} ms "
            f"({device.stacks[0].name}) | {100 * (said / point.value - 1):+.0f}% |"
        )
    return lines


def _listed(outside: list[Outside]) -> list[str]:
    lines = ["| row | what | why |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.what} | {one.reason} |" for one in outside]
    return lines if outside else ["None."]


def _groups(outside: list[Outside]) -> Iterator[tuple[tuple[str, str], list[Point], str]]:
    """Yield the points of each device and stack, with their file; unreadable rows to a list."""
    for file in FILES:
        points, others = read_points(POINTS / file)
        outside += [Outside(f"{file}, {o.name}", o.what, o.reason) for o in others]
        groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
        for point in points:
            groups[point.device, point.stack].append(point)
        for key in sorted(groups):
            yield key, groups[key], file


def _sign_count(points: tuple[Point, ...], predicted: Floats) -> tuple[int, int]:
    """Return how many signs against 16 bits are right, and how many there are."""
    full = {
        (p.kind, p.model, p.batch, p.context): (p.value, float(v))
        for p, v in zip(points, predicted, strict=True)
        if p.precision.bits == 16
    }
    right = pairs = 0
    for point, value in zip(points, predicted, strict=True):
        reference = full.get((point.kind, point.model, point.batch, point.context))
        if point.kind == "speedup":
            real, said = point.value, float(value)
        elif point.precision.bits == 16 or reference is None:
            continue
        else:
            real, said = reference[0] / point.value, reference[1] / float(value)
        if abs(np.log(real)) > np.log1p(CLEAR):
            pairs += 1
            right += (real > 1) == (said > 1)
    return right, pairs


def _line(c: Calibration) -> str:
    tau = f", tau {_tau(c.held_order)}" if c.held_order else ""
    return f"{c.fit.points} points, {percent(c.in_sample)}, left out {percent(c.held_out)}{tau}"


def _name(c: Calibration) -> str:
    return f"{c.fit.device.name}/{c.fit.stack.name}"


def _bold(c: Calibration) -> str:
    missed = c.held_out is not None and c.held_out.mape > AIM_MAPE
    return f"**{percent(c.held_out)}**" if missed else percent(c.held_out)


def _tau(order: Any) -> str:
    return "" if order is None else f"{order.tau:.2f} ({order.groups})"


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _share(errors: Floats) -> str:
    return f"{100 * float(errors.mean()):.1f}%"


def _range(values: list[float], unit: str) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}{unit}" if len(values) == 1 else f"{low:.2f} to {high:.2f}{unit}"


def _outside(point: Point, reason: str) -> Outside:
    what = f"{point.model}, {point.device}/{point.stack}, {point.precision.bits} bits"
    return Outside(point.name, what, reason)


if __name__ == "__main__":
    sys.exit(main())
