"""Accelerator files: a systolic array, its memories and its energies, read strictly.

A figure nobody has published is listed under ``assumed``; every other has a source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from dmpq.errors import InputError, unknown
from dmpq.formats import FULL_WIDTH, QUANTIZED_WIDTHS, Format
from dmpq.hw_models.strict import read_file, refuse_bad_name, refuse_unsourced, schema_of

SCHEMA: Final = "dmpq.accelerator/1"

Dataflow = Literal["ws", "os", "is"]

# A figure outside these bounds is in another unit (MHz, KiB, GB/s, J) than its name says.
_BOUNDS: Final = {
    "array_rows": (1, 4096),
    "array_columns": (1, 4096),
    "clock_hz": (1e6, 1e11),
    "ifmap_sram_bytes": (256, 1e11),
    "filter_sram_bytes": (256, 1e11),
    "ofmap_sram_bytes": (256, 1e11),
    "bandwidth_bytes_per_s": (1e6, 1e15),
    "capacity_bytes": (1e6, 1e14),
    "activation_bits": (4, 32),
    "accumulator_bits": (8, 64),
    "mac_pj": (0.0, 1e4),
    "sram_pj_per_byte": (0.0, 1e4),
    "dram_pj_per_byte": (0.0, 1e5),
    "static_w": (0.0, 1e4),
}
_NOT_FIGURES: Final = ("name", "description", "sources", "assumed")


@dataclass(frozen=True)
class Accelerator:
    """A systolic array with three on-chip memories in front of an off-chip one.

    Attributes:
        name: Name to load it by.
        description: The accelerator in words.
        array_rows: Rows of multiply-accumulate units.
        array_columns: Columns of them.
        dataflow: What stays in the array: weights (``"ws"``), outputs (``"os"``) or inputs
            (``"is"``).
        clock_hz: Cycles per second.
        ifmap_sram_bytes: On-chip memory of a product's inputs; half of it is being filled while
            the other half is read.
        filter_sram_bytes: That of its weights.
        ofmap_sram_bytes: That of its outputs and partial sums.
        bandwidth_bytes_per_s: Off-chip bandwidth.
        capacity_bytes: Off-chip memory.
        weight_bits: Widths in which weights can be stored; a narrower format is stored in the
            next wider one, a wider one in several planes of the widest.
        resident_bits: Width of the weights outside the routed experts, one of ``weight_bits``.
        activation_bits: Width of activations and of the KV cache.
        accumulator_bits: Width of partial sums.
        mac_pj: Energy of a multiply-accumulate, picojoules.
        sram_pj_per_byte: Energy of a byte read from or written to on-chip memory.
        dram_pj_per_byte: Energy of a byte that crosses the chip's edge.
        static_w: Power at all times.
        sources: Figure → where it comes from.
        assumed: Figures that nobody has published.
    """

    name: str
    description: str
    array_rows: int
    array_columns: int
    dataflow: Dataflow
    clock_hz: float
    ifmap_sram_bytes: int
    filter_sram_bytes: int
    ofmap_sram_bytes: int
    bandwidth_bytes_per_s: float
    capacity_bytes: float
    weight_bits: tuple[int, ...]
    resident_bits: int
    activation_bits: int
    accumulator_bits: int
    mac_pj: float
    sram_pj_per_byte: float
    dram_pj_per_byte: float
    static_w: float
    sources: Mapping[str, str] = field(hash=False)
    assumed: tuple[str, ...]

    def __post_init__(self) -> None:
        refuse_bad_name(self.name)
        widths = (*QUANTIZED_WIDTHS, FULL_WIDTH)
        if not self.weight_bits or not set(self.weight_bits) <= set(widths):
            raise InputError(
                f"weight_bits are {list(self.weight_bits)}; give some of {list(widths)}"
            )
        if list(self.weight_bits) != sorted(set(self.weight_bits)):
            raise InputError(
                f"weight_bits are {list(self.weight_bits)}; name each once, narrowest first"
            )
        if self.resident_bits not in self.weight_bits:
            raise InputError(
                f"resident_bits is {self.resident_bits}; it must be one of weight_bits, "
                f"{list(self.weight_bits)}"
            )
        if self.accumulator_bits < self.activation_bits:
            raise InputError(
                f"accumulator_bits {self.accumulator_bits} is below activation_bits "
                f"{self.activation_bits}; partial sums are at least as wide as activations"
            )
        refuse_unsourced(self.figures(), self.sources, self.assumed)
        for name in (*self.sources, *self.assumed):
            if name not in self.figures():
                raise unknown("figure under sources or assumed", name, self.figures())

    def figures(self) -> dict[str, object]:
        """Return everything that needs a source, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_FIGURES}

    @property
    def peak_macs_per_s(self) -> float:
        """Multiply-accumulates per second with every unit busy."""
        return self.array_rows * self.array_columns * self.clock_hz

    def stored_as(self, fmt: Format) -> Format:
        """Return the format in which weights of ``fmt`` are stored: itself, or a wider one.

        A format wider than every storable width is itself, in several planes; see
        :meth:`passes`. So is a pruned expert, of which nothing is stored.
        """
        if fmt.is_pruned:
            return fmt
        wider = [bits for bits in self.weight_bits if bits >= fmt.bits]
        if not wider or wider[0] == fmt.bits:
            return fmt
        full = wider[0] == FULL_WIDTH
        return Format(FULL_WIDTH) if full else Format(wider[0], fmt.group_size)

    def passes(self, bits: int) -> int:
        """Return how often a product of weights of ``bits`` runs through the array.

        A weight of 16 bits on an array of 8-bit weights is two planes, each multiplied by itself.
        """
        return -(-bits // self.weight_bits[-1])


def read_accelerator(path: Path) -> Accelerator:
    """Read an accelerator file.

    Raises:
        InputError: If it cannot be read or is no accelerator file, with what is wrong in it.
    """
    return read_file(path, Accelerator, schema=SCHEMA, what="accelerator", bounds=_BOUNDS)


def find_accelerator(name: str) -> Accelerator | None:
    """Return a shipped accelerator by name, or a user's by its file; ``None`` if it is neither.

    Raises:
        InputError: If it is an accelerator file, and something in it is wrong.
    """
    if name.endswith(".json"):
        schema = schema_of(Path(name))
        ours = schema is not None and schema.startswith(f"{SCHEMA.partition('/')[0]}/")
        return read_accelerator(Path(name)) if ours else None
    known = name.casefold()
    return shipped_accelerator(known) if known in list_accelerators() else None


def list_accelerators() -> list[str]:
    """Return the names of the shipped accelerators."""
    return sorted(
        file.name.removesuffix(".json")
        for file in _folder().iterdir()
        if file.name.endswith(".json")
    )


@cache
def shipped_accelerator(name: str) -> Accelerator:
    """Return a shipped accelerator, one of :func:`list_accelerators`."""
    with resources.as_file(_folder() / f"{name}.json") as path:
        return read_accelerator(path)


def _folder() -> resources.abc.Traversable:
    return resources.files("dmpq.hw_models") / "accelerators"
