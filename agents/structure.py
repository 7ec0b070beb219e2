"""Rules that look at nothing but an expert's place: the first or last layers get more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.allocation import with_more_bits
from dmpq.errors import InputError
from dmpq.problem import Problem

_ONE_IN: Final = 8
"""One layer in so many is protected by default: QuantMoE-Bench's 4 of Mixtral's 32."""


@dataclass(frozen=True, kw_only=True)
class FirstLayersAgent(AdditiveAgent):
    """Gives more bits to the experts of the first MoE layers: one evaluation.

    "FirstL" of QuantMoE-Bench (arXiv 2406.08155): the first 4 to 8 blocks at 4 bits and the rest
    at 2, where the average follows from the choice. Here the protected layers deserve
    ``extra_bits`` more than the rest, the budget holds, and the rest is as even as it allows.

    Attributes:
        layers: How many; ``None`` for one in eight, 1 at least.
        extra_bits: How much wider the protected layers are, as near as menu and budget allow; the
            paper's two widths are 2 apart.
    """

    name: ClassVar[str] = "first-layers"
    signal: ClassVar[str] = "place: first layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    layers: int | None = None
    extra_bits: float = 2.0

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return damages that widen the first layers, (D, B).

        Raises:
            InputError: If there are not so many layers, or ``extra_bits`` is no width.
        """
        chosen = _places(problem, first=_number(problem, self.layers))
        return with_more_bits(problem, np.ones(len(chosen)), chosen, self.extra_bits)


@dataclass(frozen=True, kw_only=True)
class LastLayersAgent(AdditiveAgent):
    """Gives more bits to the experts of the last MoE layers: one evaluation.

    What QuantMoE-Bench (arXiv 2406.08155) compares "FirstL" with, and finds worse.

    Attributes:
        layers: See :class:`FirstLayersAgent`.
        extra_bits: See :class:`FirstLayersAgent`.
    """

    name: ClassVar[str] = "last-layers"
    signal: ClassVar[str] = "place: last layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    layers: int | None = None
    extra_bits: float = 2.0

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return damages that widen the last layers, (D, B).

        Raises:
            InputError: If there are not so many layers, or ``extra_bits`` is no width.
        """
        chosen = _places(problem, last=_number(problem, self.layers))
        return with_more_bits(problem, np.ones(len(chosen)), chosen, self.extra_bits)


@dataclass(frozen=True, kw_only=True)
class FirstLastLayersAgent(AdditiveAgent):
    """Gives more bits to the experts of the first and of the last MoE layers: one evaluation.

    The habit of dense models' recipes; exact allocations of Mixtral agree (layers 0, 1 and 31).

    Attributes:
        layers: How many at each end; ``None`` for one in sixteen, 1 at least.
        extra_bits: See :class:`FirstLayersAgent`.
    """

    name: ClassVar[str] = "first-last-layers"
    signal: ClassVar[str] = "place: outer layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "practice"
    reads: ClassVar[str] = "gradients"

    layers: int | None = None
    extra_bits: float = 2.0

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return damages that widen the outer layers, (D, B).

        Raises:
            InputError: If there are not so many layers, or ``extra_bits`` is no width.
        """
        count = _number(problem, self.layers, one_in=2 * _ONE_IN)
        chosen = _places(problem, first=count, last=count)
        return with_more_bits(problem, np.ones(len(chosen)), chosen, self.extra_bits)


@dataclass(frozen=True, kw_only=True)
class FrequencyFirstLayersAgent(AdditiveAgent):
    """Ranks by frequency, and gives more bits to the first MoE layers on top: one evaluation.

    QuantMoE-Bench's best recipe for Mixtral, "+Attn +Freq +FirstL" (arXiv 2406.08155), as far as
    it concerns routed experts: attention and shared experts, which it widens too, are no decisions
    here and keep the checkpoint's precision.

    Attributes:
        layers: See :class:`FirstLayersAgent`.
        extra_bits: See :class:`FirstLayersAgent`.
    """

    name: ClassVar[str] = "frequency-first-layers"
    signal: ClassVar[str] = "selections, first layers"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2406.08155"
    reads: ClassVar[str] = "gradients"

    layers: int | None = None
    extra_bits: float = 2.0

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the damages of frequencies, with wide first layers, (D, B).

        Raises:
            InputError: If there are not so many layers, or ``extra_bits`` is no width.
        """
        chosen = _places(problem, first=_number(problem, self.layers))
        return with_more_bits(problem, problem.profile.frequency, chosen, self.extra_bits)


def _number(problem: Problem, layers: int | None, *, one_in: int = _ONE_IN) -> int:
    total = len(problem.spec.moe_layers)
    if layers is None:
        return max(1, total // one_in)
    if not 1 <= layers <= total:
        raise InputError(
            f"layers is {layers}, but {problem.spec.name} has {total} MoE layers; give a number "
            f"from 1 to {total}."
        )
    return layers


def _places(problem: Problem, *, first: int = 0, last: int = 0) -> NDArray[np.bool_]:
    """Return which experts are in the first or last layers, (N,)."""
    layer = problem.spec.layer_of_expert
    chosen: NDArray[np.bool_] = (layer < first) | (layer >= len(problem.spec.moe_layers) - last)
    return chosen
