"""Recorded measurements: times of real kernels, memory and power, in a file that can be replayed.

The JSON file says ``"schema": "dmpq.measurements/1"``. It holds no host name and no date: the same
measurements are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.formats import FULL_WIDTH, QUANTIZED_WIDTHS, Format
from dmpq.hw_models.strict import read_file, schema_of

SCHEMA: Final = "dmpq.measurements/1"
MAX_FILE_BYTES: Final = 16 << 20

Origin = Literal["nvml", "rapl", "analytical"]

_BOUNDS: Final = {
    "tokens": (1, 1 << 24),
    "n": (1, 1e9),
    "median_s": (1e-9, 1e4),
    "iqr_s": (0.0, 1e4),
    "preempted": (0, 1e9),
    "bits": (1, 16),
    "group_size": (0, 1 << 24),
    "hidden_size": (1, 1 << 24),
    "intermediate_size": (1, 1 << 24),
    "out_features": (1, 1 << 32),
    "in_features": (1, 1 << 24),
    "stored_bytes": (1, 1e14),
    "copied_bytes": (1, 1e14),
    "mean_w": (0.01, 1e5),
    "std_w": (0.0, 1e5),
    "idle_w": (0.0, 1e5),
    "window_s": (5.0, 1e5),
    "assumed_w": (0.01, 1e5),
    "threads": (1, 1 << 16),
    "cache_bytes": (0, 1e12),
    "capacity_bytes": (1e6, 1e14),
    "runtime_bytes": (0, 1e14),
}
"""Field → what it can be in its unit; microseconds or gigabytes fall outside."""


@dataclass(frozen=True, order=True)
class Point:
    """The time of one thing at one size.

    Attributes:
        tokens: Rows of the activations.
        n: Repetitions.
        median_s: Their median, seconds.
        iqr_s: Distance between their quartiles, seconds.
        preempted: How many of them another process interrupted.
    """

    tokens: int
    n: int
    median_s: float
    iqr_s: float
    preempted: int


Points = tuple[Point, ...]


@dataclass(frozen=True, order=True)
class ExpertTiming:
    """One expert's forward under one kernel: gate and up, activation, down.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the expert.
        gated: Whether a gate stands beside the up projection.
        bits: Width of the weights.
        group_size: Weights that share a scale in the kernel; 0 for one scale per row, or none.
        kernel: Name of the kernel.
        stored_bytes: What the kernel holds of one expert's weights, scales included.
        whole: Times of the whole forward.
        gate_up: Times of its first half, up to the activation.
        down: Times of its second half.
    """

    hidden_size: int
    intermediate_size: int
    gated: bool
    bits: int
    group_size: int
    kernel: str
    stored_bytes: int
    whole: Points
    gate_up: Points
    down: Points

    def __post_init__(self) -> None:
        if self.bits not in (*QUANTIZED_WIDTHS, FULL_WIDTH):
            raise InputError(f"the kernel {self.kernel!r} has {self.bits} bits, which no menu has")
        _check_sizes(self.whole, self.kernel)
        sizes = [
            [point.tokens for point in part] for part in (self.whole, self.gate_up, self.down)
        ]
        if not sizes[0] == sizes[1] == sizes[2]:
            raise InputError(
                f"the kernel {self.kernel!r} was not timed at the same tokens in all its parts"
            )

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Which experts it is the time of."""
        return self.hidden_size, self.intermediate_size, self.gated

    @property
    def label(self) -> str:
        """The kernel's width and groups, as in ``"4g32"``; ``"8"`` for one scale per row."""
        return f"{self.bits}g{self.group_size}" if self.group_size else str(self.bits)


@dataclass(frozen=True, order=True)
class MatrixTiming:
    """A matrix that no bit map changes, at the checkpoint's own precision.

    Attributes:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        kernel: Name of the kernel.
        points: Its times.
    """

    out_features: int
    in_features: int
    kernel: str
    points: Points

    def __post_init__(self) -> None:
        _check_sizes(self.points, self.kernel)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.out_features, self.in_features


@dataclass(frozen=True, order=True)
class GatherTiming:
    """Fetching an expert's tokens, weighting what it returns, and adding it to the stream.

    Attributes:
        hidden_size: Width of the residual stream.
        points: Its times.
    """

    hidden_size: int
    points: Points

    def __post_init__(self) -> None:
        _check_sizes(self.points, "gather")


