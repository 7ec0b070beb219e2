"""Devices by name: those shipped with the package, and a user's own file by its path."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from dmpq.errors import InputError, unknown
from dmpq.hw_models import accelerator
from dmpq.hw_models.analytical import AnalyticalModel
from dmpq.hw_models.base import HardwareModel
from dmpq.hw_models.device import Device, read_device
from dmpq.hw_models.strict import schema_of
from dmpq.hw_models.systolic import SystolicModel

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


def load_hardware(name: str) -> HardwareModel:
    """Return the model of a device.

    Args:
        name: A shipped device (``"a100"``), one with a kernel stack (``"a100/gemlite"``), a
            shipped accelerator, or the path of a device or accelerator file, which ends in
            ``.json``.

    Raises:
        InputError: If the name is unknown, the file is no device or accelerator file, or an
            accelerator's simulator is not installed.
    """
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise InputError(
                f"There is no device file {name}; choose a device by name "
                f"({', '.join(list_hardware())}), or give the path of a file."
            )
        if schema_of(path) == accelerator.SCHEMA:
            return SystolicModel.of(accelerator.read_accelerator(path))
        device = read_device(path)
        return AnalyticalModel(device, device.stack())
    if name in accelerator.list_accelerators():
        return SystolicModel.of(accelerator.shipped_accelerator(name))
    device_name, slash, stack = name.partition("/")
    known = ALIASES.get(device_name, device_name)
    if known not in list_hardware():
        remedy = "Or give a DEVICE/STACK pair, or the path of a device file ending in .json."
        names = [*list_hardware(), *ALIASES, *accelerator.list_accelerators()]
        raise unknown("hardware", name, names, remedy)
    device = _shipped(known)
    return AnalyticalModel(device, device.stack(stack if slash else None))


@cache
def _shipped(name: str) -> Device:
    with resources.as_file(resources.files("dmpq.hw_models") / f"{name}.json") as path:
        return read_device(path)
