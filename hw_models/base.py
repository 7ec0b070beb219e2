"""The words of every hardware model: a workload, a cost, and the interface between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.formats import Menu
from dmpq.spec import ModelSpec

Floats = NDArray[np.float64]
Phase = Literal["decode", "prefill"]

BITS_PER_BYTE: Final = 8
NOTHING_RUNS: Final = "nothing runs"
"""In place of a kernel, for pruned experts."""

_MOST: Final = 10**9


@dataclass(frozen=True)
class Workload:
    """What one step is.

    Attributes:
        phase: ``"decode"`` makes one token per sequence, ``"prefill"`` reads whole prompts.
        batch: Sequences per step.
        context: Tokens per sequence: those in the cache (decode) or in the prompt (prefill).
    """

    phase: Phase = "decode"
    batch: int = 1
    context: int = 2048

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise unknown("phase", self.phase, get_args(Phase))
        for name in ("batch", "context"):
            value = getattr(self, name)
            if not 1 <= value <= _MOST:
                raise InputError(
                    f"The workload's {name} is {value}; it must be 1 or more, at most {_MOST:,}."
                )

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model in one step."""
        return self.batch if self.phase == "decode" else self.batch * self.context


@dataclass(frozen=True, eq=False)
class Cost:
    """What K bit maps cost, each per step.

    Attributes:
        latency_s: (K,), seconds.
        memory_bytes: (K,), weights, KV cache and activations.
        energy_j: (K,), joules of the device.
    """

    latency_s: Floats
    memory_bytes: Floats
    energy_j: Floats

    def tokens_per_s(self, workload: Workload) -> Floats:
        """Return tokens per second, shape (K,)."""
        return workload.tokens / self.latency_s


class HardwareModel(Protocol):
    """A device under a kernel stack, able to price bit maps."""

    @property
    def name(self) -> str:
        """Name to load it by, for example ``"a100"``."""
        ...

    @property
    def device(self) -> str:
        """The device in words."""
        ...

    @property
    def stack(self) -> str:
        """Kernels that the figures hold for."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether the same question always has the same answer."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether the figures were fitted to measurements on this very device."""
        ...

    @property
    def source(self) -> str:
        """Where the figures come from."""
        ...

    @property
    def capacity_bytes(self) -> float:
        """Memory of the device, bytes."""
        ...

    def cost(
        self,
        spec: ModelSpec,
        menu: Menu,
        assignments: NDArray[np.integer],
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Cost:
        """Return the cost of bit maps.

        Args:
            spec: Geometry of the model.
            menu: Formats that the assignments index.
            assignments: (K, N), or (K, 2N) with each expert's gate+up before its down.
            workload: What a step is.
            inclusion: (N,), probability that a token selects each expert; ``None`` for uniform.
        """
        ...

    def expert_latency(
        self,
        spec: ModelSpec,
        menu: Menu,
        workload: Workload,
        *,
        inclusion: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Return each expert's share of a step's time, by projection and format: (N, 2, B).

        Linearised: latency does not add up exactly, since experts of one format share a launch.
        """
        ...

    def stored_bits(self, spec: ModelSpec, menu: Menu) -> NDArray[np.int64]:
        """Return the bits that each expert's projections take in the device's memory: (N, 2, B).

        ``spec.stored_bits(menu)``, or more where the device cannot store a width as it is.
        """
        ...

    def unsupported(self, menu: Menu) -> tuple[str, ...]:
        """Return one note for each format that the device cannot store or has no kernel for."""
        ...

    def kernels(self, menu: Menu) -> dict[str, str]:
        """Return what each format's time is of, in words: format key → kernel.

        A measured kernel by its name and its groups, a modelled or simulated one by its width.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """Return what a user of the costs should know, assumed figures too, one clause each."""
        ...
