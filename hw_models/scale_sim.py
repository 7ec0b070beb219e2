"""SCALE-Sim: how many cycles a systolic array takes for a matrix product, and what it reads.

A product is larger than the array and is folded onto it. SCALE-Sim 3 (MIT; Raj et al., "SCALE-Sim
v3", ISPASS 2025) runs the folds one after the other and gives each cycle's demands on the three
on-chip memories. A whole product of OLMoE-1B-7B takes minutes, but folds do not touch each other
and all of one size are alike, so that one of each size is simulated and counted. Along the
dimension that streams through the array, a step more adds the same once the array is full: long
streams are continued in a line. Both are exact, and a test holds whole products against it.

Only the compute half is used. The memory half of 3.0.0 fails under numpy 2.4 (issue 160 of
scalesim-project/SCALE-Sim), and its stalls cannot be used: with a small filter memory it fetched
each weight 11 times where a weight-stationary array needs it once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dmpq.errors import InputError
from dmpq.files import JsonLines
from dmpq.hw_models.accelerator import Dataflow
from dmpq.hw_models.machine import cache_folder

# Steps of a stream that are simulated; the rest continue in a line.
STREAM_STEPS: Final = 512
_EMPTY: Final = -1
_NUMBERS: Final = 4


@dataclass(frozen=True)
class Layer:
    """One product on the array, without waiting for off-chip memory.

    Attributes:
        cycles: From the first operand to the last result.
        ifmap_reads: Inputs read from on-chip memory.
        filter_reads: Weights read from it.
        ofmap_writes: Results and partial sums written to it.
    """

    cycles: int
    ifmap_reads: int
    filter_reads: int
    ofmap_writes: int

    def __add__(self, other: Layer) -> Layer:
        """Return one after the other."""
        return Layer(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Layer:
        """Return ``count`` of them in turn."""
        return Layer(*(count * a for a in astuple(self)))


class Fold(NamedTuple):
    """A part of a product that the array holds at once: rows and columns in use, and steps."""

    rows: int
    columns: int
    steps: int


@dataclass(frozen=True)
class ScaleSim:
    """SCALE-Sim for one array: ``(tokens, inputs, outputs) -> Layer``, each fold simulated once.

    What was simulated is kept in the user's cache folder (``XDG_CACHE_HOME``), in a file named
    after all that it depends on; where that cannot be written it is kept in memory alone.

    Attributes:
        rows: Rows of the array.
        columns: Its columns.
        dataflow: What stays in it.
    """

    rows: int
    columns: int
    dataflow: Dataflow

    def __call__(self, tokens: int, inputs: int, outputs: int) -> Layer:
        """Return the cycles and accesses of a product (tokens, inputs) x (inputs, outputs).

        Raises:
            InputError: If SCALE-Sim is not installed.
        """
        down, across, steps = self.spread(tokens, inputs, outputs)
        total = Layer(0, 0, 0, 0)
        for rows, many in _parts(down, self.rows):
            for columns, of_these in _parts(across, self.columns):
                fold = Fold(rows, columns, steps)
                total += self._streamed(fold).times(many * of_these)
        return total

    def spread(self, tokens: int, inputs: int, outputs: int) -> tuple[int, int, int]:
        """Return which dimension lies along the rows, which along the columns, which streams."""
        match self.dataflow:
            case "ws":
                return inputs, outputs, tokens
            case "os":
                return tokens, outputs, inputs
            case "is":
                return inputs, tokens, outputs

    def _streamed(self, fold: Fold) -> Layer:
        beyond = fold.steps - STREAM_STEPS
        if beyond <= 0:
            return self._known(fold)
        last = self._known(fold._replace(steps=STREAM_STEPS))
        before = self._known(fold._replace(steps=STREAM_STEPS - 1))
        return last + (last + before.times(-1)).times(beyond)

    def _known(self, fold: Fold) -> Layer:
        path = self._path()
        known = _recorded(path)
        if fold not in known:
            known[fold] = simulate_fold(self, fold)
            _record(path, fold, known[fold])
        return known[fold]

    def _path(self) -> Path:
        array = f"{self.dataflow}-{self.rows}x{self.columns}"
        return cache_folder("systolic") / f"{array}-scalesim-{scale_sim_version()}.jsonl"


def scale_sim_version() -> str:
    """Return the version of SCALE-Sim.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.metadata.version("scalesim")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "Simulated accelerators need SCALE-Sim, which is not installed; install the extra "
            "with: pip install 'dmpq[simulate]'."
        ) from None


