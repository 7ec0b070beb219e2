"""Device files: the facts of a device and of its kernel stacks, read strictly.

Every figure has a source, or is listed under ``assumed``: nobody has published it. Peaks are
dense: vendors' sheets often print twice that, for structured sparsity, and a file that seems to
hold such a figure is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal, get_args

from dmpq.errors import InputError, unknown
from dmpq.formats import FULL_WIDTH, QUANTIZED_WIDTHS
from dmpq.hw_models.strict import read_file, refuse_bad_name, refuse_unsourced

SCHEMA: Final = "dmpq.device/1"
WIDTHS: Final = (*QUANTIZED_WIDTHS, FULL_WIDTH)

Math = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]

_LADDER: Final[tuple[Math, ...]] = ("fp32", "bf16", "int8", "int4")

# A figure outside these bounds is in another unit (GB, TFLOPS, us, percent, kW) than its name
# says. They are as tight as devices from a single-board computer to a wafer-scale engine allow.
BOUNDS: Final = {
    "capacity_bytes": (1e8, 1e13),
    "runtime_bytes": (1e6, 1e12),
    "bandwidth_bytes_per_s": (1e8, 3e16),
    "tdp_w": (1.0, 2e4),
    "idle_w": (0.0, 2e4),
    "base_w": (0.0, 2e4),
    "memory_w": (0.0, 2e4),
    "compute_w": (0.0, 2e4),
    "bits": (1, FULL_WIDTH),
    "passes": (1, 8),
    "resident_bits": (8, FULL_WIDTH),
    "dequantized_weights_per_s": (1e8, 1e15),
    "tile_rows": (1, 512),
    "memory_efficiency": (1e-3, 1.0),
    "compute_efficiency": (1e-3, 1.0),
    "dense_memory_efficiency": (1e-3, 1.0),
    "dense_compute_efficiency": (1e-3, 1.0),
    "launch_s": (0.0, 5e-3),
    "layer_s": (0.0, 1e-2),
    "step_s": (0.0, 0.1),
    "sequence_s": (0.0, 1e-2),
    **{f"peak_{name}_flops_per_s": (1e10, 1e17) for name in get_args(Math)},
}
_OPERATIONS_PER_JOULE: Final = (1e9, 3e13)
"""From a single-board computer's CPU, with room, to several times an accelerator of 2024."""

_LARGEST_STEP: Final = 4.2
"""A step of the ladder above this is no dense hardware's: GeForce cards, which halve 16 bits with
32-bit accumulation, have 4 between 16 and 8 bits, all others less."""

_SPARSE: Final = ("sparse", "sparsity")
_MADE_DENSE: Final = ("dense", "halve", "half of", "without spars")


@dataclass(frozen=True)
class Kernel:
    """How fast one width runs.

    Attributes:
        bits: Nominal width of the weights.
        math: Number format that products are computed in; its peak is the device's.
        memory_efficiency: Share of the nominal bandwidth that it reaches.
        compute_efficiency: Share of the dense peak that it reaches.
        launch_s: Time of a launch that does nothing, one MoE layer's two products together.
        source: Where these figures come from.
        dequantized_weights_per_s: Ceiling on unpacking; ``None`` where none is known. It makes a
            narrow width slower than a wide one where its codes are dear to unpack (llama.cpp's
            2 and 3 bits on CPUs).
        passes: How often a product is computed, each time on a part of the weights' bits. More
            than 1 where the device has no arithmetic as wide as its weights: 16 bits as two
            halves of 8.
        assumed: Those of the figures above that nobody has published.
    """

    bits: int
    math: Math
    memory_efficiency: float
    compute_efficiency: float
    launch_s: float
    source: str
    dequantized_weights_per_s: float | None = None
    passes: int = 1
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits % self.passes:
            raise InputError(f"the {self.bits}-bit kernel cannot have {self.passes} passes")
        _known(self.assumed, figures(self), f"assumed figure of the {self.bits}-bit kernel")


