"""Device files: the facts of a device and of its kernel stacks, read strictly.

A figure nobody has published is listed under ``assumed``; every other has a source. Peaks are
dense: vendors' sheets often print twice that, for structured sparsity.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from dmpq.errors import InputError, unknown
from dmpq.formats import FULL_WIDTH

SCHEMA: Final = "dmpq.device/1"
MAX_FILE_BYTES: Final = 1 << 20
_LARGEST: Final = 1e300

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
    calibrated: bool = False
    fitted: tuple[str, ...] = ()

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
        for figure in figures:
            if figure not in self.sources and figure not in self.assumed:
                raise InputError(
                    f"{figure} has neither a source nor a place under assumed; add one"
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
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"it is larger than {MAX_FILE_BYTES} bytes")
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise InputError(f'it does not say "schema": "{SCHEMA}"')
        device: Device = _read(Device, data, "the device")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"The device file {path} cannot be read: {reason}.") from error
    except InputError as error:
        raise InputError(
            f"The device file {path} is refused: {str(error).rstrip('.')}."
        ) from error
    return device


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice!r} is written twice in one object")
    return dict(pairs)


def _figures(device: Device) -> list[str]:
    names = [f.name for f in fields(device) if f.name in _BOUNDS]
    return [name for name in names if getattr(device, name) is not None]


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as ``kind``: a dataclass, a tuple or mapping of kinds, or a scalar."""
    if isinstance(kind, types.UnionType):
        inner = next(k for k in get_args(kind) if k is not types.NoneType)
        return None if value is None else _read(inner, value, where)
    origin = get_origin(kind)
    if origin is tuple:
        _expect(isinstance(value, list), where, value, "a list")
        return tuple(_read(get_args(kind)[0], v, f"{where} {i}") for i, v in enumerate(value))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: _read(str, v, f"{where} of {key}") for key, v in value.items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise unknown(where, str(value), get_args(kind))
        return value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and -_LARGEST < value < _LARGEST, where, value, "a finite number")
        return float(value)
    if kind in (int, bool, str):
        _expect(type(value) is kind, where, value, f"of type {kind.__name__}")
        return value
    _expect(isinstance(value, dict), where, value, "an object")
    return kind(**_read_members(kind, value, where))


def _read_members(kind: Any, value: dict[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise unknown(f"name in {where}", name, hints)
    members = {}
    for member in fields(kind):
        if member.name not in value:
            if member.default is MISSING:
                raise InputError(f"{where} has no {member.name}; add it")
            continue
        got = _read(hints[member.name], value[member.name], f"{where}'s {member.name}")
        low, high = _BOUNDS.get(member.name, (-math.inf, math.inf))
        if isinstance(got, int | float) and not low <= got <= high:
            raise InputError(
                f"{where}'s {member.name} is {got:g}, outside {low:g} to {high:g}; give it in the "
                "unit of its name"
            )
        members[member.name] = got
    return members


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{where} is {str(value)[:60]!r}; it must be {wanted}")
