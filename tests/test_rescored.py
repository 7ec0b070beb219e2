"""Re-scoring: rules that add up measure again around their best map."""

import numpy as np
import pytest
from factories import make_problem
from test_programs import PROGRAMS, WITH_MODEL
from test_searchers import entangled_problem

from dmpq import agents
from dmpq.agents.additive import AdditiveAgent, objective
from dmpq.errors import InputError
from dmpq.testing.agent import AgentContract

ADDITIVE = [name for name in agents.names() if issubclass(agents.find(name), AdditiveAgent)]
FROM_PROFILE = [name for name in ADDITIVE if name not in WITH_MODEL]


@pytest.mark.parametrize("agent", ["mckp", "greedy", "pmq-paper", "mxmoe"], indirect=True)
class TestRescored(AgentContract):
    @pytest.fixture
    def agent(self, request):
        return agents.make(request.param, rescore=2)

    @pytest.fixture
    def problem(self):
        return make_problem()


def test_programs_and_rules_that_add_up_can_be_re_scored_and_rankings_cannot():
    assert {*PROGRAMS, *WITH_MODEL, "mckp", "greedy", "frequency", "moqa"} <= {*ADDITIVE}
    rankings = {"uniform", "uniform-fractional", "frequency-layer", "router-norm", "ppo"}
    assert not rankings & {*ADDITIVE}


@pytest.mark.parametrize("name", FROM_PROFILE)
def test_without_rounds_a_rule_is_its_one_map(name):
    problem = entangled_problem()
    result = agents.make(name, rescore=0).search(problem, evaluations=30, seed=0)
    assert result.evaluations == 1
    np.testing.assert_array_equal(result.assignment, agents.make(name).propose(problem))


@pytest.mark.parametrize("name", FROM_PROFILE)
def test_re_scoring_starts_at_the_rule_s_map_and_never_ends_below_it(name):
    problem = entangled_problem()
    own = agents.make(name).search(problem, evaluations=1, seed=0)
    found = agents.make(name, rescore=2).search(problem, evaluations=40, seed=0)
    np.testing.assert_array_equal(found.history[0].assignment, own.assignment)
    assert found.scores.reward[0] >= own.scores.reward[0]
    assert 1 < found.evaluations <= 40


@pytest.mark.parametrize("name", ["mckp", "greedy", "gemq", "frequency", "weight-norm"])
def test_measured_steps_close_most_of_what_a_rule_misses(name):
    """Brute force knows the best of all 6,561 maps."""
    problem = entangled_problem()
    maps = np.indices((3,) * 8).reshape(8, -1).T
    optimum = problem.evaluate(maps[problem.feasible(maps)]).reward.max()
    own = agents.make(name).search(problem, evaluations=1, seed=0).scores.reward[0]
    found = agents.make(name, rescore=3).search(problem, evaluations=64, seed=0)
    assert found.scores.reward[0] - own >= 0.6 * (optimum - own)


def test_where_the_loss_adds_up_the_knapsack_stays():
    problem = make_problem(weights="acc=1")
    own = agents.make("mckp").propose(problem)
    result = agents.make("mckp", rescore=2).search(problem, evaluations=40, seed=0)
    np.testing.assert_array_equal(result.assignment, own)


def test_rounds_share_the_evaluations():
    problem = entangled_problem(layers=2, experts=16, bits="2,3,4,8,16")
    ends = []
    for rounds in (1, 2, 4):
        result = agents.make("mckp", rescore=rounds).search(problem, evaluations=30, seed=0)
        ends.append(result.scores.reward[0])
        assert result.evaluations <= 30
        assert ends[-1] >= result.history[0].reward
    assert len(set(ends)) > 1


@pytest.mark.parametrize("serve", ["projection", "layer"])
@pytest.mark.parametrize("name", ["mckp", "pmq-code", "frequency"])
def test_every_granularity_under_every_limit(name, serve):
    base = make_problem().baselines
    problem = make_problem(
        serve=serve,
        unhit=2,
        avg_bits=4.5,
        memory_bytes=base.memory_bytes * 0.9,
        latency_s=base.latency_s * 1.2,
    )
    result = agents.make(name, rescore=2).search(problem, evaluations=9, seed=0)
    tried = np.array([one.assignment for one in result.history])
    assert problem.feasible(tried).all()


def test_the_objective_takes_damages_in_place_of_sensitivities():
    problem = make_problem()
    plain = problem.linear_values(np.zeros(problem.num_decisions))
    np.testing.assert_array_equal(objective(problem, problem.sensitivity), plain)
    log_importance = np.linspace(-1, 1, problem.num_decisions)
    np.testing.assert_allclose(
        objective(problem, problem.sensitivity * np.exp(log_importance)[:, None]),
        problem.linear_values(log_importance),
        rtol=1e-12,
    )


def test_what_costs_more_than_one_map_says_so():
    assert agents.make("gemq").cost == "1"
    assert agents.make("gemq", rescore=1).cost == "all"
    assert agents.find("gemq").cost == "1"


@pytest.mark.parametrize("rounds", [-1, 1.5, True, None])
def test_rounds_are_a_count(rounds):
    for name in ("mckp", "mxmoe", "mopeq-layer"):
        with pytest.raises(InputError, match="counts rounds"):
            agents.make(name, rescore=rounds)


@pytest.mark.parametrize("name", ["moqa", "mopeq-layer", "mopeq-model"])
def test_a_map_free_of_a_budget_has_no_values_to_measure_again(name):
    with pytest.raises(InputError, match="leave one of the two out"):
        agents.make(name, rescore=1, budget_free=True)
