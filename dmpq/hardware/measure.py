"""``python -m dmpq.hardware measure``: time this machine's kernels and keep what was measured."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.console import plain_console, progress_bars
from dmpq.errors import InputError, unknown
from dmpq.hardware.files import check_out, write_out
from dmpq.hw_models.catalogue import MEASURED, refuse_power

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dmpq.hw_models.live import LiveModel
    from dmpq.hw_models.measurements import Measurements, Points
    from dmpq.spec import ModelSpec

_MOST_THREADS: Final = 1024


def add_parser(subparsers: Any) -> None:
    """Add ``measure``."""
    parser = subparsers.add_parser(
        "measure",
        help="time this machine's kernels",
        description="Time the real kernels of this machine's CPU (host) or GPU (cuda), and keep "
        "what was measured. --hw host and --hw cuda do the same when they are first used.",
    )
    _add_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hw", default="host", help="host or cuda (default: %(default)s)")
    parser.add_argument(
        "--model",
        default="reference",
        help="model whose shapes are timed: 'reference', a geometry's name, or a config.json or "
        "its folder (default: %(default)s)",
    )
    parser.add_argument(
        "--cost-geometry",
        default=None,
        metavar="GEOMETRY",
        help="model at whose widths, as in dmpq.search; 'own' for the model's own (default: "
        "olmoe-1b-7b for the reference model, else own)",
    )
    parser.add_argument("--bits", default="2,3,4,8,16", help="formats (default: %(default)s)")
    parser.add_argument("--phase", default="decode", metavar="{decode,prefill}")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens per sequence (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--tdp-w",
        type=float,
        default=None,
        metavar="W",
        help="cuda: board power, where the GPU's energy counter cannot be read",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write a record (.json) for --hw"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, print what was found, and write the record if asked to; returns the exit code."""
    record = measure(arguments)
    console.print(f"  {record.device}, {record.stack}")
    console.print(_table(record))
    bandwidth = record.copy.bandwidth_bytes_per_s / 1e9
    console.print(f"  copy {bandwidth:.1f} GB/s; energy: {record.energy.source}")
    for power in record.energy.powers:
        console.print(
            f"  {power.bits} bits: {power.mean_w:.1f} W above {power.idle_w:.1f} W idle, "
            f"standard deviation {power.std_w:.1f} W over {power.n} windows of "
            f"{power.window_s:.1f} s or more"
        )
    if arguments.out is not None:
        console.print(f"  wrote {arguments.out}; replay it with --hw {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace) -> Measurements:
    """Return the measurements that the flags ask for, written to ``--out`` if it is given.

    Raises:
        InputError: If the flags make no sense, or the machine cannot be measured.
    """
    from dmpq.formats import Menu
    from dmpq.hw_models import Workload

    if arguments.hw not in MEASURED:
        raise unknown("hardware to measure", arguments.hw, MEASURED)
    if arguments.out is not None:
        check_out(arguments.out)
    workload = Workload(arguments.phase, arguments.batch, arguments.context)
    menu, spec = Menu.parse(arguments.bits), _spec(arguments.model, arguments.cost_geometry)
    _ = spec.stored_bits(menu)  # refuses groups that divide no width
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    model = _model(arguments)
    with progress_bars(plain_console(stderr=True)) as show:
        record = replace(model, progress=show).measured(spec, menu, workload).record
    if arguments.out is not None:
        write_out(arguments.out, record.to_bytes())
    return record


def _spec(model: str, cost_geometry: str | None) -> ModelSpec:
    """Return the geometry that a search on the model computes costs with."""
    from dmpq.config import SearchConfig
    from dmpq.spec import load_geometry

    geometry = SearchConfig(model=model, cost_geometry=cost_geometry).geometry
    shipped = resources.files("dmpq") / "reference" / "model" / "config.json"
    with resources.as_file(shipped) as path:
        spec = load_geometry(str(path) if model == "reference" else model)
    return spec if geometry == "own" else spec.with_widths_of(load_geometry(geometry))


def _model(arguments: argparse.Namespace) -> LiveModel:
    from dmpq.hw_models.live import cuda_model, host_model

    refuse_power(arguments.hw, arguments.tdp_w)
    if arguments.hw == "cuda":
        return cuda_model(tdp_w=arguments.tdp_w)
    if arguments.threads is not None and not 1 <= arguments.threads <= _MOST_THREADS:
        raise InputError(
            f"--threads {arguments.threads} makes no sense; give 1 to {_MOST_THREADS:,}."
        )
    return host_model(threads=arguments.threads)


def _table(record: Measurements) -> Table:
    """Return one row per thing timed: the times at the fewest and the most tokens."""
    from rich.table import Table

    table = Table("what", "kernel", "tokens", "n", "µs, median (IQR)", box=None)
    for expert in record.experts:
        what = f"expert {expert.hidden_size} x {expert.intermediate_size}, {expert.label} bits"
        _rows(table, what, expert.kernel, expert.whole)
    for matrix in record.matrices:
        what = f"matrix {matrix.out_features} x {matrix.in_features}"
        _rows(table, what, matrix.kernel, matrix.points)
    for gather in record.gathers:
        _rows(table, f"moving tokens of {gather.hidden_size}", "torch", gather.points)
    return table


def _rows(table: Table, what: str, kernel: str, points: Points) -> None:
    shown = points if len(points) == 1 else (points[0], points[-1])
    for point in shown:
        times = f"{point.median_s * 1e6:,.1f} ({point.iqr_s * 1e6:,.1f})"
        noted = f", {point.preempted} interrupted" if point.preempted else ""
        table.add_row(what, kernel, str(point.tokens), f"{point.n}{noted}", times)
        what = kernel = ""