@dataclass(frozen=True)
class CopyTiming:
    """A copy in memory, read and written; it stands for the traffic of the KV cache.

    Attributes:
        copied_bytes: Bytes copied at a time.
        n: Repetitions.
        median_s: Their median, seconds.
        iqr_s: Distance between their quartiles, seconds.
        preempted: How many of them another process interrupted.
    """

    copied_bytes: int
    n: int
    median_s: float
    iqr_s: float
    preempted: int

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes moved per second, both ways together."""
        return 2 * self.copied_bytes / self.median_s


@dataclass(frozen=True, order=True)
class KernelPower:
    """Mean power above idle while one kernel runs.

    Attributes:
        bits: The kernel's width.
        group_size: The kernel's groups; 0 for one scale per row, or none.
        tokens: Rows of the activations.
        mean_w: Above idle, watts.
        std_w: Standard deviation over the windows, watts.
        idle_w: Power with nothing to do, measured just before, watts.
        n: Windows.
        window_s: Shortest window, seconds.
    """

    bits: int
    group_size: int
    tokens: int
    mean_w: float
    std_w: float
    idle_w: float
    n: int
    window_s: float


@dataclass(frozen=True)
class Energy:
    """What energy is computed from: time, and measured power or one that is assumed.

    Attributes:
        origin: ``"nvml"`` or ``"rapl"`` where power above idle was measured, else
            ``"analytical"``.
        source: In words; where nothing was measured, why.
        powers: One per kernel; none where nothing was measured.
        assumed_w: Mean power, idle included, where nothing was measured.
    """

    origin: Origin
    source: str
    powers: tuple[KernelPower, ...] = ()
    assumed_w: float | None = None

    def __post_init__(self) -> None:
        measured = self.origin != "analytical"
        if measured == (self.assumed_w is not None) or measured != bool(self.powers):
            raise InputError(
                f"the energy's origin is {self.origin!r}; measured power has powers and no "
                "assumed_w, an analytical one the reverse"
            )


@dataclass(frozen=True)
class Measurements:
    """What was measured on one machine.

    Attributes:
        name: ``"host"`` or ``"cuda"``.
        device: The machine in words.
        stack: The kernels in words.
        versions: Library → version.
        threads: CPU threads that computed.
        cuda_graphs: Whether kernels were launched as CUDA graphs.
        cache_bytes: Last-level cache; weights rotate among more than that.
        capacity_bytes: Memory of the device.
        runtime_bytes: Memory that the driver, the context and others hold.
        experts: Times of experts.
        matrices: Times of everything else with weights.
        gathers: Times of moving an expert's tokens.
        copy: Bandwidth.
        energy: Power.
        provenance: How it was measured.
    """

    name: Literal["host", "cuda"]
    device: str
    stack: str
    versions: Mapping[str, str] = field(hash=False)
    threads: int
    cuda_graphs: bool
    cache_bytes: int
    capacity_bytes: float
    runtime_bytes: int
    experts: tuple[ExpertTiming, ...]
    matrices: tuple[MatrixTiming, ...]
    gathers: tuple[GatherTiming, ...]
    copy: CopyTiming
    energy: Energy
    provenance: str

    def __post_init__(self) -> None:
        for what in ("experts", "matrices", "gathers"):
            if not getattr(self, what):
                raise InputError(f"it has no {what}; measure again")
        keyed: dict[str, list[Any]] = {
            "experts": [(e.shape, e.bits, e.group_size) for e in self.experts],
            "matrices": [matrix.shape for matrix in self.matrices],
            "gathers": [gather.hidden_size for gather in self.gathers],
            "powers": [(p.bits, p.group_size) for p in self.energy.powers],
        }
        for what, keys in keyed.items():
            if len(set(keys)) != len(keys):
                raise InputError(f"{what} names the same thing twice; name each once")
        full = {e.shape for e in self.experts if e.bits == FULL_WIDTH}
        for expert in self.experts:
            if expert.shape not in full:
                raise InputError(
                    f"experts of shape {expert.shape} have no time at 16 bits; measure it"
                )

    def expert(self, shape: tuple[int, int, bool], fmt: Format) -> ExpertTiming:
        """Return the timing that a format is priced with: its own kernel's, or a wider one's.

        Among kernels of one width, the one of the nearest group size.

        Raises:
            InputError: If no expert of this shape was measured.
        """
        wide = [e for e in self.experts if e.shape == shape and e.bits >= fmt.bits]
        if not wide:
            known = sorted({e.shape[:2] for e in self.experts})
            raise InputError(
                f"The measurements of {self.device} know experts of widths {known}, not "
                f"{shape[:2]}; measure this geometry with python -m dmpq.hardware measure."
            )
        return min(wide, key=lambda e: (e.bits, abs(e.group_size - fmt.group_size)))

    def power_w(self, bits: int, group_size: int) -> float:
        """Return the power at which a kernel's time counts, watts.

        Raises:
            InputError: If power was measured, but not this kernel's.
        """
        if self.energy.assumed_w is not None:
            return self.energy.assumed_w
        for power in self.energy.powers:
            if (power.bits, power.group_size) == (bits, group_size):
                return power.mean_w
        raise InputError(
            f"The measurements of {self.device} lack the power of the {bits}-bit kernel; measure "
            "it with python -m dmpq.hardware measure."
        )

    @property
    def digest(self) -> str:
        """A hash of the file that holds them."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:12]

    def to_bytes(self) -> bytes:
        """Return the file's content; the same measurements give the same bytes."""
        data = {"schema": SCHEMA, **asdict(self)}
        data["versions"] = dict(sorted(self.versions.items()))
        return (json.dumps(_compact(data), indent=1, ensure_ascii=False) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        replace_atomically(path, self.to_bytes())

    def with_more(
        self,
        *,
        experts: Iterable[ExpertTiming] = (),
        matrices: Iterable[MatrixTiming] = (),
        gathers: Iterable[GatherTiming] = (),
        powers: Iterable[KernelPower] = (),
    ) -> Measurements:
        """Return these measurements, and what others have more.

        What was measured once stays as it is, so that a question keeps its answer.
        """
        mine = self.energy
        united = _united(mine.powers, powers, lambda p: (p.bits, p.group_size))
        return replace(
            self,
            experts=_united(self.experts, experts, lambda e: (e.shape, e.bits, e.group_size)),
            matrices=_united(self.matrices, matrices, lambda m: m.shape),
            gathers=_united(self.gathers, gathers, lambda g: g.hidden_size),
            energy=replace(mine, powers=united),
        )


def read_measurements(path: Path) -> Measurements:
    """Read recorded measurements.

    Raises:
        InputError: If the file cannot be read or is refused, with what is wrong in it.
    """
    return read_file(
        path,
        Measurements,
        schema=SCHEMA,
        what="measurements",
        bounds=_BOUNDS,
        max_bytes=MAX_FILE_BYTES,
    )


def holds_measurements(path: Path) -> bool:
    """Return whether a JSON file says that it holds measurements, of whatever version."""
    schema = schema_of(path, max_bytes=MAX_FILE_BYTES)
    return schema is not None and schema.startswith(SCHEMA.partition("/")[0] + "/")


def _check_sizes(points: Points, kernel: str) -> None:
    sizes = [point.tokens for point in points]
    if not sizes or sizes[0] != 1 or any(a >= b for a, b in pairwise(sizes)):
        raise InputError(f"the times of {kernel!r} must begin at 1 token and rise in tokens")


def _compact(value: Any) -> Any:
    """Return plain JSON values, numbers of five digits; noise does not need more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _compact(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_compact(v) for v in value]
    return value


def _united(mine: Iterable[Any], others: Iterable[Any], key: Any) -> tuple[Any, ...]:
    """Return both, sorted; where both have one thing, its points are mine and the other's more."""
    found = {key(item): item for item in mine}
    for item in others:
        old = found.get(key(item))
        found[key(item)] = item if old is None else _with_points(old, item)
    return tuple(sorted(found.values()))


def _with_points(old: Any, new: Any) -> Any:
    changed = {}
    for member in fields(old):
        points = getattr(old, member.name)
        if isinstance(points, tuple):
            more = [p for p in getattr(new, member.name) if p.tokens > points[-1].tokens]
            changed[member.name] = (*points, *more)
    return replace(old, **changed)
