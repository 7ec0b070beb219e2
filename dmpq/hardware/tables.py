"""The ``list`` and ``show`` of ``python -m dmpq.hardware``: devices as tables and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from dmpq.formats import Menu
from dmpq.hw_models.accelerator import Accelerator, find_accelerator, list_accelerators
from dmpq.hw_models.analytical import AnalyticalModel
from dmpq.hw_models.catalogue import ALIASES, find_device, list_hardware, shipped
from dmpq.hw_models.device import WIDTHS, Device, Kernel, Power, Stack, figures
from dmpq.hw_models.scale_sim import Layer
from dmpq.hw_models.systolic import SystolicModel

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNITS: Final = {
    "_flops_per_s": ("T/s", 1e12),
    "sram_bytes": ("MiB", 2**20),
    "_hz": ("MHz", 1e6),
    "_pj": ("pJ", 1.0),
    "_pj_per_byte": ("pJ/byte", 1.0),
    "_bytes_per_s": ("GB/s", 1e9),
    "_weights_per_s": ("G/s", 1e9),
    "_bytes": ("GB", 1e9),
    "_efficiency": ("", 1.0),
    "_rows": ("", 1.0),
    "_bits": ("bits", 1.0),
    "_w": ("W", 1.0),
    "_s": ("µs", 1e-6),
}
"""Ending of a figure's name → the unit it is shown in, and that unit in the figure's own."""

_WIDE_MATH: Final = ("bf16", "fp16", "int8")
_MENU: Final = Menu.parse(",".join(str(width) for width in WIDTHS))


def add_list_parser(subparsers: Any) -> None:
    """Add ``list``."""
    text = "list the devices that come with dmpq"
    parser = subparsers.add_parser("list", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.set_defaults(run=run_list)


def add_show_parser(subparsers: Any) -> None:
    """Add ``show``."""
    text = "show every figure of a device, with its unit and source"
    parser = subparsers.add_parser("show", help=text, description=text)
    parser.add_argument("name", help="device, DEVICE/STACK, or a device file (.json)")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.set_defaults(run=run_show)


def run_list(arguments: argparse.Namespace, console: Console) -> int:
    """Print the shipped devices; returns the exit code."""
    devices = [shipped(name) for name in list_hardware()]
    if arguments.json:
        return _print_json([_summary(device) for device in devices])
    table = _table("GB", "GB/s", "Tflop/s", "W", title="name")
    for name in ("stacks", "calibrated"):
        table.add_column(name, overflow="fold")
    for device in devices:
        one = _summary(device)
        table.add_row(
            device.name,
            f"{device.capacity_bytes / 1e9:.0f}",
            f"{device.bandwidth_bytes_per_s / 1e9:.4g}",
            f"{one['peak_per_s'] / 1e12:.4g}{'' if one['peak_math'] != 'int8' else '*'}",
            f"{device.tdp_w:g}",
            ", ".join(one["stacks"]),
            ", ".join(one["calibrated_stacks"]) or "-",
        )
    console.print(table)
    console.print(
        "Tflop/s: dense peak at 16 bits (* at 8, where there is no wider arithmetic).\n"
        f"The first stack is the default. Simulated: {', '.join(list_accelerators())}.\n"
        "For sources and assumed figures: python -m dmpq.hardware show NAME",
        soft_wrap=True,
    )
    return 0


def run_show(arguments: argparse.Namespace, console: Console) -> int:
    """Print one device; returns the exit code."""
    accelerator = find_accelerator(arguments.name)
    if accelerator is not None:
        return _show_accelerator(accelerator, arguments, console)
    device, name = find_device(arguments.name)
    stacks = device.stacks if name is None else (device.stack(name),)
    if arguments.json:
        return _print_json(_document(device, stacks))
    console.print(f"{device.name}: {device.description}", style="bold")
    others = [alias for alias, known in ALIASES.items() if known == device.name]
    if others:
        say(console, f"also {', '.join(others)}")
    if device.note is not None:
        say(console, f"note: {device.note}")
    say(console, "peaks are dense")
    figures = {name: _shown(name, value) for name, value in device.figures().items()}
    _print_figures(device, figures, console)
    for stack in stacks:
        _print_stack(device, stack, console)
    return 0


def _show_accelerator(facts: Accelerator, arguments: argparse.Namespace, console: Console) -> int:
    if arguments.json:
        return _print_json(asdict(facts))
    console.print(f"{facts.name}: {facts.description}", style="bold")
    say(console, "simulated with SCALE-Sim, not calibrated")
    figures = {
        name: _shown(name, value) if isinstance(value, int | float) else _listed(value)
        for name, value in facts.figures().items()
    }
    _print_figures(facts, figures, console)
    for note in SystolicModel(facts, _never).unsupported(_MENU):
        say(console, f"note: {note}")
    return 0


def _never(tokens: int, inputs: int, outputs: int) -> Layer:
    raise AssertionError("notes need no simulation")


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_figures(facts: Device | Accelerator, shown: dict[str, str], console: Console) -> None:
    table = _table(title="figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source (assumed: nobody has published it)", overflow="fold")
    above = None
    for figure, value in shown.items():
        why = _why(facts, figure)
        name = figure.removesuffix("_per_s").removesuffix("_flops").removesuffix("_bytes")
        table.add_row(name, value, "as above" if why == above else why)
        above = why
    console.print(table)


def _print_stack(device: Device, stack: Stack, console: Console) -> None:
    all_assumed = f"stacks.{stack.name}" in device.assumed
    default = ", the default" if stack is device.stacks[0] else ""
    fitted = "calibrated" if _calibrated(device, stack) else "not calibrated"
    console.print(f"\nstack {device.name}/{stack.name}{default}, {fitted}", style="bold")
    own = figures(stack)
    assumed = tuple(own) if all_assumed else stack.assumed
    say(console, f"{'assumed: ' if all_assumed else ''}{stack.source}")
    line = [f"{name} {_shown(name, v)}{_mark(name, assumed)}" for name, v in own.items()]
    say(console, ", ".join(line))
    table = _table("memory", "compute", "launch", "unpacking", title="bits")
    table.add_column("math", no_wrap=True)
    for kernel in stack.kernels:
        marked = tuple(figures(kernel)) if all_assumed else kernel.assumed
        ceiling, name = kernel.dequantized_weights_per_s, "dequantized_weights_per_s"
        table.add_row(
            str(kernel.bits),
            f"{kernel.memory_efficiency:g}{_mark('memory_efficiency', marked)}",
            f"{kernel.compute_efficiency:.3g}{_mark('compute_efficiency', marked)}",
            f"{_shown('launch_s', kernel.launch_s)}{_mark('launch_s', marked)}",
            "-" if ceiling is None else f"{_shown(name, ceiling)}{_mark(name, marked)}",
            kernel.math if kernel.passes == 1 else f"{kernel.passes} x {kernel.math}",
        )
    console.print(table)
    say(console, "* assumed; memory, compute: shares of bandwidth and peak; unpacking: weights")
    for kernel in stack.kernels:
        say(console, f"{kernel.bits} bits: {kernel.source}")
    for note in AnalyticalModel(device, stack).unsupported(_MENU):
        say(console, f"note: {note}")


def _calibrated(device: Device, stack: Stack) -> bool:
    return AnalyticalModel(device, stack).calibrated


def say(console: Console, text: str, *, indent: int = 2) -> None:
    """Print a paragraph, its further lines under its first."""
    from rich.padding import Padding

    console.print(Padding(text, (0, 0, 0, indent), expand=False))


def _table(*numbers: str, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(title, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _unit(figure: str) -> tuple[str, float]:
    return next((unit for ending, unit in _UNITS.items() if figure.endswith(ending)), ("", 1.0))


def _shown(figure: str, value: float | Power) -> str:
    if isinstance(value, Power):
        return f"{value.base_w:g} + {value.memory_w:g} m + {value.compute_w:g} c W"
    unit, scale = _unit(figure)
    return f"{value / scale:.5g} {unit}".rstrip()


def _mark(figure: str, assumed: tuple[str, ...]) -> str:
    return "*" if figure in assumed else ""


def _why(device: Device | Accelerator, figure: str) -> str:
    source = device.sources.get(figure, "")
    if figure not in device.assumed:
        return source
    return f"assumed: {source}" if source else "assumed"


def _summary(device: Device) -> dict[str, Any]:
    """Return the line of a device in the list, with the unit in each name."""
    peaks = {math: getattr(device, f"peak_{math}_flops_per_s") for math in _WIDE_MATH}
    math = next(name for name, peak in peaks.items() if peak is not None)
    return {
        "name": device.name,
        "description": device.description,
        "capacity_bytes": device.capacity_bytes,
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "peak_math": math,
        "peak_per_s": peaks[math],
        "tdp_w": device.tdp_w,
        "stacks": [stack.name for stack in device.stacks],
        "calibrated_stacks": [s.name for s in device.stacks if _calibrated(device, s)],
        "assumed": list(device.assumed),
    }


def _document(device: Device, stacks: tuple[Stack, ...]) -> dict[str, Any]:
    """Return everything that ``show`` prints, in the units of the names."""

    def shown(values: Mapping[str, float | Power]) -> dict[str, Any]:
        return {
            name: {
                "value": asdict(value) if isinstance(value, Power) else value,
                "source": device.sources.get(name),
                "assumed": name in device.assumed,
            }
            for name, value in values.items()
        }

    return {
        "name": device.name,
        "description": device.description,
        "note": device.note,
        "aliases": [alias for alias, known in ALIASES.items() if known == device.name],
        "figures": shown(device.figures()),
        "stacks": {stack.name: _stack_document(device, stack) for stack in stacks},
    }


def _stack_document(device: Device, stack: Stack) -> dict[str, Any]:
    whole = f"stacks.{stack.name}" in device.assumed

    def shown(part: Stack | Kernel) -> dict[str, Any]:
        named = figures(part)
        marked = list(named) if whole else list(part.assumed)
        return {**named, "assumed": marked, "source": part.source}

    kernels = {kernel.bits: kernel for kernel in stack.kernels}
    return {
        **shown(stack),
        "calibrated": _calibrated(device, stack),
        "kernels": {b: {"math": k.math, **shown(k)} for b, k in kernels.items()},
        "widths": {
            width: {
                "stored_bits": stack.stored_width(width),
                "timed_as_bits": stack.kernel(width).bits,
                "passes": stack.kernel(width).passes,
            }
            for width in WIDTHS
        },
    }


def _print_json(document: object) -> int:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0
