"""Random maps that spend the budget: the noise band of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.problem import Problem

_FRUITLESS: Final = 100
"""Proposals in a row that were met before, after which the search ends."""


@dataclass(frozen=True, kw_only=True)
class RandomAgent:
    """Evaluates random maps and keeps the best.

    Every decision draws values that fall at random with size; the exact knapsack spends the
    budget on them. No statistic of any expert takes part. A longer search with the same seed
    begins with the maps of a shorter one.
    """

    name: ClassVar[str] = "random"
    signal: ClassVar[str] = "none: random maps"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "noise band"
    reads: ClassVar[str] = "nothing"

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best of the random maps; see :meth:`dmpq.agents.Agent.search`."""
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        rng = np.random.default_rng(seed)
        by_size = np.argsort(problem.sizes, axis=1, kind="stable")
        values, fruitless = np.empty(problem.sizes.shape), 0
        while recorder.remaining and fruitless < _FRUITLESS:
            falling = -np.sort(rng.random(values.shape), axis=1)
            np.put_along_axis(values, by_size, falling, axis=1)
            before = recorder.remaining
            recorder.evaluate(problem.project(values)[None])
            fruitless = 0 if recorder.remaining < before else fruitless + 1
        return recorder.result()
