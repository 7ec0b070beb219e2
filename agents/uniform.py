"""The same format for every expert: the baseline that every other allocation must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.errors import InputError
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class UniformAgent:
    """Evaluates the largest uniform map within the limits: one evaluation."""

    name: ClassVar[str] = "uniform"

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the uniform map of most stored bits; see :meth:`dmpq.agents.Agent.search`.

        Raises:
            InputError: If no uniform map meets the limits.
        """
        del seed
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        maps = np.stack([problem.uniform(key) for key in problem.menu.keys])
        stored = np.where(problem.feasible(maps), problem.effective_bits(maps), -1.0)
        if stored.max() < 0:
            raise InputError(
                f"None of the uniform maps of {', '.join(problem.menu.keys)} bits meets the "
                "limits; raise one of them, or take an agent that mixes formats."
            )
        recorder.evaluate(maps[[stored.argmax()]])
        return recorder.result()
