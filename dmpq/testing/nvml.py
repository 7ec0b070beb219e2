"""An NVIDIA driver that is not there: NVML's C library as an object, under the real binding.

``nvidia-ml-py`` keeps the loaded library in ``pynvml.nvmlLib`` and calls it through ctypes. With
this object in that place, the binding's own code runs, argument conversion and error codes
included, on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

SUCCESS: Final = 0
UNINITIALIZED: Final = 1
NOT_SUPPORTED: Final = 3
NO_PERMISSION: Final = 4
NOT_FOUND: Final = 6
DRIVER_NOT_LOADED: Final = 9
GPU_IS_LOST: Final = 15
LIB_RM_VERSION_MISMATCH: Final = 18


@dataclass
class FakeClock:
    """A clock that passes only when it is told to.

    Attributes:
        now: Seconds.
    """

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time, seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class FakeGpu:
    """A GPU that draws power by the clock.

    Attributes:
        clock: What time it is.
        name: Its name.
        uuid: Its id.
        idle_w: Power with nothing to do.
        busy_w: Power while :meth:`work` runs.
        memory_bytes: Bytes in use, and in all.
        mig: Whether it is divided into MIG instances.
        energy_j: What its counter has counted; set it back for a driver reset.
    """

    clock: FakeClock = field(default_factory=FakeClock)
    name: str = "NVIDIA Fake 80GB"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    idle_w: float = 70.0
    busy_w: float = 370.0
    memory_bytes: tuple[int, int] = (1 << 30, 80 << 30)
    mig: bool = False
    energy_j: float = 1000.0
    _seen: float = 0.0

    def work(self, seconds: float = 0.5) -> None:
        """Be busy for a while."""
        self.settle()
        self.clock.sleep(seconds)
        self.energy_j += self.busy_w * seconds
        self._seen = self.clock.now

    def settle(self) -> None:
        """Count what was drawn at idle since the last look."""
        self.energy_j += self.idle_w * (self.clock.now - self._seen)
        self._seen = self.clock.now


@dataclass
class FakeNvml:
    """NVML's C functions, as far as ``dmpq`` calls them.

    Attributes:
        gpus: The machine's GPUs.
        faults: C function → the error code that it returns.
        absent: C functions that this driver does not have.
        driver: Its version.
        calls: Names of the C functions called, in order.

    Example:
        >>> with fake_nvml(FakeNvml(faults={"nvmlDeviceGetTotalEnergyConsumption": 3})):
        ...     NvmlMeter().read_j()
    """

    gpus: Iterable[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    faults: dict[str, int] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    driver: str = "600.00.00"
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gpus = list(self.gpus)

    def __getattr__(self, name: str) -> Any:
        """Return a C function; ctypes raises ``AttributeError`` where the library has none."""
        answer = _ANSWERS.get(name)
        if answer is None or name in self.absent:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.calls.append(name)
            fault = self.faults.get(name, SUCCESS)
            if fault != SUCCESS:
                return fault
            return int(answer(self, *arguments))

        return function

    def gpu(self, handle: Any) -> FakeGpu:
        """Return the GPU that a handle stands for."""
        import ctypes

        return self._gpus[(ctypes.cast(handle, ctypes.c_void_p).value or 1) - 1]

    def set_handle(self, reference: Any, index: int) -> int:
        """Write the handle of a GPU where the binding wants it; returns the error code."""
        import ctypes

        if not 0 <= index < len(self._gpus):
            return NOT_FOUND
        ctypes.cast(reference, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
        return SUCCESS

    def count(self) -> int:
        """Return the number of GPUs."""
        return len(self._gpus)

    def find(self, uuid: bytes) -> int:
        """Return the position of a GPU by its id, -1 for none."""
        ids = [gpu.uuid.encode() for gpu in self._gpus]
        return ids.index(uuid) if uuid in ids else -1


def _written(reference: Any, value: Any) -> int:
    """Write a value where a ``byref`` points."""
    reference._obj.value = value
    return SUCCESS


def _text(buffer: Any, text: str) -> int:
    buffer.value = text.encode()
    return SUCCESS


def _energy(nvml: FakeNvml, handle: Any, millijoules: Any) -> int:
    gpu = nvml.gpu(handle)
    gpu.settle()
    return _written(millijoules, round(gpu.energy_j * 1e3))


def _memory(nvml: FakeNvml, handle: Any, reference: Any) -> int:
    info, (used, total) = reference._obj, nvml.gpu(handle).memory_bytes
    info.used, info.total, info.free = used, total, total - used
    return SUCCESS


def _mig(nvml: FakeNvml, handle: Any, current: Any, pending: Any) -> int:
    _written(pending, int(nvml.gpu(handle).mig))
    return _written(current, int(nvml.gpu(handle).mig))


_ANSWERS: Final[dict[str, Any]] = {
    "nvmlInitWithFlags": lambda nvml, flags: SUCCESS,
    "nvmlShutdown": lambda nvml: SUCCESS,
    "nvmlDeviceGetCount_v2": lambda nvml, count: _written(count, nvml.count()),
    "nvmlDeviceGetHandleByIndex_v2": lambda nvml, index, handle: nvml.set_handle(
        handle, index.value
    ),
    "nvmlDeviceGetHandleByUUID": lambda nvml, uuid, handle: nvml.set_handle(
        handle, nvml.find(uuid.value)
    ),
    "nvmlDeviceGetName": lambda nvml, handle, buffer, size: _text(buffer, nvml.gpu(handle).name),
    "nvmlSystemGetDriverVersion": lambda nvml, buffer, size: _text(buffer, nvml.driver),
    "nvmlDeviceGetTotalEnergyConsumption": _energy,
    "nvmlDeviceGetMemoryInfo": _memory,
    "nvmlDeviceGetMigMode": _mig,
}


@contextmanager
def fake_nvml(nvml: FakeNvml | None = None) -> Iterator[FakeNvml]:
    """Put a fake driver under ``pynvml`` while the block lasts.

    Args:
        nvml: The driver; ``None`` for one GPU that works.
    """
    import pynvml  # type: ignore[import-untyped]

    fake = FakeNvml() if nvml is None else nvml
    library, functions = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    pynvml.nvmlLib = fake
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield fake
    finally:
        pynvml.nvmlLib = library
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(functions)
