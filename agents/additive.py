"""Rules that add up what each format costs: values, a program on them, and re-scoring."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, OneMapAgent, Recorder, SearchResult
from dmpq.agents.loss_fit import fitted
from dmpq.agents.neighbours import neighbours
from dmpq.agents.programs import layer_of_decision
from dmpq.errors import InputError
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK: Final = 8
"""Steps that are measured in one call."""


@dataclass(frozen=True, kw_only=True)
class AdditiveAgent(OneMapAgent):
    """Base of the rules whose map is the best for a sum of values, one for each format.

    By itself such a rule evaluates its one map. With ``rescore``, it then does what GEMQ calls
    progressive (arXiv 2605.23078, section 3.3): costs are measured again on the model quantized
    with the last map, and the program is solved again. Here they are measured as true losses of
    maps one step from the best map so far (:mod:`dmpq.agents.neighbours`), those in doubt first,
    each round its share of the evaluations. Steps that were not measured keep the rule's values,
    in the unit that fits those that were (:mod:`dmpq.agents.loss_fit`). The best map ever
    measured is returned.

    Attributes:
        rescore: Rounds of re-scoring; with 0, the rule's one map is evaluated.

    Raises:
        InputError: If ``rescore`` is no whole number of 0 or more.
    """

    rescore: int = 0

    def __post_init__(self) -> None:
        if type(self.rescore) is not int or self.rescore < 0:
            raise InputError(
                f"rescore is {self.rescore!r}; it counts rounds: a whole number, 0 or more."
            )
        if self.rescore:
            # The class says what its one map costs; comparisons must not take this for one.
            object.__setattr__(self, "cost", "all")

    @abstractmethod
    def values(self, problem: Problem) -> Floats:
        """Return what each format is taken to add to the loss, in the rule's unit, (D, B)."""

    def solve(self, problem: Problem, values: Floats) -> Ints:
        """Return the rule's map for such values, (D,), within every limit."""
        return problem.project(values)

    def propose(self, problem: Problem) -> Ints:
        """Return the rule's map, (D,), within every limit."""
        return self.solve(problem, self.values(problem))

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Evaluate the rule's map, and re-score; see :meth:`dmpq.agents.Agent.search`.

        Nothing depends on the seed.
        """
        if not self.rescore:
            return super().search(
                problem, evaluations=evaluations, seed=seed, on_candidate=on_candidate
            )
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        values = recorder.metered(lambda: self.values(problem))
        best = self.solve(problem, values)
        reward = recorder.evaluate(best[None]).reward[0]
        for rounds_left in range(self.rescore, 0, -1):
            # One evaluation is for the map that the round finds.
            least = recorder.left * (1 - 1 / rounds_left) + 1
            values = self._rescored(problem, values, best, recorder, least)
            found = self.solve(problem, values)
            if not recorder.remaining:
                break
            scored = recorder.evaluate(found[None]).reward[0]
            if scored > reward:
                best, reward = found, scored
        return recorder.result()

    def _rescored(
        self, problem: Problem, values: Floats, centre: Ints, recorder: Recorder, least: float
    ) -> Floats:
        """Return the values that single steps from a map speak for, nats per token, (D, B).

        Args:
            problem: What is searched.
            values: (D, B), those so far, in any unit.
            centre: (D,), an evaluated map.
            recorder: Evaluates the steps.
            least: Evaluations to be left.
        """
        if recorder.left < least + 1:
            return values
        steps = neighbours(problem, centre, count=2 * problem.num_decisions, values=values)
        recorder.hold(centre)
        measured = 0
        while measured < len(steps) and (fit := int(recorder.left - least)) > 0:
            chunk = steps[measured : measured + min(_CHUNK, fit)]
            recorder.evaluate(chunk)
            measured += len(chunk)
        if not measured:
            return values
        maps = steps[:measured]
        # All of them are known by now, so that these answers are free.
        kl = recorder.evaluate(np.concatenate([centre[None], maps])).kl
        layers = layer_of_decision(problem)
        return fitted(centre, values, maps, kl[1:] - kl[0], layers=layers).values


def objective(problem: Problem, damage: Floats) -> Floats:
    """Return the linearised negative reward of formats, (D, B), where damages are these.

    Args:
        problem: What is searched.
        damage: (D, B), nats per token, in place of the profile's sensitivities.
    """
    more = (damage - problem.sensitivity) * (problem.weights.acc / problem.baselines.damage)
    return problem.linear_values(np.zeros(problem.num_decisions)) + more


def refuse_rescoring(agent: AdditiveAgent, *, where: bool, option: str) -> None:
    """Refuse to re-score a map that comes from no values.

    Args:
        agent: The rule.
        where: Whether its options say so.
        option: The one that does.

    Raises:
        InputError: If it is to be re-scored nevertheless.
    """
    if where and agent.rescore:
        raise InputError(
            f"rescore is {agent.rescore}, but with {option} the map of {agent.name!r} comes from "
            "no values that could be measured again; leave one of the two out."
        )