@dataclass(frozen=True)
class Stack:
    """A set of kernels on a device.

    Attributes:
        name: Name, as in ``a100/gemlite``.
        kernels: One per width that has a kernel, by rising width; 16 is always among them.
        tile_rows: Tokens to which an expert's share of the batch is padded.
        dense_memory_efficiency: Share of the bandwidth that attention and head reach.
        dense_compute_efficiency: Share of the peak that attention and head reach.
        layer_s: Overhead per layer.
        step_s: Overhead per step.
        sequence_s: Overhead per sequence and step.
        source: Where the figures outside the kernels come from.
        stored_widths: Widths that can be stored, rising; a width between them takes the room of
            the next wider. All are stored as they are where the file does not say.
        resident_bits: Width of all that is no routed expert (attention, routers, shared experts,
            head, KV cache, activations): 16 for the checkpoint's own precision, 8 on a device
            that has no wider arithmetic.
        assumed: Those of the figures above that nobody has published.
        calibrated: Whether every kernel was fitted to points measured on this very device, of two
            models or more, so that the error on a model not fitted is known.
        fitted: Figures that were fitted, for example ``"kernels.4.launch_s"``.
    """

    name: str
    kernels: tuple[Kernel, ...]
    tile_rows: int
    dense_memory_efficiency: float
    dense_compute_efficiency: float
    layer_s: float
    step_s: float
    sequence_s: float
    source: str
    stored_widths: tuple[int, ...] = WIDTHS
    resident_bits: int = FULL_WIDTH
    assumed: tuple[str, ...] = ()
    calibrated: bool = False
    fitted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = [kernel.bits for kernel in self.kernels]
        if FULL_WIDTH not in widths:
            raise InputError(f"stack {self.name!r} has no kernel for 16 bits; add one")
        if len(set(widths)) != len(widths):
            raise InputError(f"stack {self.name!r} names a width twice; name each once")
        for what, rising in (("kernels", widths), ("stored_widths", [*self.stored_widths])):
            if rising != sorted(set(rising)) or not set(rising) <= set(WIDTHS):
                allowed = ", ".join(str(width) for width in WIDTHS)
                raise InputError(
                    f"the {what} of stack {self.name!r} are of {rising} bits; they must rise, "
                    f"among {allowed}"
                )
        if FULL_WIDTH not in self.stored_widths:
            raise InputError(f"stack {self.name!r} cannot store 16 bits; add it to stored_widths")
        for kernel in self.kernels:
            if self.stored_width(kernel.bits) != kernel.bits:
                raise InputError(
                    f"stack {self.name!r} has a kernel for {kernel.bits} bits, which it stores "
                    f"as {self.stored_width(kernel.bits)}; leave it out, or store that width"
                )
        _known(self.assumed, figures(self), f"assumed figure of stack {self.name!r}")

    def stored_width(self, bits: int) -> int:
        """Return the width that weights of a width are stored at."""
        return min(width for width in self.stored_widths if width >= bits)

    def kernel(self, bits: int) -> Kernel:
        """Return the kernel that runs a width: that of its storage, else the next wider one."""
        stored = self.stored_width(bits)
        return min((k for k in self.kernels if k.bits >= stored), key=lambda k: k.bits)


@dataclass(frozen=True)
class Power:
    """Mean power as a line in achieved shares of nominal bandwidth and of dense peak.

    Attributes:
        base_w: Power at no use.
        memory_w: Added at full bandwidth.
        compute_w: Added at the full peak.
    """

    base_w: float
    memory_w: float
    compute_w: float


