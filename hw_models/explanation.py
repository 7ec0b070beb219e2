"""Where the cost of one bit map goes: parts that sum to it, and who can name them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models.base import HardwareModel, Workload
from dmpq.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """One part of a step's cost.

    Where a part waits for several things at once, its time is shared among them by what each adds
    to it at the margin; since time doubles where all of them double, these shares sum to it
    exactly (Euler).

    Attributes:
        name: What it is.
        key: Format of the experts that it concerns; empty where it concerns no expert.
        memory_s: Time for moving its bytes.
        compute_s: Time for its operations.
        unpack_s: Time for dequantizing its weights.
        fixed_s: Time that depends neither on bytes nor on operations: launches and overheads.
        traffic_bytes: Bytes moved, expected.
        flops: Operations, expected.
        stored_bytes: Memory that it takes.
        energy_j: The step's mean power for its time.
    """

    name: str
    key: str = ""
    memory_s: float = 0.0
    compute_s: float = 0.0
    unpack_s: float = 0.0
    fixed_s: float = 0.0
    traffic_bytes: float = 0.0
    flops: float = 0.0
    stored_bytes: float = 0.0
    energy_j: float = 0.0

    @property
    def latency_s(self) -> float:
        """Its time in the step."""
        return self.memory_s + self.compute_s + self.unpack_s + self.fixed_s

    @property
    def bound_by(self) -> str:
        """What most of its time goes to: memory, compute, unpack or fixed; empty for no time."""
        kinds = ("memory", "compute", "unpack", "fixed")
        times = {kind: getattr(self, f"{kind}_s") for kind in kinds}
        most = max(kinds, key=lambda kind: times[kind])
        return most if times[most] > 0 else ""

    @classmethod
    def total(cls, parts: tuple[Part, ...]) -> Part:
        """Return the sum of parts."""
        names = [field.name for field in fields(cls) if field.type == "float"]
        return cls("total", **{name: sum(getattr(part, name) for part in parts) for name in names})


@dataclass(frozen=True)
class FormatUse:
    """How much of a map is in one format.

    Attributes:
        key: The format.
        experts: Experts in it; halves where projections differ.
        active: Of these, expected in a step.
        launches: Launches in a step: one per layer and projection where it occurs.
        kernel_bits: Width of the kernel that runs it; 0 where experts are pruned.
        kernel: That kernel in words.
    """

    key: str
    experts: float
    active: float
    launches: int
    kernel_bits: int
    kernel: str


@dataclass(frozen=True)
class Explanation:
    """Where the latency, memory and energy of one map come from.

    Attributes:
        model: Geometry that the cost is computed for.
        device: The device in words.
        stack: Its kernels.
        workload: What a step is.
        parts: They sum to the cost, up to rounding.
        formats: Every format that occurs.
        power_w: Mean power of the step.
        capacity_bytes: Memory of the device.
    """

    model: str
    device: str
    stack: str
    workload: Workload
    parts: tuple[Part, ...]
    formats: tuple[FormatUse, ...]
    power_w: float
    capacity_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, units in the names."""

        def plain(part: Part) -> dict[str, Any]:
            return asdict(part) | {"latency_s": part.latency_s, "bound_by": part.bound_by}

        return {
            "model": self.model,
            "device": self.device,
            "stack": self.stack,
            "workload": asdict(self.workload),
            "power_w": self.power_w,
            "capacity_bytes": self.capacity_bytes,
            "total": plain(Part.total(self.parts)),
            "parts": [plain(part) for part in self.parts],
            "formats": [asdict(use) for use in self.formats],
        }


@runtime_checkable
class Explainable(Protocol):
    """A hardware model that can say where a cost comes from; not every one can."""

    def explain(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignment: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Explanation:
        """Return where the cost of one map comes from.

        Args:
            spec: Geometry of the model.
            menu: Formats that the assignment indexes.
            assignment: (N,), or (2N,) with each expert's gate+up before its down.
            workload: What a step is.
            inclusion: (N,), probability that a token selects each expert; ``None`` for uniform.
        """
        ...


def explainable(hardware: HardwareModel) -> Explainable:
    """Return the model as one that can explain.

    Raises:
        InputError: If it cannot.
    """
    if not isinstance(hardware, Explainable):
        raise InputError(
            f"The costs of {hardware.name} ({hardware.source.partition(';')[0]}) have no parts to "
            "explain; only a device with an analytical model, such as a100, can explain its costs."
        )
    return hardware
