"""The contract of an agent, as a test class to inherit."""

from __future__ import annotations

import numpy as np
import pytest

from dmpq.agents import Agent, Candidate
from dmpq.envs.generator import make_problem
from dmpq.problem import Problem


class AgentContract:
    """Inherit, override the ``agent`` fixture, and every test below runs on your agent.

    Example:
        >>> class TestMine(AgentContract):
        ...     @pytest.fixture
        ...     def agent(self) -> Agent:
        ...         return MyAgent()
    """

    evaluations = 12

    @pytest.fixture
    def agent(self) -> Agent:
        """The agent under test; override."""
        raise NotImplementedError("Override the agent fixture with your agent.")

    @pytest.fixture
    def problem(self) -> Problem:
        """The problem to search; the bundled profile, at 3 effective bits."""
        return make_problem()

    def test_is_an_agent(self, agent: Agent) -> None:
        """It has the interface's members."""
        assert isinstance(agent, Agent)
        assert agent.name

    def test_returns_the_best_map_ever_seen(self, agent: Agent, problem: Problem) -> None:
        """Not the last: no feasible map in the history beats the one returned."""
        result = agent.search(problem, evaluations=self.evaluations, seed=0)
        best = max(candidate.reward for candidate in result.history if candidate.feasible)
        assert result.scores.reward[0] == best
        assert problem.evaluate(result.assignment[None]).reward[0] == best

    def test_meets_every_limit(self, agent: Agent, problem: Problem) -> None:
        """The result, and each map tried on the way, is within the limits."""
        result = agent.search(problem, evaluations=self.evaluations, seed=0)
        tried = np.array([candidate.assignment for candidate in result.history])
        assert problem.feasible(result.assignment[None]).all()
        assert problem.feasible(tried).all()

    def test_same_seed_same_search(self, agent: Agent, problem: Problem) -> None:
        """Every map, in order, and so the result."""
        first, again = (
            agent.search(problem, evaluations=self.evaluations, seed=5) for _ in range(2)
        )
        maps = [[c.assignment.tolist() for c in result.history] for result in (first, again)]
        assert maps[0] == maps[1]
        assert first.assignment.tolist() == again.assignment.tolist()

    @pytest.mark.parametrize("evaluations", [1, 2, 12])
    def test_counts_evaluations_and_never_exceeds_them(
        self, agent: Agent, problem: Problem, evaluations: int
    ) -> None:
        """Distinct maps, each counted once."""
        result = agent.search(problem, evaluations=evaluations, seed=0)
        distinct = {tuple(candidate.assignment.tolist()) for candidate in result.history}
        assert 1 <= result.evaluations <= evaluations
        assert result.evaluations == len(result.history) == len(distinct)

    def test_reports_every_candidate_in_order(self, agent: Agent, problem: Problem) -> None:
        """Through ``on_candidate``, numbered from 1."""
        reported: list[Candidate] = []
        result = agent.search(
            problem, evaluations=self.evaluations, seed=0, on_candidate=reported.append
        )
        assert tuple(reported) == result.history
        assert [c.evaluation for c in reported] == list(range(1, len(reported) + 1))
