"""A machine on the bench: what it is, which kernels and which meter it has, and measuring it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import dmpq
from dmpq.errors import InputError, first_line
from dmpq.formats import Format
from dmpq.hw_models import machine
from dmpq.hw_models.device import read_device
from dmpq.hw_models.kernels import Kernel, choose, keep_tuning, kernels, library_versions
from dmpq.hw_models.measurements import (
    CopyTiming,
    Energy,
    ExpertTiming,
    GatherTiming,
    KernelPower,
    MatrixTiming,
    Measurements,
    Origin,
    Points,
)
from dmpq.hw_models.meters import EnergyMeter, NvmlMeter, PowerMeasurement, open_rapl
from dmpq.hw_models.needs import MOST_TOKENS, ExpertShape, Needs, covers, grid
from dmpq.hw_models.timing import (
    ROTATION,
    Rig,
    expert_matrices,
    expert_work,
    time_copy,
    time_expert,
    time_gather,
    time_matrix,
)
from dmpq.revision import git_revision

Name = Literal["host", "cuda"]
Progress = Callable[[str, int, int], None]
Job = Callable[[], object]

POWER_SHARE: Final = 0.75
"""Mean power as a share of TDP where none is measured, as in the analytical model."""
MOST_WATTS: Final = 1e5


def silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class PowerSource:
    """Where power comes from.

    Attributes:
        origin: ``"nvml"`` or ``"rapl"`` for a meter, else ``"analytical"``.
        source: In words.
        assumed_w: Mean power where there is no meter.
        meter: Counts joules.
        measurement: How power is measured.
    """

    origin: Origin
    source: str
    assumed_w: float | None = None
    meter: EnergyMeter | None = None
    measurement: PowerMeasurement = field(default_factory=PowerMeasurement)


@dataclass(frozen=True)
class Bench:
    """A machine to measure.

    Attributes:
        name: ``"host"`` or ``"cuda"``.
        rig: Where and how long to time.
        device: The machine in words.
        capacity_bytes: Memory of the device.
        runtime_bytes: Memory that the driver, the context and others hold.
        kernels: By rising width; the last takes any shape.
        notes: What is wrong with kernels that were left out.
        versions: Library → version.
        power: Where power comes from.
    """

    name: Name
    rig: Rig
    device: str
    capacity_bytes: float
    runtime_bytes: int
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    power: PowerSource

    @property
    def stack(self) -> str:
        """The libraries whose kernels run."""
        return ", ".join(f"{name} {number}" for name, number in sorted(self.versions.items()))

    def kernel(self, fmt: Format, shape: ExpertShape) -> tuple[Kernel, int]:
        """Return the kernel that runs a format of an expert, and its group size."""
        return choose(self.kernels, fmt, expert_matrices(shape))

    def fingerprint(self, needs: Needs) -> str:
        """Return a hash of the machine and of the expert shapes that it is to run."""
        facts = {
            "device": self.device,
            "threads": self.rig.threads,
            "versions": dict(self.versions),
            "kernels": [kernel.name for kernel in self.kernels],
            "energy": [self.power.origin, self.power.assumed_w],
            "experts": sorted(needs.experts),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def missing(self, needs: Needs, known: Measurements | None) -> bool:
        """Return whether anything has to be measured."""
        return bool(known is None or list(_jobs(self, needs, known)))

    def measure(
        self, needs: Needs, known: Measurements | None = None, *, progress: Progress = silent
    ) -> Measurements:
        """Measure what is needed and not known yet; return it together with what was known.

        Raises:
            InputError: If the machine cannot do it.
        """
        jobs = list(_jobs(self, needs, known))
        found: list[Any] = []
        for done, (stage, job) in enumerate(jobs):
            progress(f"measuring, {stage}", done, len(jobs))
            found.append(job())
        progress("measuring", len(jobs), len(jobs))
        keep_tuning(self.rig.device)

        def of(kind: Any) -> tuple[Any, ...]:
            return tuple(sorted(item for item in found if isinstance(item, kind)))

        parts = {"experts": of(ExpertTiming), "matrices": of(MatrixTiming)}
        parts["gathers"], powers = of(GatherTiming), of(KernelPower)
        if known is not None:
            return known.with_more(**parts, powers=powers)
        power = self.power
        return Measurements(
            name=self.name,
            device=self.device,
            stack=self.stack,
            versions=self.versions,
            threads=self.rig.threads,
            cuda_graphs=self.rig.on_cuda,
            cache_bytes=self.rig.cache_bytes,
            capacity_bytes=self.capacity_bytes,
            runtime_bytes=self.runtime_bytes,
            **parts,
            copy=next(item for item in found if isinstance(item, CopyTiming)),
            energy=Energy(power.origin, power.source, powers, power.assumed_w),
            provenance=self._provenance(),
        )

    def _provenance(self) -> str:
        rig = self.rig
        said = (
            "python -m dmpq.hardware measure: median and interquartile range of at least "
            f"{rig.repetitions} repetitions and {rig.seconds:g} s per point after warming up, "
            f"weights rotating among copies of {ROTATION} times the last-level cache, up to "
            f"{MOST_TOKENS} tokens per expert"
        )
        code = f"dmpq {dmpq.__version__}"
        if revision := git_revision():
            code += f", revision {revision}"
        day = datetime.now(UTC).date().isoformat()
        return "; ".join([said, *self.notes, f"begun on {day} (UTC) by {code}"])


def _jobs(bench: Bench, needs: Needs, known: Measurements | None) -> Iterator[tuple[str, Job]]:
    """Yield what is to be measured, each with what to call it."""
    rig, power = bench.rig, bench.power
    experts: dict[Any, Points] = {}
    matrices, gathers, powers = dict[Any, Points](), dict[Any, Points](), set[Any]()
    if known is None:
        yield "memory", partial(time_copy, rig)
    else:
        experts = {(e.shape, e.bits, e.group_size): e.whole for e in known.experts}
        matrices = {matrix.shape: matrix.points for matrix in known.matrices}
        gathers = {gather.hidden_size: gather.points for gather in known.gathers}
        powers = {(p.bits, p.group_size) for p in known.energy.powers}
    widths: dict[int, int] = {}
    for shape, most in needs.experts.items():
        widths[shape[0]] = max(most, widths.get(shape[0], 1))
        asked = {bench.kernel(fmt, shape): fmt.group_size for fmt in needs.formats}
        for (kernel, group), wanted in asked.items():
            columns = group or wanted
            if not covers(experts.get((shape, kernel.bits, group)), most):
                timed = partial(time_expert, rig, kernel, shape, group=columns, tokens=grid(most))
                yield f"{kernel.bits}-bit experts", timed
            if power.meter is not None and (kernel.bits, group) not in powers:
                powers.add((kernel.bits, group))
                tokens = min(most, MOST_TOKENS)
                drawn = partial(_power, bench, kernel, shape, group=columns, tokens=tokens)
                yield f"{kernel.bits}-bit energy", drawn
    for width, most in widths.items():
        if not covers(gathers.get(width), most):
            yield "moving tokens", partial(time_gather, rig, width, tokens=grid(most))
    for size, most in needs.matrices.items():
        if not covers(matrices.get(size), most):
            full = bench.kernels[-1]
            yield "other matrices", partial(time_matrix, rig, full, size, tokens=grid(most))


def _power(
    bench: Bench, kernel: Kernel, shape: ExpertShape, *, group: int, tokens: int
) -> KernelPower:
    """Return the power above idle while a kernel runs experts."""
    meter = bench.power.meter
    assert meter is not None
    work = expert_work(bench.rig, kernel, shape, group=group, tokens=tokens)
    work()
    read = bench.power.measurement.measure(meter, work)
    return KernelPower(
        bits=kernel.bits,
        group_size=kernel.group_size(group),
        tokens=tokens,
        mean_w=read.mean_w,
        std_w=read.std_w,
        idle_w=read.idle_w,
        n=read.n,
        window_s=read.window_s,
    )


def host_bench(
    *, threads: int | None = None, rapl: Path | None = None, rig: Rig | None = None
) -> Bench:
    """Return the CPU at hand.

    Args:
        threads: That compute; ``None`` for torch's own choice.
        rapl: Folder of the power caps; ``None`` for the system's.
        rig: Where and how long to time; ``None`` for the defaults.

    Raises:
        InputError: If the system does not tell its memory.
    """
    import torch

    count = torch.get_num_threads() if threads is None else threads
    if count < 1:
        raise InputError(f"{count} threads compute nothing; give 1 or more.")
    rig = Rig(cache_bytes=machine.cpu_cache_bytes()) if rig is None else rig
    rig = replace(rig, device="cpu", threads=count)
    found, notes = kernels("cpu")
    meter, reason = open_rapl() if rapl is None else open_rapl(rapl)
    if meter is not None:
        power = PowerSource("rapl", "RAPL, CPU packages, above idle", meter=meter)
    else:
        with resources.as_file(resources.files("dmpq.hw_models") / "cpu.json") as path:
            tdp = read_device(path).tdp_w
        power = PowerSource(
            "analytical",
            f"not measured ({reason.rstrip('.')}), but {POWER_SHARE:g} x {tdp:g} W, the assumed "
            "TDP of the device file cpu",
            assumed_w=POWER_SHARE * tdp,
        )
    capability = torch.backends.cpu.get_cpu_capability()
    return Bench(
        name="host",
        rig=rig,
        device=f"{machine.cpu_name()} ({capability}, {count} thread{'s' if count > 1 else ''})",
        capacity_bytes=float(machine.memory_bytes()),
        runtime_bytes=0,
        kernels=found,
        notes=notes,
        versions=library_versions("cpu"),
        power=power,
    )


def cuda_bench(*, tdp_w: float | None = None, rig: Rig | None = None) -> Bench:
    """Return torch's current CUDA device.

    Args:
        tdp_w: Board power, watts, from which energy is computed where the GPU's counter cannot be
            read; ``None`` to measure it, and refuse where that cannot be.
        rig: Where and how long to time; ``None`` for the defaults.

    Raises:
        InputError: If there is no CUDA device that works, or its energy cannot be read.
    """
    if tdp_w is not None and not 0 < tdp_w < MOST_WATTS:
        raise InputError(
            f"A board power of {tdp_w:g} W (--tdp-w) makes no sense; give watts above 0 and below "
            f"{MOST_WATTS:,.0f}."
        )
    torch, index = _cuda()
    facts = torch.cuda.get_device_properties(index)
    rig = Rig(cache_bytes=facts.L2_cache_size) if rig is None else rig
    device = f"cuda:{index}"
    meter = NvmlMeter(uuid=f"GPU-{facts.uuid}")
    if tdp_w is None:
        meter.read_j()
        power = PowerSource("nvml", "NVML's energy counter, board, above idle", meter=meter)
    else:
        power = PowerSource(
            "analytical",
            f"not measured, but {POWER_SHARE:g} x {tdp_w:g} W as given by --tdp-w",
            assumed_w=POWER_SHARE * tdp_w,
        )
    found, notes = kernels(device)
    in_use, total = meter.memory_bytes()  # with the context and the kernels' modules, now loaded
    return Bench(
        name="cuda",
        rig=replace(rig, device=device, threads=torch.get_num_threads()),
        device=f"{facts.name} (driver {meter.driver}, CUDA {torch.version.cuda})",
        capacity_bytes=float(total),
        runtime_bytes=max(0, in_use - torch.cuda.memory_reserved(index)),
        kernels=found,
        notes=notes,
        versions=library_versions(device),
        power=power,
    )


def _cuda() -> tuple[Any, int]:
    """Return torch and its current CUDA device.

    Raises:
        InputError: If there is none that works.
    """
    import torch

    if torch.version.cuda is None:
        raise InputError(
            f"--hw cuda needs a torch with CUDA, and {torch.__version__} has none; install one, "
            "or choose a device by name, host among them."
        )
    try:
        torch.cuda.init()
        return torch, torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:  # no GPU, no driver, or one too old
        raise InputError(
            f"--hw cuda cannot use a GPU here ({first_line(error)}); mend the driver, or choose "
            "a device by name, host among them."
        ) from error
