"""The exact multiple-choice knapsack on measured sensitivities: the floor of every search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.problem import Problem


@dataclass(frozen=True, kw_only=True)
class MckpAgent:
    """Evaluates the exact optimum of the linearised objective: one evaluation."""

    name: ClassVar[str] = "mckp"

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the knapsack's map; see :meth:`dmpq.agents.Agent.search`."""
        del seed
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        recorder.evaluate(problem.mckp()[None])
        return recorder.result()
