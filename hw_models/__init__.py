"""What a bit map costs on a device: latency, memory and energy of one step of a workload."""

from dmpq.hw_models.analytical import AnalyticalModel, Breakdown
from dmpq.hw_models.base import Cost, HardwareModel, Workload
from dmpq.hw_models.catalogue import list_hardware, load_hardware
from dmpq.hw_models.device import Device, Kernel, Power, Stack
from dmpq.hw_models.explanation import Explainable, Explanation, FormatUse, Part, explainable

__all__ = [
    "AnalyticalModel",
    "Breakdown",
    "Cost",
    "Device",
    "Explainable",
    "Explanation",
    "FormatUse",
    "HardwareModel",
    "Kernel",
    "Part",
    "Power",
    "Stack",
    "Workload",
    "explainable",
    "list_hardware",
    "load_hardware",
]
