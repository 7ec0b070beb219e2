"""Greedy widening by the true loss: the surrogate says which steps are worth measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.greedy import gains_per_bit, widenings
from dmpq.agents.neighbours import neighbours
from dmpq.errors import InputError
from dmpq.problem import Problem

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GreedyTrueAgent:
    """Takes the greedy algorithm's last steps by measured gain per stored bit.

    The classical forward selection (for example section 3.3.2 of Hastie et al., The Elements of
    Statistical Learning, 2009), with a budget. Measuring every step of every decision from the
    smallest map on would take their square, so that the surrogate takes the first steps of
    :class:`~dmpq.agents.greedy.GreedyAgent`, and as many of the last are measured as the
    evaluations allow: of the ``candidates`` steps of most gain by the surrogate, the one of most
    measured gain in the problem's reward per stored bit is taken. Steps that measure no gain are
    out; where none of them gains, the next are measured. The last evaluation is kept for the map
    that the surrogate fills up from there. The first one is the greedy map itself, so that the
    result is never worse than that.

    Within limits on latency or energy no single widening leads away from the smallest map, since
    the first expert of another format costs a launch. There the search climbs from the knapsack's
    map by exchanges (:mod:`dmpq.agents.neighbours`), those in doubt first: of ``candidates`` that
    are measured, the one that gains most is taken, until none gains.

    Attributes:
        candidates: Steps measured for each that is taken.
    """

    name: ClassVar[str] = "greedy-true"
    signal: ClassVar[str] = "measured gain per bit"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "Zemel 1980"

    candidates: int = 6

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise InputError(f"candidates is {self.candidates}; choose 1 or more.")

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map measured. Nothing depends on the seed."""
        del seed
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        if problem.projection.priced:
            self._climb(problem, recorder)
            return recorder.result()
        smallest = problem.project(problem.sizes.astype(np.float64))
        path = [smallest, *widenings(problem, smallest)]
        recorder.evaluate(path[-1][None])
        # The greedy map, the one that measuring starts at and the last one are three.
        measured = (evaluations - 3) // self.candidates
        if measured < 1:
            return recorder.result()
        choice = path[max(len(path) - 1 - measured, 0)]
        recorder.hold(choice)
        recorder.evaluate(choice[None])
        out = np.zeros(problem.sizes.shape, bool)
        while recorder.remaining > 1:
            steps = self._steps(problem, choice, out)[: recorder.remaining - 1]
            if not len(steps):
                break
            maps = np.repeat(choice[None], len(steps), axis=0)
            maps[np.arange(len(steps)), steps[:, 0]] = steps[:, 1]
            now, found = recorder.evaluate(choice[None]), recorder.evaluate(maps)
            bits = found.effective_bits - now.effective_bits
            gains = (found.reward - now.reward) / bits
            lost = steps[~(gains > 0)]
            out[lost[:, 0], lost[:, 1]] = True
            if (gains > 0).any():
                choice = maps[gains.argmax()]
                recorder.hold(choice)
        for widened in widenings(problem, choice):
            choice = widened
        if recorder.remaining:
            recorder.evaluate(choice[None])
        return recorder.result()

    def _climb(self, problem: Problem, recorder: Recorder) -> None:
        """Exchange from the knapsack's map on, for as long as an exchange gains."""
        choice = problem.mckp()
        best = recorder.evaluate(choice[None]).reward[0]
        while recorder.remaining:
            recorder.hold(choice)
            maps = neighbours(problem, choice, count=recorder.remaining)
            for start in range(0, len(maps), self.candidates):
                tried = maps[start : start + self.candidates][: recorder.remaining]
                if not len(tried):
                    return
                rewards = recorder.evaluate(tried).reward
                if rewards.max() > best:
                    choice, best = tried[rewards.argmax()], rewards.max()
                    break
            else:
                return

    def _steps(self, problem: Problem, choice: Ints, out: NDArray[np.bool_]) -> Ints:
        """Return the steps of most gain by the surrogate that fit, one a decision, (n, 2).

        A step is a decision and its wider format.
        """
        rate = np.where(out, 0.0, gains_per_bit(problem, choice))
        steps = np.argwhere(rate > 0)
        maps = np.repeat(choice[None], len(steps), axis=0)
        maps[np.arange(len(steps)), steps[:, 0]] = steps[:, 1]
        if len(steps):
            steps = steps[problem.feasible(maps)]
        order = np.argsort(-rate[steps[:, 0], steps[:, 1]], kind="stable")
        steps = steps[order]
        first = np.sort(np.unique(steps[:, 0], return_index=True)[1])
        chosen: Ints = steps[first[: self.candidates]]
        return chosen
