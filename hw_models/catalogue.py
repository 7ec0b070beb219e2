"""Hardware by name: the devices and accelerators shipped here, and a user's own file by path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, get_args

from dmpq.errors import InputError, did_you_mean
from dmpq.hw_models.accelerator import find_accelerator, list_accelerators
from dmpq.hw_models.analytical import AnalyticalModel
from dmpq.hw_models.base import HardwareModel
from dmpq.hw_models.device import Device, Math, read_device
from dmpq.hw_models.measured import MeasuredModel
from dmpq.hw_models.measurements import holds_measurements, read_measurements
from dmpq.hw_models.systolic import SystolicModel

Progress = Callable[[str, int, int], None]

ALIASES: Final = {
    "a100-80gb": "a100",
    "a100-sxm": "a100",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h200-141gb": "h200",
    "b200-180gb": "b200",
    "v100-32gb": "v100",
    "tesla-t4": "t4",
    "3060": "rtx3060",
    "rtx-3060": "rtx3060",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "agx-orin": "jetson-agx-orin",
    "orin-nano": "jetson-orin-nano",
    "coral": "coral-edge-tpu",
    "edge-tpu": "coral-edge-tpu",
    "edgetpu": "coral-edge-tpu",
    "tpuv5e": "tpu-v5e",
    "v5e": "tpu-v5e",
    "spr": "sapphire-rapids",
    "xeon-8480": "sapphire-rapids",
    "9654": "epyc-9654",
    "genoa": "epyc-9654",
    "pi5": "raspberry-pi-5",
    "rpi5": "raspberry-pi-5",
    "apple-m2-max": "m2-max",
    "m2max": "m2-max",
}
"""Other names of shipped devices. What a short name stands for where several parts share it
(``a100``: 80 GB) is the ``note`` of its file."""

MEASURED: Final = ("host", "cuda")
"""Names of the machine at hand, its CPU and its CUDA device; no file may take them."""

_TWICE: Final = (1.9, 2.1)
_SAME: Final = 1.5
_HALVED: Final = 3.0
"""A ratio of 8 to 16 bits above this is that of a card which halves 16 bits when it accumulates in
32: twice its dense peak may be the honest one of accumulating in 16."""


def list_hardware() -> list[str]:
    """Return the names of the shipped devices."""
    folder = resources.files("dmpq.hw_models")
    return sorted(
        file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")
    )


def load_hardware(
    name: str, *, tdp_w: float | None = None, progress: Progress | None = None
) -> HardwareModel:
    """Return the model of a device.

    Args:
        name: A shipped device (``"a100"``), one with a kernel stack (``"a100/gemlite"``), a
            shipped accelerator, this machine (``"host"`` for its CPU, ``"cuda"`` for its GPU), or
            the path of a file of a device, an accelerator or recorded measurements, which ends in
            ``.json``, or in ``.json/STACK``.
        tdp_w: Board power of ``"cuda"``, watts, where the GPU's energy counter cannot be read.
        progress: Called with a stage's name, steps done, and all steps, while this machine is
            measured.

    Raises:
        InputError: If the name is unknown, the file is none of these, an accelerator's simulator
            is not installed, there is no such GPU, or a board power is given for anything else.
    """
    refuse_power(name, tdp_w)
    if name in MEASURED:
        from dmpq.hw_models.bench import silent
        from dmpq.hw_models.live import cuda_model, host_model

        shown = silent if progress is None else progress
        if name == "host":
            return host_model(progress=shown)
        return cuda_model(tdp_w=tdp_w, progress=shown)
    if name.endswith(".json") and holds_measurements(Path(name)):
        return MeasuredModel(read_measurements(Path(name)))
    simulated = find_accelerator(name)
    if simulated is not None:
        if name.endswith(".json"):
            _refuse_taken(simulated.name, (*MEASURED, *list_hardware()), f"The file {name}")
        return SystolicModel.of(simulated)
    device, stack = find_device(name)
    return AnalyticalModel(device, device.stack(stack))


def refuse_power(name: str, tdp_w: float | None) -> None:
    """Refuse a board power for hardware that has its own.

    Raises:
        InputError: If one is given, and the name is not ``"cuda"``.
    """
    if tdp_w is not None and name != "cuda":
        raise InputError(
            f"--tdp-w is the board power of the GPU at hand, not of {name[:60]}; give it with "
            "--hw cuda, or leave it out."
        )


def find_device(name: str) -> tuple[Device, str | None]:
    """Return a device, and the kernel stack that its name asks for; names as above.

    Raises:
        InputError: If the name is unknown or the file is no device file.
    """
    path, ending, stack = name.rpartition(".json")
    if ending and (not stack or stack.startswith("/")):
        return _own(Path(path + ending)), stack[1:] if stack else None
    device_name, slash, stack = name.partition("/")
    known = device_name.casefold()
    known = ALIASES.get(known, known)
    if known in (*MEASURED, *list_accelerators()):
        raise InputError(_no_device_file(known))
    if known not in list_hardware():
        names = [*list_hardware(), *list_accelerators(), *MEASURED]
        near = did_you_mean(device_name, [*names, *ALIASES])
        raise InputError(
            f"Unknown hardware {name[:60]!r}{near}; choose one of: {', '.join(names)}; or give a "
            "DEVICE/STACK pair, or the path of a device file ending in .json."
        )
    return shipped(known), stack if slash else None


@cache
def shipped(name: str) -> Device:
    """Return a shipped device by the name of its file."""
    with resources.as_file(resources.files("dmpq.hw_models") / f"{name}.json") as path:
        return read_device(path)


def _no_device_file(name: str) -> str:
    """Return why a name that exists has no figures and no kernel stacks, and what to do."""
    if name in MEASURED:
        return (
            f"{name} is measured when it is used, so it has no device file and no kernel stacks; "
            f"give --hw {name} to a search, or see python -m dmpq.hardware measure."
        )
    return f"{name} is simulated, so it has no kernel stacks; write {name} alone."


def _own(path: Path) -> Device:
    """Read a user's device file, and refuse what only the shipped ones show to be wrong."""
    if not os.path.isfile(path):  # false where a name is too long, too
        raise InputError(
            f"There is no device file {str(path)[:200]}; choose a device by name "
            f"({', '.join(list_hardware())}), or give the path of a file."
        )
    if holds_measurements(path) or find_accelerator(str(path)) is not None:
        raise InputError(
            f"The file {path} describes no device by its figures, but measurements or a simulated "
            "accelerator; give it to --hw, without a kernel stack."
        )
    device = read_device(path)
    _refuse_taken(device.name, MEASURED, f"The device file {path}")
    for name in list_hardware():
        _refuse_sparse(device, shipped(name), path)
    return device