def simulate_fold(array: ScaleSim, fold: Fold) -> Layer:
    """Let SCALE-Sim make the demands of one fold, and count them.

    Its own count of cycles is one short, that of the last row's index (issue 125), and its count
    of outputs is too high for output-stationary arrays: both are counted from the demands.
    """
    rows, columns, steps = fold
    match array.dataflow:
        case "ws":
            tokens, inputs, outputs = steps, rows, columns
        case "os":
            tokens, inputs, outputs = rows, steps, columns
        case "is":
            tokens, inputs, outputs = columns, rows, steps
    config = _scale_sim("scale_config").scale_config()
    config.set_arr_dims(array.rows, array.columns)
    config.set_dataflow(array.dataflow)
    config.force_valid()
    topology = _scale_sim("topology_utils").topologies()
    # A product is a convolution with one input row per token: name, input height and width,
    # filter height and width, channels, filters, strides, dense (1 of 1 weights).
    shape = [tokens, inputs, 1, inputs, 1, outputs, 1, 1, 1, 1]
    topology.load_layer_params_from_list("product", ["product", *shape])
    operands = _scale_sim("compute.operand_matrix").operand_matrix()
    operands.set_params(
        config_obj=config,
        topoutil_obj=topology,
        layoututil_obj=_scale_sim("layout_utils").layouts(),
    )
    name = f"systolic_compute_{array.dataflow}"
    compute = getattr(_scale_sim(f"compute.{name}"), name)()
    compute.set_params(
        config_obj=config,
        ifmap_op_mat=operands.get_ifmap_matrix()[1],
        filter_op_mat=operands.get_filter_matrix()[1],
        ofmap_op_mat=operands.get_ofmap_matrix()[1],
    )
    demands = compute.get_demand_matrices()
    return Layer(len(demands[2]), *(int(np.count_nonzero(d != _EMPTY)) for d in demands))


def _scale_sim(module: str) -> Any:
    version = scale_sim_version()
    try:
        return importlib.import_module(f"scalesim.{module}")
    except ImportError as error:
        raise InputError(
            f"SCALE-Sim {version} has no working {module} ({error}); install the one that is "
            "known to work with: pip install 'dmpq[simulate]'."
        ) from error


def _parts(size: int, tile: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the tiles that cover a dimension, each with its number."""
    whole, rest = divmod(size, tile)
    if whole:
        yield tile, whole
    if rest:
        yield rest, 1


@cache
def _recorded(path: Path) -> dict[Fold, Layer]:
    """Return the folds of a file; damaged records are passed over."""
    known = {}
    if path.is_file():
        journal = _open(path)
        for record in journal or ():
            fold, layer = (_integers(record.get(name)) for name in ("fold", "layer"))
            if len(fold) == len(Fold._fields) and len(layer) == _NUMBERS:
                known[Fold(*fold)] = Layer(*layer)
        if journal is not None:
            journal.close()
    return known


def _integers(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    return tuple(value) if whole else ()


def _record(path: Path, fold: Fold, layer: Layer) -> None:
    journal = _open(path)
    if journal is not None:
        journal.append({"fold": list(fold), "layer": list(astuple(layer))})
        journal.close()


def _open(path: Path) -> JsonLines | None:
    try:
        return JsonLines(path)
    except OSError:
        return None
