"""Device files: the facts of a device and of its kernel stacks, read strictly.

A figure nobody has published is listed under ``assumed``; every other has a source. Peaks are
dense: vendors' sheets often print twice that, for structured sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal, get_args

from dmpq.errors import InputError, unknown
from dmpq.formats import FULL_WIDTH
from dmpq.hw_models.strict import read_file, refuse_unsourced

SCHEMA: Final = "dmpq.device/1"

Math = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]

# A figure outside these bounds is in another unit (GB/s, TFLOPS, GB) than its name says.
_BOUNDS: Final = {
    "capacity_bytes": (1e6, 1e14),
    "bandwidth_bytes_per_s": (1e8, 1e15),
    "tdp_w": (0.1, 1e5),
    "idle_w": (0.0, 1e5),
    "base_w": (0.0, 1e5),
    "memory_w": (0.0, 1e5),
    "compute_w": (0.0, 1e5),
    "dequantized_weights_per_s": (1e6, 1e16),
    "tile_rows": (1, 4096),
    "memory_efficiency": (1e-4, 1.0),
    "compute_efficiency": (1e-4, 1.0),
    "dense_memory_efficiency": (1e-4, 1.0),
    "dense_compute_efficiency": (1e-4, 1.0),
    "launch_s": (0.0, 1.0),
    "layer_s": (0.0, 1.0),
    "step_s": (0.0, 1.0),
    "sequence_s": (0.0, 1.0),
    **{f"peak_{name}_flops_per_s": (1e8, 1e18) for name in get_args(Math)},
}


@dataclass(frozen=True)
class Kernel:
    """How fast one width runs.

    Attributes:
        bits: Nominal width of the weights.
        math: Number format that products are computed in; its peak is the device's.
        memory_efficiency: Share of the nominal bandwidth that it reaches.
        compute_efficiency: Share of the dense peak that it reaches.
        launch_s: Time of a launch that does nothing, one MoE layer's two products together.
        dequantized_weights_per_s: Ceiling on unpacking; ``None`` where none is known.
        source: Where these figures come from.
    """

    bits: int
    math: Math
    memory_efficiency: float
    compute_efficiency: float
    launch_s: float
    source: str
    dequantized_weights_per_s: float | None = None


@dataclass(frozen=True)
class Stack:
    """A set of kernels on a device.

    Attributes:
        name: Name, as in ``a100/gemlite``.
        kernels: One per width that has a kernel; 16 is always among them.
        tile_rows: Tokens to which an expert's share of the batch is padded.
        dense_memory_efficiency: Share of the bandwidth that attention and head reach.
        dense_compute_efficiency: Share of the peak that attention and head reach.
        layer_s: Overhead per layer.
        step_s: Overhead per step.
        sequence_s: Overhead per sequence and step.
        source: Where the figures outside the kernels come from.
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

    def __post_init__(self) -> None:
        widths = [kernel.bits for kernel in self.kernels]
        if FULL_WIDTH not in widths:
            raise InputError(f"stack {self.name!r} has no kernel for 16 bits; add one")
        if len(set(widths)) != len(widths):
            raise InputError(f"stack {self.name!r} names a width twice; name each once")

    def kernel(self, bits: int) -> Kernel:
        """Return the kernel that runs a width: its own, else the next wider one."""
        return min((k for k in self.kernels if k.bits >= bits), key=lambda k: k.bits)


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
        sources: Figure → where it comes from.
        assumed: Figures that nobody has published.
        power: Fitted power; ``None`` for a constant share of ``tdp_w``.
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
        if self.idle_w >= self.tdp_w:
            raise InputError(f"idle_w {self.idle_w:g} is not below tdp_w {self.tdp_w:g}")
        ladder = [
            peak
            for name in ("fp32", "bf16", "int8", "int4")
            if (peak := self._peaks()[name]) is not None
        ]
        if ladder != sorted(ladder):
            raise InputError(
                "a narrower number format has a lower peak; write dense peaks of one kind"
            )
        for stack in self.stacks:
            for kernel in stack.kernels:
                self.peak_flops_per_s(kernel.math)
        figures = [*_figures(self), *(f"stacks.{stack.name}" for stack in self.stacks)]
        refuse_unsourced(figures, self.sources, self.assumed)

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
    return read_file(path, Device, schema=SCHEMA, what="device", bounds=_BOUNDS)


def _figures(device: Device) -> list[str]:
    names = [f.name for f in fields(device) if f.name in _BOUNDS]
    return [name for name in names if getattr(device, name) is not None]
