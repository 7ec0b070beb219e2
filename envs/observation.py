"""What agents see: normalised float32 vectors, or the same by name."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.problem import Problem, Scores

Floats = NDArray[np.float32]
Observation = Floats | dict[str, Floats]
ObservationMode = Literal["flat", "dict"]


def box(size: int | tuple[int, ...], low: float = -1.0) -> spaces.Box:
    """Return the float32 box [low, 1] of a shape."""
    shape = (size,) if isinstance(size, int) else size
    return spaces.Box(low, 1.0, shape, np.float32)


def squash(ratio: float) -> float:
    """Return x / (1 + x), which maps what is never negative into [0, 1]; not finite: 1."""
    return ratio / (1 + ratio) if math.isfinite(ratio) else 1.0


def rows(observation: Floats, problem: Problem) -> tuple[Floats, Floats]:
    """Return the (D, F) feature rows and the remainder of a flat observation of the whole map.

    Serves the importance, joint and adjust environments, for networks that share weights among
    decisions.
    """
    decisions, features = problem.features.shape
    head, rest = np.split(observation, [decisions * features])
    return head.reshape(decisions, features), rest


class NamedParts:
    """The observation by name: per-expert state, and what the map so far costs.

    Every part is a 1-D float32 box; one value per decision unless stated otherwise:

    ============== ======= ======= ===========================================================
    name           size    range   meaning
    ============== ======= ======= ===========================================================
    bits           D       [0, 1]  current nominal width / 16; 0 where undecided or pruned
    frequency      D       [-1, 1] how often the router selects the expert, log scale
    contribution   D       [-1, 1] gradient of the loss at the expert's output, log scale
    sensitivity    D * B   [-1, 1] KL of each single format, log scale, decision by decision
    context        C       [-1, 1] the problem: limits, hardware prices, workload
    loss           1       [0, 1]  x / (1 + x) of damage over that of the narrowest uniform map
    latency        1       [0, 1]  the same of latency over that of the baseline map
    memory         1       [0, 1]  the same of memory
    energy         1       [0, 1]  the same of energy
    budget_left    1       [0, 1]  share of the bit budget that is not spent
    ============== ======= ======= ===========================================================
    """

    def __init__(self, problem: Problem) -> None:
        names = list(problem.feature_names)
        sensitivity = [i for i, name in enumerate(names) if name.startswith("sensitivity")]
        self._problem = problem
        self._widths = np.append(problem.menu.bits / 16, 0).astype(np.float32)
        self._fixed = {
            "frequency": problem.features[:, names.index("frequency")],
            "contribution": problem.features[:, names.index("contribution")],
            "sensitivity": problem.features[:, sensitivity].ravel(),
            "context": problem.context,
        }

    def space(self, **more: int) -> spaces.Dict:
        """Return the space; ``more`` gives the sizes of further parts in [-1, 1]."""
        signed = {name: box(part.size) for name, part in self._fixed.items()}
        positive = dict.fromkeys(("loss", "latency", "memory", "energy", "budget_left"), 1)
        positive["bits"] = self._problem.num_decisions
        parts: dict[str, Any] = signed | {k: box(v, 0.0) for k, v in positive.items()}
        return spaces.Dict(parts | {name: box(size) for name, size in more.items()})

    def observe(
        self, assignment: NDArray[np.integer], costs: Floats, **more: Floats
    ) -> dict[str, Floats]:
        """Return the parts.

        Args:
            assignment: (D,) menu indices, -1 where undecided.
            costs: (5,) loss, latency, memory, energy and budget left, in [0, 1].
            more: Further parts that :meth:`space` was told of.
        """
        scalars = ("loss", "latency", "memory", "energy", "budget_left")
        return (
            {name: part.astype(np.float32) for name, part in self._fixed.items()}
            | {name: costs[i : i + 1].copy() for i, name in enumerate(scalars)}
            | {"bits": self._widths[assignment]}
            | more
        )


def cost_summary(problem: Problem, scores: Scores, *, budget_left: float) -> Floats:
    """Return loss, latency, memory, energy and budget left of one map in [0, 1], (5,)."""
    base, cost = problem.baselines, scores.cost
    return np.array(
        [
            squash(float(scores.kl[0]) / base.damage),
            squash(float(cost.latency_s[0]) / base.latency_s),
            squash(float(cost.memory_bytes[0]) / base.memory_bytes),
            squash(float(cost.energy_j[0]) / base.energy_j),
            budget_left,
        ],
        dtype=np.float32,
    )
