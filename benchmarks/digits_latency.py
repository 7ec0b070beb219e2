"""Latency of several models in one run: after warm-up, in turns, median and quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

ROUNDS: Final = {1: 300, 64: 100, 1024: 20}
"""Timed forwards of each model, by batch."""
TURNS: Final = 10
WARM_UP: Final = 2
"""Untimed forwards before each turn's, after which a model's weights are in the caches again."""


@dataclass(frozen=True)
class Latency:
    """How long one forward of one batch takes.

    Attributes:
        median_s: Seconds.
        lower_s: First quartile.
        upper_s: Third quartile.
        cpu_s: Median of the thread's own time, to which other processes do not add their turns.
    """

    median_s: float
    lower_s: float
    upper_s: float
    cpu_s: float


@torch.no_grad()
def latencies(
    models: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    images: torch.Tensor,
    *,
    rounds: int,
) -> dict[str, Latency]:
    """Return each model's latency on one batch.

    Models take turns of several forwards, so that whatever else the machine does falls on all of
    them alike.

    Args:
        models: By name.
        images: (batch, pixels).
        rounds: Timed forwards of each, in ten turns.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            for _ in range(WARM_UP):
                model(images)
            for _ in range(rounds // TURNS):
                begun, own = time.perf_counter(), time.thread_time()
                model(images)
                owned = time.thread_time() - own
                seconds[name].append((time.perf_counter() - begun, owned))
    return {name: _summary(np.array(found)) for name, found in seconds.items()}


def _summary(seconds: NDArray[np.float64]) -> Latency:
    """Return what (forwards, 2) times say, of the wall and of the thread."""
    wall = np.percentile(seconds[:, 0], (50, 25, 75))
    return Latency(*map(float, wall), cpu_s=float(np.median(seconds[:, 1])))
