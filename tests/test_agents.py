"""Every agent under the contract, the recorder, and the registry."""

import subprocess
import sys

import numpy as np
import pytest
from factories import make_problem

from dmpq import agents
from dmpq.agents import Agent, OutOfEvaluations, Recorder
from dmpq.agents.base import FINALISTS
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations, SurrogateEvaluator
from dmpq.testing.agent import AgentContract

SIMPLE = ["uniform", "random", "frequency", "greedy", "mckp"]


class _Contract(AgentContract):
    @pytest.fixture
    def problem(self):
        return make_problem()


@pytest.mark.parametrize("agent", SIMPLE, indirect=True)
class TestSimpleAgents(_Contract):
    @pytest.fixture
    def agent(self, request):
        return agents.make(request.param)


class TestUnderManyLimits(TestSimpleAgents):
    @pytest.fixture
    def problem(self):
        base = make_problem().baselines
        return make_problem(
            avg_bits=4.5,
            memory_bytes=base.memory_bytes * 0.9,
            latency_s=base.latency_s * 1.2,
            energy_j=base.energy_j * 1.2,
        )


@pytest.mark.parametrize("serve", ["projection", "layer"])
@pytest.mark.parametrize("name", SIMPLE)
def test_every_granularity(name, serve):
    problem = make_problem(serve=serve)
    result = agents.make(name).search(problem, evaluations=3, seed=0)
    assert problem.feasible(result.assignment[None]).all()


