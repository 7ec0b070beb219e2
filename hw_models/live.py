"""This machine as a hardware model: measures what it is asked for, once, and keeps it.

What was measured is kept in ``$XDG_CACHE_HOME/dmpq/measurements`` (``~/.cache`` without it), one
file per machine, threads, library versions and geometry. A second run finds it there; a workload
with more tokens adds points and changes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.hw_models import machine
from dmpq.hw_models.base import NOTHING_RUNS, Cost, Floats, Workload
from dmpq.hw_models.bench import Bench, Progress, cuda_bench, host_bench, silent
from dmpq.hw_models.kernels import choose
from dmpq.hw_models.measured import MeasuredModel, either, kernel_note, kernel_words
from dmpq.hw_models.measurements import Measurements, read_measurements
from dmpq.hw_models.needs import Needs, needs
from dmpq.hw_models.routing import inclusion_probabilities
from dmpq.spec import ModelSpec

_WIDE = 16
"""Groups of a matrix that every kernel takes."""


@dataclass(frozen=True)
class LiveModel:
    """A :class:`~dmpq.hw_models.base.HardwareModel` that measures what it is asked for.

    Attributes:
        bench: The machine.
        folder: Where measurements are kept.
        progress: Called with a stage's name, steps done, and all steps.
        deterministic: What was measured is kept: the same question has the same answer.
        calibrated: The figures are this very device's.
    """

    bench: Bench
    folder: Path = field(default_factory=machine.cache_folder)
    progress: Progress = silent
    deterministic: bool = True
    calibrated: bool = True
    _known: dict[Path, Measurements] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """``"host"`` or ``"cuda"``."""
        return self.bench.name

    @property
    def device(self) -> str:
        """The device in words."""
        return self.bench.device

    @property
    def stack(self) -> str:
        """The kernels in words."""
        return self.bench.stack

    @property
    def source(self) -> str:
        """Where time and energy come from."""
        records = ", ".join(record.digest for record in self._known.values())
        return (
            f"measured on {self.device} with {self.stack}"
            f"{f' ({records})' if records else ''}; energy: {self.bench.power.source}"
        )

    @property
    def capacity_bytes(self) -> float:
        """Memory of the device."""
        return self.bench.capacity_bytes

    def cost(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Cost:
        """Return the cost of bit maps; see :meth:`dmpq.hw_models.HardwareModel.cost`."""
        model = self.measured(spec, menu, workload, inclusion=inclusion)
        return model.cost(spec, menu, assignments, workload, inclusion=inclusion)

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return seconds per expert, projection and format, shape (N, 2, B); they add up."""
        model = self.measured(spec, menu, workload, inclusion=inclusion)
        return model.expert_latency(spec, menu, workload, inclusion=inclusion)

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits of each expert's projections in memory, (N, 2, B): the kernels'."""
        return self.measured(spec, menu, Workload()).stored_bits(spec, menu)

    def notes(self) -> tuple[str, ...]:
        """Return where the energy comes from."""
        return (f"energy: {self.bench.power.source}",)

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format without a kernel of its own."""
        notes = (
            kernel_note(fmt, bits, group, kernel, self.name)
            for fmt in (menu.formats[index] for index in menu.stored)
            for kernel, bits, group in self._timed_as(fmt)
        )
        return tuple(dict.fromkeys(text for text in notes if text is not None))

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return the kernel of each format; several where the shapes measured differ in it."""
        named = {
            fmt.key: (
                [NOTHING_RUNS]
                if fmt.is_pruned
                else [kernel_words(*one) for one in self._timed_as(fmt)]
            )
            for fmt in menu.formats
        }
        return {key: either(words) for key, words in named.items()}

    def _timed_as(self, fmt: Format) -> list[tuple[str, int, int]]:
        """Return kernel, width and groups of a format for each shape of expert measured so far.

        Before its first measurement those that it will be measured with.
        """
        wide = fmt.group_size * _WIDE
        found = {}
        for record in self._known.values():
            measured = {(e.shape, e.bits, e.group_size) for e in record.experts}
            for shape in {expert.shape for expert in record.experts}:
                kernel, group = self.bench.kernel(fmt, shape)
                found[shape] = kernel.name, kernel.bits, group
                if (shape, kernel.bits, group) in measured:
                    timing = record.expert(shape, fmt)
                    found[shape] = timing.kernel, timing.bits, timing.group_size
        if not found:
            kernel, group = choose(self.bench.kernels, fmt, [(wide, wide)])
            return [(kernel.name, kernel.bits, group)]
        return [found[shape] for shape in sorted(found)]

    def measured(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> MeasuredModel:
        """Return the model of what was measured, after measuring what it lacks.

        Raises:
            InputError: If something cannot be measured or kept.
        """
        wanted = needs(spec, menu, workload, inclusion_probabilities(spec, inclusion))
        path = self.folder / f"{self.name}-{self.bench.fingerprint(wanted)}.json"
        if self.bench.missing(wanted, self._known.get(path)):
            self._known[path] = self._measure(wanted, path)
        return MeasuredModel(self._known[path])

    def _measure(self, wanted: Needs, path: Path) -> Measurements:
        with _alone(path):
            known = _kept(path) if path.is_file() else None
            if self.bench.missing(wanted, known):
                self.bench.measure(wanted, known, progress=self.progress).write(path)
            return _kept(path)


def host_model(*, threads: int | None = None, progress: Progress = silent) -> LiveModel:
    """Return the CPU at hand as a hardware model.

    Args:
        threads: That compute; ``None`` for torch's own choice.
        progress: Called with a stage's name, steps done, and all steps, while it measures.

    Raises:
        InputError: If the system does not tell its memory.
    """
    return LiveModel(host_bench(threads=threads), progress=progress)


def cuda_model(*, tdp_w: float | None = None, progress: Progress = silent) -> LiveModel:
    """Return torch's current CUDA device as a hardware model.

    Args:
        tdp_w: Board power, watts, where the GPU's energy counter cannot be read.
        progress: Called with a stage's name, steps done, and all steps, while it measures.

    Raises:
        InputError: If there is no CUDA device that works, or its energy cannot be read.
    """
    return LiveModel(cuda_bench(tdp_w=tdp_w), progress=progress)


def _kept(path: Path) -> Measurements:
    """Return what was measured before.

    Raises:
        InputError: If the file is damaged, with what to do.
    """
    try:
        return read_measurements(path)
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}; delete that file, and what it held is measured again."
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time measure: two would time each other, and keep different answers.

    Raises:
        InputError: If the folder cannot be used.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(
            f"Measurements cannot be kept in {path.parent} ({error.strerror}); set XDG_CACHE_HOME "
            "to a folder that can be written."
        ) from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no such locks on Windows and some file systems
            pass
        yield
