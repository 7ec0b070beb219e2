"""What every agent shares: the interface, candidates, and the recorder that counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.evaluation import Assignments, Evaluations, Evaluator
from dmpq.problem import Problem, Scores

if TYPE_CHECKING:
    from dmpq.agents.policy import Policy

FINALISTS: Final = 8
"""Maps that are measured again on the selector's text."""

T = TypeVar("T")

OnCandidate = Callable[["Candidate"], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One evaluated map.

    Attributes:
        assignment: (D,), menu index of each decision.
        reward: What the search maximises; ``-inf`` where the loss is not finite.
        kl: Nats per token.
        nll: Nats per token.
        router_shift: Share of token-expert selections changed; NaN where no model ran.
        effective_bits: Stored bits per expert weight.
        feasible: Whether every limit is met.
        evaluation: Its number, from 1.
        text: The further text that it was evaluated on; ``None`` for the search's own. Scores on
            other texts compare with those of that text alone.
        spent: What the search had taken then, in evaluations.
        tokens: What it had cost, in forwarded tokens.
    """

    assignment: NDArray[np.int64]
    reward: float
    kl: float
    nll: float
    router_shift: float
    effective_bits: float
    feasible: bool
    evaluation: int
    text: int | None = None
    spent: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        assignment: The chosen map, (D,).
        scores: Its scores on the search's text, K = 1.
        history: Every map evaluated, in order; on the search's own text, or on a further one.
        evaluations: Number of distinct maps evaluated on the search's own text.
        tokens: What the evaluations and the final choice cost, in forwarded tokens.
        policy: A policy that was learned on the way, if any.
    """

    assignment: NDArray[np.int64]
    scores: Scores
    history: tuple[Candidate, ...]
    evaluations: int
    tokens: float
    policy: Policy | None = None


@runtime_checkable
class Agent(Protocol):
    """Searches for a bit map.

    ``python -m dmpq.compare`` also knows, where an agent has them: ``cost``, ``"1"`` where it
    evaluates one map, so that what it may spend pays for a larger profile; ``reads``, what it
    needs of a profile: ``"sensitivities"``, which is taken for granted, only ``"gradients"``, or
    ``"nothing"``; ``forwards``, those of the search text
    that its own signal takes; ``control()``, the same agent that learns nothing.
    """

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map ever seen, never merely the last.

        Args:
            problem: What to search.
            evaluations: Number of distinct maps that may be evaluated.
            seed: The same seed gives the same result.
            on_candidate: Called with every map evaluated, in order.
        """
        ...


class OneMapAgent(ABC):
    """Base of the rules that propose one map and search no further: one evaluation."""

    name: ClassVar[str]

    @abstractmethod
    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the rule's map, (D,), within every limit."""

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Evaluate the rule's map; see :meth:`Agent.search`. Nothing depends on the seed."""
        del seed
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        recorder.evaluate(recorder.metered(lambda: self.propose(problem))[None])
        return recorder.result()


class _AtFidelity:
    """An evaluator that reads a share of another's text."""

    def __init__(self, inner: Evaluator, fidelity: float) -> None:
        self.name = inner.name
        self._inner = inner
        self._fidelity = fidelity

    @property
    def tokens(self) -> int:
        return round(self._fidelity * self._inner.tokens)

    @property
    def tokens_spent(self) -> float:
        return self._inner.tokens_spent

    def evaluate(self, assignments: Assignments, *, fidelity: float = 1.0) -> Evaluations:
        return self._inner.evaluate(assignments, fidelity=fidelity * self._fidelity)

    def hold(self, assignment: Assignments) -> None:
        self._inner.hold(assignment)


class OutOfEvaluations(Exception):  # noqa: N818  # control flow, like StopIteration
    """A new map was to be evaluated after the budget was spent."""


class Recorder:
    """Evaluates maps for an agent: counts distinct ones, never more than allowed, and keeps all.

    A map met before is free: it does not count, and the evaluator knows its answer. Where
    measurements change the costs, :meth:`result` may evaluate one map beyond what is allowed.

    Where the problem limits tokens, these are counted instead of evaluations: maps that resume
    from a held one are cheaper, so that more of them may be evaluated. What the final choice may
    cost is kept back.

    Args:
        problem: What is searched.
        evaluations: Number of distinct maps that may be evaluated.
        on_candidate: Called with every new map.

    Attributes:
        finalists: Maps that are measured again on the selector's text.

    Raises:
        InputError: If no evaluation is allowed.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        evaluations: int,
        on_candidate: OnCandidate | None = None,
    ) -> None:
        if evaluations < 1:
            raise InputError(f"A search with {evaluations} evaluations is none; allow 1 or more.")
        self._problem = problem
        self._allowed = evaluations
        self.finalists = FINALISTS
        self._on_candidate = on_candidate
        self._seen: set[tuple[bytes, int | None]] = set()
        self._history: list[Candidate] = []
        self._nominated: list[bytes] = []
        self._partly: dict[tuple[bytes | None, str], float] = {}
        self._tokens = 0.0

    @property
    def history(self) -> tuple[Candidate, ...]:
        """Every map evaluated so far, in order."""
        return tuple(self._history)

    @property
    def remaining(self) -> int:
        """Distinct maps that may still be evaluated; those screened have taken their share."""
        return max(0, math.floor(round(self.left, 9)))

    @property
    def left(self) -> float:
        """What may still be read, in whole evaluations."""
        if (affordable := self._affordable) is not None:
            return affordable
        return self._allowed - self._spent

    @property
    def _spent(self) -> float:
        """What was read, in whole evaluations."""
        return len(self._own) + sum(self._partly.values())

    @property
    def _own(self) -> list[Candidate]:
        """Maps evaluated on the search's own text."""
        return [candidate for candidate in self._history if candidate.text is None]

    @property
    def _affordable(self) -> float | None:
        """Whole forwards of the text that are left; ``None`` where evaluations are counted."""
        problem = self._problem
        if problem.max_tokens is None or not (whole := problem.evaluator.tokens):
            return None
        choice = 0 if problem.selector is None else (self.finalists + 1) * problem.selector.tokens
        first = 0 if self._tokens else whole  # the full-precision forward
        return (problem.max_tokens - self._tokens - choice - first) / whole

    def evaluate(self, assignments: NDArray[np.integer]) -> Scores:
        """Return the scores of maps (K, D), and record the new ones.

        Raises:
            OutOfEvaluations: If there are more new maps than evaluations left; none is evaluated.
        """
        maps = np.asarray(assignments, np.int64)
        new = {row.tobytes() for row in maps if (row.tobytes(), None) not in self._seen}
        if len(new) > self.remaining:
            raise OutOfEvaluations
        scores = self._problem.evaluate(maps)
        self._tokens += scores.tokens
        self._record_new(maps, scores)
        return scores

    def screen(self, assignments: NDArray[np.integer], *, fidelity: float) -> NDArray[np.float64]:
        """Return the rewards of maps (K, D) on a share of the text, (K,).

        They are no candidates and in no history. A map counts as its share of an evaluation the
        first time, so that searches which screen read no more text than those which do not.

        Args:
            assignments: (K, D), the maps.
            fidelity: Share of the text, above 0 and at most 1.

        Raises:
            OutOfEvaluations: If that is more than the evaluations left; none is screened.
        """
        evaluator = _AtFidelity(self._problem.evaluator, fidelity)
        name = f"fidelity {fidelity}"
        return self._partly_scored(assignments, evaluator, name, share=fidelity).reward

    def read(self, assignments: NDArray[np.integer], *, text: int) -> Scores:
        """Return the scores of maps (K, D) on a further text, and record the new ones.

        A map counts as the text's share of an evaluation the first time, and so does full
        precision, to which it is compared. None of them can be the result: that is chosen among
        maps evaluated on the search's own text.

        Args:
            assignments: (K, D), the maps.
            text: Which of the problem's further texts.

        Raises:
            OutOfEvaluations: If that is more than the evaluations left; none is evaluated.
        """
        evaluator, name = self._problem.further[text], f"text {text}"
        share = self._share_of(evaluator)
        scores = self._partly_scored(assignments, evaluator, name, share=share, full=True)
        self._record_new(np.asarray(assignments, np.int64), scores, text)
        return scores

    @cached_property
    def further_share(self) -> float:
        """What a map on a further text counts, in evaluations; 1 where there is no such text."""
        further = self._problem.further
        return self._share_of(further[0]) if further else 1.0

    def _share_of(self, evaluator: Evaluator) -> float:
        whole = self._problem.evaluator.tokens
        return evaluator.tokens / whole if whole else 1.0

    def _partly_scored(
        self,
        assignments: NDArray[np.integer],
        evaluator: Evaluator,
        name: str,
        *,
        share: float,
        full: bool = False,
    ) -> Scores:
        """Return the scores of maps (K, D) on other text than an evaluation's; count the new.

        Args:
            assignments: (K, D), the maps.
            evaluator: On that text.
            name: Of the text.
            share: What a map counts there, in evaluations.
            full: Whether full precision counts as a map.
        """
        maps = np.asarray(assignments, np.int64)
        asked = [*((None, name) for _ in range(full)), *((row.tobytes(), name) for row in maps)]
        new = {key: share for key in asked if key not in self._partly}
        if new and round(self.left - sum(new.values()), 9) < 0:
            raise OutOfEvaluations
        self._partly |= new
        scores = self._problem.evaluate(maps, evaluator)
        self._tokens += scores.tokens
        return scores

    def hold(self, assignment: NDArray[np.integer], *, text: int | None = None) -> None:
        """Expect the next maps to be near this one (D,); see :meth:`Evaluator.hold`.

        What it costs is counted; it is no evaluation.

        Args:
            assignment: The map.
            text: The further text that they are read on; ``None`` for the search's own.
        """
        expanded = self._problem.expand(np.asarray(assignment)[None])[0]
        evaluator = self._problem.evaluator if text is None else self._problem.further[text]
        self.metered(lambda: evaluator.hold(expanded), evaluator)

    def metered(self, work: Callable[[], T], evaluator: Evaluator | None = None) -> T:
        """Return what some work returns, and count what it costs on an evaluator's model.

        Args:
            work: What is done.
            evaluator: Whose model; ``None`` for the problem's own evaluator.
        """
        evaluator = self._problem.evaluator if evaluator is None else evaluator
        before = evaluator.tokens_spent
        done = work()
        self._tokens += evaluator.tokens_spent - before
        return done

    def nominate(self, assignment: NDArray[np.integer]) -> None:
        """Let an evaluated map (D,) be a finalist whatever its score; the last ones count.

        The best scores of a long search are lucky ones. What an agent believes in, such as the
        mean of what it has learned, deserves a measurement on fresh text beside them.
        """
        key = np.asarray(assignment, np.int64).tobytes()
        self._nominated = [*(other for other in self._nominated if other != key), key]

    def _record_new(
        self, maps: NDArray[np.int64], scores: Scores, text: int | None = None
    ) -> None:
        """Record those of some maps, (K, D), that were not evaluated on a text before."""
        for i, row in enumerate(maps):
            if (row.tobytes(), text) not in self._seen:
                self._record(row.copy(), scores, i, text)

    def _record(
        self, assignment: NDArray[np.int64], scores: Scores, i: int, text: int | None = None
    ) -> None:
        self._seen.add((assignment.tobytes(), text))
        candidate = Candidate(
            assignment=assignment,
            reward=float(scores.reward[i]),
            kl=float(scores.kl[i]),
            nll=float(scores.nll[i]),
            router_shift=float(scores.router_shift[i]),
            effective_bits=float(scores.effective_bits[i]),
            feasible=bool(scores.feasible[i]),
            evaluation=len(self._history) + 1,
            text=text,
            spent=self._spent + (text is None),
            tokens=self._tokens,
        )
        self._history.append(candidate)
        if self._on_candidate is not None:
            self._on_candidate(candidate)

    def result(self, *, policy: Policy | None = None) -> SearchResult:
        """Return the best feasible map ever seen; of equals, the first.

        With a selector, the first map, the nominated and the best are measured on its text, and
        the reward there decides: the search has chosen its best on its own text, so that only
        fresh text judges them fairly. Where measurements have put every map beyond a limit, one
        more is evaluated; ``python -m dmpq.search`` keeps an evaluation for it.

        Raises:
            InputError: If no map within the limits was evaluated.
        """
        if not self._problem.hardware.deterministic:
            self._price_again()
            if not any(candidate.feasible for candidate in self._own):
                self._bring_within_limits()
        feasible = [candidate for candidate in self._own if candidate.feasible]
        if not feasible:
            raise InputError(
                f"The agent evaluated {len(self._own)} maps, none within the limits; let it "
                "propose maps by problem.project() or problem.propose()."
            )
        ranked = sorted(feasible, key=lambda candidate: -candidate.reward)
        best = ranked[0]
        selector = self._problem.selector
        if selector is not None:
            best = self._select(self._chosen(ranked, feasible[0]), selector)
        scores = self._problem.evaluate(best.assignment[None])
        return SearchResult(
            assignment=best.assignment,
            scores=scores,
            history=self.history,
            evaluations=len(self._own),
            tokens=self._tokens,
            policy=policy,
        )

    def _price_again(self) -> None:
        """Score what may be chosen at today's costs: measurements may have changed them since."""
        own = self._own
        known = self._problem.evaluate(np.array([one.assignment for one in own]))
        today = {
            one.evaluation: replace(one, reward=float(reward), feasible=bool(feasible))
            for one, reward, feasible in zip(own, known.reward, known.feasible, strict=True)
        }
        self._history = [today.get(one.evaluation, one) for one in self._history]

    def _bring_within_limits(self) -> None:
        """Evaluate one map more: the best one, changed as little as today's costs ask for.

        Maps that use a limit up exceed it as soon as a measurement raises the costs a little.
        """
        problem = self._problem
        if not problem.projection.possible:
            return
        best = max(self._own, key=lambda candidate: candidate.reward)
        values = problem.linear_values()
        values[np.arange(len(values)), best.assignment] -= np.ptp(values)
        found = problem.project(values)
        scores = problem.evaluate(found[None])
        self._tokens += scores.tokens
        self._on_candidate = None  # a measurement would change the costs again
        self._record(found, scores, 0)

    def _chosen(self, ranked: list[Candidate], first: Candidate) -> list[Candidate]:
        by_key = {candidate.assignment.tobytes(): candidate for candidate in ranked}
        nominated = [by_key[key] for key in self._nominated if key in by_key]
        chosen = [first, *nominated[-(self.finalists // 2) :], *ranked]
        distinct = {candidate.evaluation: candidate for candidate in chosen}
        return list(distinct.values())[: self.finalists]

    def _select(self, finalists: list[Candidate], selector: Evaluator) -> Candidate:
        """Return the finalist of the best reward on the selector's text; of equals, the first."""
        maps = np.array([candidate.assignment for candidate in finalists])
        fresh = self._problem.evaluate(maps, selector)
        self._tokens += fresh.tokens
        return finalists[int(fresh.reward.argmax())]