def reward(name, problem, evaluations=16):
    return agents.make(name).search(problem, evaluations=evaluations, seed=0).scores.reward[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_that_the_field_expects(seed):
    """On an additive loss the knapsack is the optimum; greedy is close; ranks and luck are not."""
    problem = make_problem(seed=seed, layers=4, weights="acc=1")
    best = reward("mckp", problem)
    assert best >= reward("greedy", problem) >= 1.1 * best
    assert best > max(reward("frequency", problem), reward("random", problem))
    assert best > reward("uniform", problem)


def test_greedy_skips_formats_on_curves_that_are_not_convex():
    problem = make_problem(layers=1, experts=2, weights="acc=1", avg_bits=4.25)
    problem.sensitivity[:] = [1.0, 0.99, 0.01, 0.0, 0.0]
    result = agents.make("greedy").search(problem, evaluations=1, seed=0)
    np.testing.assert_array_equal(result.assignment, problem.uniform("4"))


def test_frequency_follows_frequency_and_nothing_else():
    problem = make_problem(layers=1, experts=16)
    result = agents.make("frequency").search(problem, evaluations=1, seed=0)
    by_frequency = result.assignment[np.argsort(problem.profile.frequency)]
    assert (np.diff(by_frequency) >= -1).all()
    assert by_frequency[:4].max() <= by_frequency[-4:].min()
    other = make_problem(layers=1, experts=16, weights="lat=1")
    other.sensitivity[:] = 0.0
    same = agents.make("frequency").search(other, evaluations=1, seed=0)
    np.testing.assert_array_equal(result.assignment, same.assignment)


def test_random_spends_the_budget_and_longer_searches_begin_alike():
    problem = make_problem(layers=4)
    short, long = (agents.make("random").search(problem, evaluations=n, seed=1) for n in (5, 9))
    maps = [[c.assignment.tolist() for c in result.history] for result in (short, long)]
    assert maps[1][:5] == maps[0]
    assert min(c.effective_bits for c in long.history) > 2.9


def test_random_ends_where_maps_run_out():
    problem = make_problem(layers=1, experts=1, bits="2,4")
    assert agents.make("random").search(problem, evaluations=50, seed=0).evaluations == 1


def test_uniform_takes_the_widest_that_fits():
    result = agents.make("uniform").search(make_problem(avg_bits=4.5), evaluations=1, seed=0)
    assert (result.assignment == 2).all()


def test_recorder_counts_distinct_maps_only():
    problem = make_problem()
    recorder = Recorder(problem, evaluations=2)
    narrow, wide = problem.uniform("2"), problem.mckp()
    recorder.evaluate(np.stack([narrow, wide, narrow]))
    assert recorder.remaining == 0
    recorder.evaluate(narrow[None])
    with pytest.raises(OutOfEvaluations):
        recorder.evaluate(problem.uniform("3")[None])
    assert [c.evaluation for c in recorder.history] == [1, 2]


def test_recorder_keeps_what_an_agent_changes_afterwards():
    problem = make_problem()
    recorder = Recorder(problem, evaluations=1)
    assignment = problem.uniform("2")
    recorder.evaluate(assignment[None])
    assignment[:] = 4
    assert (recorder.history[0].assignment == 0).all()


def test_a_map_beyond_the_limits_is_never_the_result():
    problem = make_problem(weights="acc=1")
    recorder = Recorder(problem, evaluations=3)
    recorder.evaluate(problem.uniform("16")[None])
    with pytest.raises(InputError, match="none within the limits"):
        recorder.result()
    recorder.evaluate(problem.uniform("2")[None])
    assert (recorder.result().assignment == 0).all()


class Metered(SurrogateEvaluator):
    """A surrogate that meters, caches, and may see things differently."""

    def __init__(self, profile, twist=0.0):
        super().__init__(profile)
        self.twist, self.known = twist, set()

    def evaluate(self, assignments, *, fidelity=1.0):
        found = super().evaluate(assignments)
        keys = {row.tobytes() for row in assignments}
        tokens = 100.0 * len(keys - self.known)
        self.known |= keys
        kl = found.kl + self.twist * (assignments[:, 0] == 0)
        return Evaluations(kl, found.nll, found.router_shift, tokens)


def test_tokens_of_evaluations_and_of_the_selection_are_counted():
    plain = make_problem()
    problem = make_problem(evaluator=Metered(plain.profile), selector=Metered(plain.profile))
    result = agents.make("random").search(problem, evaluations=20, seed=0)
    assert result.tokens == 100 * 20 + 100 * FINALISTS
    assert result.scores.tokens == 0


def test_the_selector_decides_among_finalists():
    plain = make_problem(layers=1, experts=4, weights="acc=1")
    first, second = plain.mckp(), plain.mckp()
    first[0], second[0] = 0, 1
    second[1:] = 0
    maps = np.stack([first, second])
    assert plain.feasible(maps).all()
    for selector, expected in ((None, np.argmin(plain.evaluate(maps).kl)), (9.0, 1)):
        chosen = None if selector is None else Metered(plain.profile, twist=selector)
        problem = make_problem(layers=1, experts=4, weights="acc=1", selector=chosen)
        recorder = Recorder(problem, evaluations=2)
        recorder.evaluate(maps)
        np.testing.assert_array_equal(recorder.result().assignment, maps[expected])


def test_no_evaluations_is_refused():
    with pytest.raises(InputError, match="allow 1 or more"):
        agents.make("mckp").search(make_problem(), evaluations=0, seed=0)


class NotAnAgent:
    """Has no search."""


class Mine:
    """A user's agent, made by module:Class."""

    name = "mine"

    def __init__(self, *, option=1):
        self.option = option

    def search(self, problem, *, evaluations, seed, on_candidate=None):
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        recorder.evaluate(problem.mckp()[None])
        return recorder.result()


@pytest.fixture
def here(monkeypatch):
    """Let this module be found by a name."""
    monkeypatch.setitem(sys.modules, "my_agents", sys.modules[__name__])


def test_a_users_agent(here):
    agent = agents.make("my_agents:Mine", option=3)
    assert isinstance(agent, Agent)
    assert agent.option == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pp0", "did you mean 'ppo'"),
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("my_agents:Mien", "did you mean 'Mine'"),
        ("my_agents:NotAnAgent", "is no agent"),
        (":Mine", "cannot be imported"),
    ],
)
def test_what_is_no_agent_is_refused(here, name, message):
    with pytest.raises(InputError, match=message):
        agents.make(name)


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match="cannot be made"):
        agents.make("mckp", depth=3)


def test_importing_agents_imports_no_torch():
    code = "import sys, dmpq.agents; dmpq.agents.make('mckp'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