@dataclass(frozen=True)
class Device:
    """A device: what its data sheet says, and its kernel stacks, the default one first.

    Attributes:
        name: Name to load it by.
        description: The device in words.
        capacity_bytes: Memory.
        bandwidth_bytes_per_s: Nominal memory bandwidth.
        tdp_w: Board or package power limit.
        idle_w: Power with a context open and no work.
        calibrated: Whether the figures were fitted on this very device.
        stacks: Kernel stacks.
        sources: Figure → where it comes from; for an assumed one, how it was chosen.
        assumed: Figures that nobody has published; ``stacks.NAME`` for all of a stack's.
        power: Fitted power; ``None`` for a constant share of ``tdp_w``.
        runtime_bytes: Memory that is taken before a model is loaded, by a driver, an engine or,
            where a processor shares it, a system; ``None`` where the share of a device's memory
            that no model may use is taken to hold it.
        note: What a user of the name should know: which of several parts it stands for.
        peaks: What kind the peaks are; only dense ones are accepted.
        peak_fp32_flops_per_s: Dense peak, ``None`` where the device has no such path; the same
            for the other number formats.
    """

    name: str
    description: str
    capacity_bytes: float
    bandwidth_bytes_per_s: float
    tdp_w: float
    idle_w: float
    calibrated: bool
    stacks: tuple[Stack, ...]
    sources: Mapping[str, str] = field(hash=False)
    assumed: tuple[str, ...]
    power: Power | None = None
    runtime_bytes: float | None = None
    note: str | None = None
    peaks: Literal["dense", "sparse"] = "dense"
    peak_fp32_flops_per_s: float | None = None
    peak_fp16_flops_per_s: float | None = None
    peak_bf16_flops_per_s: float | None = None
    peak_fp8_flops_per_s: float | None = None
    peak_int8_flops_per_s: float | None = None
    peak_int4_flops_per_s: float | None = None

    def __post_init__(self) -> None:
        if not self.stacks:
            raise InputError("it names no kernel stack; give at least one")
        names = [stack.name for stack in self.stacks]
        if len(set(names)) != len(names):
            raise InputError("it names a kernel stack twice; name each once")
        for text in (self.name, *names):
            refuse_bad_name(text)
        self._check_memory()
        self._check_power()
        self._check_peaks()
        figures = (*self.figures(), *(f"stacks.{name}" for name in names))
        refuse_unsourced(figures, self.sources, self.assumed)
        _known(self.assumed, figures, "assumed figure")
        _known(self.sources, figures, "figure under sources")

    def figures(self) -> dict[str, float | Power]:
        """Return the device's own figures by name, those of its stacks left out."""
        found: dict[str, float | Power] = dict(figures(self))
        return found if self.power is None else found | {"power": self.power}

    def _check_memory(self) -> None:
        if (self.runtime_bytes or 0.0) >= self.capacity_bytes:
            raise InputError(
                f"runtime_bytes {self.runtime_bytes:g} is not below capacity_bytes "
                f"{self.capacity_bytes:g}"
            )

    def _check_power(self) -> None:
        if self.idle_w >= self.tdp_w:
            raise InputError(f"idle_w {self.idle_w:g} is not below tdp_w {self.tdp_w:g}")
        if self.power is not None and self.power.base_w > self.tdp_w:
            raise InputError(f"base_w {self.power.base_w:g} is above tdp_w {self.tdp_w:g}")

    def _check_peaks(self) -> None:
        for stack in self.stacks:
            for kernel in stack.kernels:
                self.peak_flops_per_s(kernel.math)
        if self.peaks != "dense":
            raise InputError("its peaks are sparse ones; write the dense peaks, which are half")
        ladder = [(n, peak) for n in _LADDER if (peak := self._peaks()[n]) is not None]
        values = [peak for _, peak in ladder]
        if values != sorted(values):
            raise InputError(
                "a narrower number format has a lower peak; write dense peaks of one kind"
            )
        wide = max((self._peaks()[n] or 0.0 for n in ("fp16", "bf16")), default=0.0)
        steps = [(wide, "fp8"), (wide, "int8"), (self.peak_int8_flops_per_s or 0.0, "int4")]
        for below, name in steps:
            peak = self._peaks()[name] or 0.0  # type: ignore[index]
            if below and peak > _LARGEST_STEP * below:
                raise InputError(
                    f"peak_{name}_flops_per_s {peak:g} is {peak / below:.3g} times the peak of "
                    "the next wider format; write dense peaks, sparse ones are twice that"
                )
        for name in get_args(Math):
            source = self.sources.get(f"peak_{name}_flops_per_s", "").casefold()
            if any(w in source for w in _SPARSE) and not any(w in source for w in _MADE_DENSE):
                raise InputError(
                    f"the source of peak_{name}_flops_per_s speaks of a sparse figure; write the "
                    "dense peak, half of it, and say so there"
                )
        per_joule = max(peak or 0.0 for peak in self._peaks().values()) / self.tdp_w
        low, high = _OPERATIONS_PER_JOULE
        if not low <= per_joule <= high:
            raise InputError(
                f"tdp_w {self.tdp_w:g} and the highest peak make {per_joule:.1e} operations per "
                f"joule, outside {low:g} to {high:g}; give watts, and operations per second"
            )

    def peak_flops_per_s(self, math: Math) -> float:
        """Return the dense peak of a number format.

        Raises:
            InputError: If the device has no such path.
        """
        peak = self._peaks()[math]
        if peak is None:
            raise InputError(f"there is no peak for {math!r}, which a kernel computes in; add it")
        return peak

    def stack(self, name: str | None = None) -> Stack:
        """Return a stack by name, or the default one.

        Raises:
            InputError: If the device has no such stack.
        """
        if name is None:
            return self.stacks[0]
        by_name = {stack.name: stack for stack in self.stacks}
        if name not in by_name:
            raise unknown(f"kernel stack of {self.name}", name, by_name)
        return by_name[name]

    def _peaks(self) -> dict[Math, float | None]:
        return {
            "fp32": self.peak_fp32_flops_per_s,
            "fp16": self.peak_fp16_flops_per_s,
            "bf16": self.peak_bf16_flops_per_s,
            "fp8": self.peak_fp8_flops_per_s,
            "int8": self.peak_int8_flops_per_s,
            "int4": self.peak_int4_flops_per_s,
        }


def read_device(path: Path) -> Device:
    """Read a device file.

    Raises:
        InputError: If it cannot be read or is not a device file, with what is wrong in it.
    """
    return read_file(path, Device, schema=SCHEMA, what="device", bounds=BOUNDS)


def figures(part: Device | Stack | Kernel) -> dict[str, float]:
    """Return the numbers of a device, stack or kernel by name: those that need a source."""
    named = {f.name: getattr(part, f.name) for f in fields(part) if f.name in BOUNDS}
    return {name: value for name, value in named.items() if value is not None}


def _known(names: Iterable[str], allowed: Iterable[str], what: str) -> None:
    allowed = tuple(allowed)
    for name in names:
        if name not in allowed:
            raise unknown(what, name, allowed)
