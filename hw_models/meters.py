"""Energy meters: NVML's counter of a GPU, RAPL's of a CPU, and mean power in whole windows.

What a meter does where it cannot tell:

======================================  ====================================================
what happens                            rule
======================================  ====================================================
no driver library, no such GPU          :class:`~dmpq.errors.InputError`
driver too old for the counter          :class:`~dmpq.errors.InputError`
counter not supported (Jetson, pre-     :class:`~dmpq.errors.InputError`
Volta, MIG, where the counter is the
whole board's)
no permission, GPU lost                 :class:`~dmpq.errors.InputError`
counter went backwards (driver reset)   the window is measured again, thrice at most
counter stood still over a window       :class:`~dmpq.errors.InputError`
load drew no more than idle             :class:`~dmpq.errors.InputError`
RAPL wrapped around                     added up by ``max_energy_range_uj``
======================================  ====================================================

Windows are 5 s and more since NVML's counter moves about every 100 ms, five and more since GPUs
are sampled only part of the time (arXiv 2312.02741); each starts at a random phase of that.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from dmpq.errors import InputError, first_line

MIN_WINDOW_S: Final = 5.0
MIN_TRIALS: Final = 5
_UPDATE_S: Final = 0.1
_RETRIES: Final = 3
_POWERCAP: Final = Path("/sys/class/powercap")

Clock = Callable[[], float]
Sleep = Callable[[float], None]


class EnergyMeter(Protocol):
    """Something that counts the joules of a device."""

    @property
    def origin(self) -> str:
        """Which counter it is, ``"nvml"`` or ``"rapl"``."""
        ...

    def read_j(self) -> float:
        """Return joules since some fixed moment; smaller than before only after a reset.

        Raises:
            InputError: If the counter cannot be read.
        """
        ...


@dataclass(frozen=True)
class PowerReading:
    """Mean power over several windows of work.

    Attributes:
        mean_w: Above idle, watts.
        std_w: Standard deviation over the windows, watts.
        idle_w: Power with nothing to do, measured just before, watts.
        n: Windows.
        window_s: Shortest window, seconds.
    """

    mean_w: float
    std_w: float
    idle_w: float
    n: int
    window_s: float


@dataclass(frozen=True)
class PowerMeasurement:
    """How power is measured: windows around repeated work, with a clock that may be a fake.

    Attributes:
        window_s: Shortest window, at least 5 s.
        trials: Windows of work, at least 5.
        clock: Monotonic seconds.
        sleep: Lets seconds pass idly.
        seed: Of the random phase at which windows start.
    """

    window_s: float = MIN_WINDOW_S
    trials: int = MIN_TRIALS
    clock: Clock = time.monotonic
    sleep: Sleep = time.sleep
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.window_s >= MIN_WINDOW_S:
            raise InputError(
                f"An energy window of {self.window_s:g} s is too short for a counter that moves "
                f"every 0.1 s; give {MIN_WINDOW_S:g} s or more."
            )
        if self.trials < MIN_TRIALS:
            raise InputError(
                f"{self.trials} energy windows say nothing of the spread; give {MIN_TRIALS} or "
                "more."
            )

    def measure(self, meter: EnergyMeter, work: Callable[[], object]) -> PowerReading:
        """Return the mean power of work above idle.

        Args:
            meter: The counter.
            work: A short piece of work, done when it returns; it is repeated to fill windows.

        Raises:
            InputError: If the counter cannot be read, stands still or keeps going backwards, or
                if the work draws no more than idle.
        """
        phase = random.Random(self.seed)
        idle_w, _ = self._window(meter, lambda: self.sleep(self.window_s), "of idling")
        powers, windows = [], []
        for _ in range(self.trials):
            self.sleep(phase.uniform(0, _UPDATE_S))
            power, seconds = self._window(meter, work, "of work")
            powers.append(power - idle_w)
            windows.append(seconds)
        mean = statistics.fmean(powers)
        if mean <= 0:
            raise InputError(
                f"The energy counter ({meter.origin}) saw {idle_w:.1f} W idle and no more under "
                "load; let no other work run beside the measurement."
            )
        return PowerReading(mean, statistics.stdev(powers), idle_w, len(powers), min(windows))

    def _window(
        self, meter: EnergyMeter, work: Callable[[], object], what: str
    ) -> tuple[float, float]:
        """Return mean watts and seconds of one window."""
        for _ in range(_RETRIES):
            begin, before = self.clock(), meter.read_j()
            work()
            while self.clock() - begin < self.window_s:
                work()
            energy, seconds = meter.read_j() - before, self.clock() - begin
            if energy > 0:
                return energy / seconds, seconds
            if energy == 0:
                raise InputError(
                    f"The energy counter ({meter.origin}) stood still over {seconds:.1f} s {what};"
                    " it measures nothing here."
                )
        raise InputError(
            f"The energy counter ({meter.origin}) went backwards in {_RETRIES} windows {what}; "
            "the driver resets it again and again."
        )


@dataclass
class NvmlMeter:
    """The energy counter and the memory of an NVIDIA GPU, through ``nvidia-ml-py``.

    Attributes:
        index: Of the GPU, as NVML counts.
        uuid: Of the GPU, ``"GPU-..."``; where given, ``index`` is ignored. CUDA's numbering is
            not NVML's, so use it whenever torch knows the device.
        origin: ``"nvml"``.

    Raises:
        InputError: By the rules of this module.
    """

    index: int = 0
    uuid: str | None = None
    origin: str = field(default="nvml", init=False)
    _handle: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._nvml("nvmlInit")
        count = self._nvml("nvmlDeviceGetCount")
        if self.uuid is not None:
            self._handle = self._nvml("nvmlDeviceGetHandleByUUID", self.uuid)
        elif 0 <= self.index < count:
            self._handle = self._nvml("nvmlDeviceGetHandleByIndex", self.index)
        else:
            raise InputError(
                f"There is no GPU {self.index}: the NVIDIA driver knows {count}; choose another "
                "device."
            )

    def read_j(self) -> float:
        """Return joules since the driver was loaded.

        Raises:
            InputError: By the rules of this module.
        """
        if self._mig():
            raise InputError(
                "The GPU is divided into MIG instances, and its energy counter is the whole "
                "board's; measure on an undivided GPU, or state the power (--tdp-w)."
            )
        return float(self._nvml("nvmlDeviceGetTotalEnergyConsumption", self._handle)) / 1e3

    def memory_bytes(self) -> tuple[int, int]:
        """Return bytes in use, by everybody, and bytes in all."""
        memory = self._nvml("nvmlDeviceGetMemoryInfo", self._handle)
        return int(memory.used), int(memory.total)

    @property
    def name(self) -> str:
        """The GPU in words."""
        return str(self._nvml("nvmlDeviceGetName", self._handle))

    @property
    def driver(self) -> str:
        """Version of the driver."""
        return str(self._nvml("nvmlSystemGetDriverVersion"))

    def _mig(self) -> bool:
        """Whether MIG is on; a driver or GPU without the notion has it off."""
        import pynvml  # type: ignore[import-untyped]

        try:
            return bool(pynvml.nvmlDeviceGetMigMode(self._handle)[0])
        except pynvml.NVMLError:
            return False

    def _nvml(self, function: str, *arguments: Any) -> Any:
        """Call the binding; every error becomes a sentence."""
        import pynvml

        try:
            return getattr(pynvml, function)(*arguments)
        except pynvml.NVMLError as error:
            reason = _REASONS.get(error.value)
            said = str(error).rstrip(".")
            if reason is None:
                reason = f"NVML's {function} failed: {said}; look at it with nvidia-smi."
            raise InputError(reason.format(function=function)) from error


_REASONS: Final = {
    3: "This GPU does not support {function}, as Jetson boards and those before Volta do not; "
    "state the power (--tdp-w), or choose a device by name.",
    4: "There is no permission for {function}; ask the administrator of this machine for access "
    "to the GPU's counters, or state the power (--tdp-w).",
    6: "The NVIDIA driver does not know this GPU; look at it with nvidia-smi.",
    9: "The NVIDIA driver is not loaded; load it, or choose a device by name.",
    12: "There is no NVIDIA driver on this machine (libnvidia-ml.so.1 is missing); install it, "
    "or choose a device by name.",
    13: "The NVIDIA driver is too old: it has no {function}; update it.",
    15: "The GPU is lost: it fell off the bus or cannot be reached; reset it or restart the "
    "machine, and measure again.",
    16: "The GPU needs a reset before it can be used; restart it, and measure again.",
    18: "The NVIDIA driver and its library have different versions; restart the machine, and "
    "measure again.",
}
"""NVML's error codes, which are part of its interface, in the user's words."""


@dataclass
class RaplMeter:
    """The energy counters of all CPU packages, ``/sys/class/powercap/intel-rapl:*``.

    AMD's CPUs answer under the same names. Since Linux 5.10 only root may read them by default.

    Attributes:
        root: Folder of the power caps.
        origin: ``"rapl"``.

    Raises:
        InputError: If there is no counter, or it cannot be read.
    """

    root: Path = _POWERCAP
    origin: str = field(default="rapl", init=False)
    _packages: tuple[tuple[Path, int], ...] = field(default=(), init=False, repr=False)
    _last_uj: dict[Path, int] = field(default_factory=dict, init=False, repr=False)
    _total_uj: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        # "intel-rapl:0" is a package, "intel-rapl:0:1" a part of one; "psys" counts all again.
        zones = [zone for zone in self.root.glob("intel-rapl:*") if zone.name.count(":") == 1]
        packages = [z for z in sorted(zones) if _text(z / "name").startswith("package")]
        if not packages:
            raise InputError(
                f"There is no RAPL counter of a CPU package under {self.root}; this system does "
                "not show one."
            )
        self._packages = tuple((z, _microjoules(z / "max_energy_range_uj")) for z in packages)
        self._last_uj = {z: _microjoules(z / "energy_uj") for z in packages}

    def read_j(self) -> float:
        """Return joules since the meter was made; read it more often than the counters wrap.

        Raises:
            InputError: If a counter cannot be read any more.
        """
        for zone, wraps_at in self._packages:
            now, last = _microjoules(zone / "energy_uj"), self._last_uj[zone]
            self._total_uj += now - last if now >= last else now + wraps_at - last
            self._last_uj[zone] = now
        return self._total_uj / 1e6


def _microjoules(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise InputError(
            f"The RAPL counter {path.parent.name}/{path.name} says {text[:40]!r}; it must be a "
            "whole number."
        )
    return int(text)


def _text(path: Path) -> str:
    counter = f"{path.parent.name}/{path.name}"
    try:
        return path.read_text("ascii").strip()
    except PermissionError as error:
        raise InputError(
            f"There is no permission to read the RAPL counter {counter}; let root grant it."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The RAPL counter {counter} cannot be read; {first_line(error)}."
        ) from error


def open_rapl(root: Path = _POWERCAP) -> tuple[RaplMeter | None, str]:
    """Return the CPU's meter, or ``None`` and why there is none."""
    try:
        return RaplMeter(root), ""
    except InputError as error:
        return None, str(error)
