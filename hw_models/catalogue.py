"""Devices by name: those shipped with the package, and a user's own file by its path."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from dmpq.errors import InputError, unknown
from dmpq.hw_models.analytical import AnalyticalModel
from dmpq.hw_models.base import HardwareModel
from dmpq.hw_models.device import Device, read_device
from dmpq.hw_models.measured import MeasuredModel
from dmpq.hw_models.measurements import holds_measurements, read_measurements

Progress = Callable[[str, int, int], None]

MEASURED: Final = ("host", "cuda")
"""This machine: its CPU, and its CUDA device."""

ALIASES: Final = {
    "a100-80gb": "a100",
    "h100-80gb": "h100",
    "h200-141gb": "h200",
    "v100-32gb": "v100",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
}


def list_hardware() -> list[str]:
    """Return the names of the shipped devices."""
    folder = resources.files("dmpq.hw_models")
    return sorted(
        file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")
    )


def load_hardware(name: str, *, progress: Progress | None = None) -> HardwareModel:
    """Return the model of a device.

    Args:
        name: A shipped device (``"a100"``), one with a kernel stack (``"a100/gemlite"``), this
            machine (``"host"`` for its CPU, ``"cuda"`` for its GPU), or the path of a file that
            ends in ``.json`` and holds a device or recorded measurements.
        progress: Called with a stage's name, steps done, and all steps, while this machine is
            measured.

    Raises:
        InputError: If the name is unknown, the file is neither, or there is no such GPU.
    """
    if name in MEASURED:
        from dmpq.hw_models.live import cuda_model, host_model

        make = host_model if name == "host" else cuda_model
        return make() if progress is None else make(progress=progress)
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise InputError(
                f"There is no device file {name}; choose a device by name "
                f"({', '.join(list_hardware())}), or give the path of a file."
            )
        if holds_measurements(path):
            return MeasuredModel(read_measurements(path))
        device = read_device(path)
        return AnalyticalModel(device, device.stack())
    device_name, slash, stack = name.partition("/")
    known = ALIASES.get(device_name, device_name)
    if known not in list_hardware():
        remedy = "Or give a DEVICE/STACK pair, or the path of a device file ending in .json."
        raise unknown("hardware", name, [*list_hardware(), *ALIASES, *MEASURED], remedy)
    device = _shipped(known)
    return AnalyticalModel(device, device.stack(stack if slash else None))


@cache
def _shipped(name: str) -> Device:
    with resources.as_file(resources.files("dmpq.hw_models") / f"{name}.json") as path:
        return read_device(path)