def _refuse_taken(name: str, taken: Iterable[str], file: str) -> None:
    """Refuse a file whose results could not be told from those of something else."""
    if name.casefold() in taken:
        what = "the machine at hand" if name.casefold() in MEASURED else "a shipped device"
        raise InputError(
            f"{file} is refused: the name {name!r} is that of {what}; give it another."
        )


def _refuse_sparse(device: Device, known: Device, path: Path) -> None:
    """Refuse a peak that is twice the dense one of the device that a file claims to describe.

    The file must name the known device, and its bandwidth must be that of one such device: two
    cards in one file are no sparse card.

    Raises:
        InputError: With the figure and its dense value.
    """
    names = {known.name, *(alias for alias, name in ALIASES.items() if name == known.name)}
    said = _words(f"{device.name} {device.description}")
    if not any(f" {_words(name).strip()} " in said for name in names):
        return
    if device.bandwidth_bytes_per_s > _SAME * known.bandwidth_bytes_per_s:
        return
    eight, sixteen = known.peak_int8_flops_per_s, known.peak_fp16_flops_per_s
    halved = eight is not None and sixteen is not None and eight / sixteen > _HALVED
    for math in ("int8", "int4") if halved else get_args(Math):
        figure = f"peak_{math}_flops_per_s"
        own, dense = getattr(device, figure), getattr(known, figure)
        if own is not None and dense is not None and _TWICE[0] < own / dense < _TWICE[1]:
            raise InputError(
                f"The device file {path} is refused: {figure} {own:g} is twice the dense peak of "
                f"{known.description} ({dense:g}), as sheets print it for sparse matrices; "
                "write the dense one."
            )


def _words(text: str) -> str:
    """Return text as lower-case words between single spaces: "RTX-4090" as " rtx 4090 "."""
    return f" {' '.join(re.findall('[a-z0-9]+', text.casefold()))} "
