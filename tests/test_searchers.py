"""The searchers of other fields: each is an agent, and finds what the surrogate does not know."""

from __future__ import annotations

import random
import sys
from itertools import product

import numpy as np
import pytest
import torch
from factories import make_problem

from dmpq import agents
from dmpq.agents import OutOfEvaluations, Recorder
from dmpq.agents.steps import stepped
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations
from dmpq.testing.agent import AgentContract

LEARNERS = {
    "a2c": {"episodes": 24},
    "dqn": {"episodes": 24},
    "recurrent-ppo": {"episodes": 24, "episodes_per_update": 8, "hidden": 16},
}
SEARCHERS = {
    "evopress": {},
    "bandit": {},
    "greedy-true": {},
    "clado": {},
    "nsga2": {},
    **LEARNERS,
}


def make(name, **options):
    if name == "nsga2":
        pytest.importorskip("pymoo")
    return agents.make(name, **(SEARCHERS[name] | options))


class Entangled:
    """A loss with interactions: importances that the profile misjudges, and pairs that add up."""

    name = "entangled"

    def __init__(self, profile):
        rng = np.random.default_rng(1)
        self.loss = profile.sensitivity * np.exp(rng.normal(0, 0.8, (len(profile.sensitivity), 1)))
        self.full_nll = profile.full_nll
        self.tokens_spent = 0.0
        self.asked = []

    def evaluate(self, assignments, *, fidelity=1.0):
        maps = np.atleast_2d(assignments)
        self.asked.append((fidelity, maps.copy()))
        own = self.loss[np.arange(len(self.loss)), maps]
        kl = own.sum(1) + 2 * np.sqrt(own[:, :-1] * own[:, 1:]).sum(1)
        self.tokens_spent += fidelity * len(maps)
        return Evaluations(kl, self.full_nll + kl, np.zeros(len(maps)), fidelity * len(maps))

    def hold(self, assignment):
        """Do nothing: answers are free."""


def entangled_problem(**options):
    options = {"layers": 1, "experts": 8, "bits": "2,3,4", "weights": "acc=1", **options}
    plain = make_problem(**options)
    return make_problem(evaluator=Entangled(plain.profile), **options)


@pytest.mark.parametrize("agent", SEARCHERS, indirect=True)
class TestSearchers(AgentContract):
    @pytest.fixture
    def problem(self):
        return make_problem()

    @pytest.fixture
    def agent(self, request):
        return make(request.param)


@pytest.mark.parametrize("agent", SEARCHERS, indirect=True)
class TestUnderManyLimits:
    """Every map tried meets limits that add up, and limits that do not."""

    test_meets_every_limit = AgentContract.test_meets_every_limit
    evaluations = 12

    @pytest.fixture
    def agent(self, request):
        return make(request.param)

    @pytest.fixture
    def problem(self):
        base = make_problem().baselines
        return make_problem(
            avg_bits=4.5,
            memory_bytes=base.memory_bytes * 0.9,
            latency_s=base.latency_s * 1.2,
            energy_j=base.energy_j * 1.2,
        )


@pytest.mark.parametrize("name", SEARCHERS)
def test_leaves_the_callers_generators_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    make(name).search(make_problem(), evaluations=3, seed=9)
    assert (torch.get_rng_state() == before[0]).all()
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


@pytest.mark.parametrize("serve", ["projection", "layer"])
@pytest.mark.parametrize("name", SEARCHERS)
def test_every_granularity(name, serve):
    problem = make_problem(serve=serve)
    result = make(name).search(problem, evaluations=4, seed=0)
    assert problem.feasible(result.assignment[None]).all()


@pytest.mark.parametrize("name", SEARCHERS)
def test_finds_what_the_surrogate_does_not_know(name):
    """Of 6,561 maps, brute force knows the best; 64 evaluations close most of the way to it."""
    problem = entangled_problem()
    maps = np.array([*product(range(3), repeat=8)])
    optimum = problem.evaluate(maps[problem.feasible(maps)]).reward.max()
    result = make(name).search(problem, evaluations=64, seed=0)
    start, end = _start(name, problem, result), result.scores.reward[0]
    assert start < end <= optimum
    assert end - start >= 0.5 * (optimum - start)


def _start(name, problem, result):
    """Return the reward of a search's first map; of a learner, of its untrained policy's."""
    if name not in LEARNERS:
        return result.history[0].reward
    few = "episodes_per_update" if name == "recurrent-ppo" else "fresh"
    untrained = make(name, **{"episodes": 1, few: 1})
    return untrained.search(problem, evaluations=1, seed=0).scores.reward[0]


@pytest.mark.parametrize("name", ["bandit", "greedy-true"])
def test_the_start_is_a_good_map(name):
    problem = entangled_problem()
    first = make(name).search(problem, evaluations=10, seed=0).history[0]
    rule = agents.make("mckp" if name == "bandit" else "greedy")
    np.testing.assert_array_equal(first.assignment, rule.propose(problem))


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_problem_with_few_maps_ends(name):
    problem = make_problem(layers=1, experts=2, bits="2,4")
    assert make(name).search(problem, evaluations=50, seed=0).evaluations <= 4


def test_screening_counts_as_its_share():
    problem = entangled_problem()
    recorder = Recorder(problem, evaluations=3)
    maps = np.stack([problem.mckp(), problem.uniform("2")])
    recorder.screen(maps, fidelity=0.5)
    assert recorder.remaining == 2
    assert recorder.history == ()
    recorder.screen(maps, fidelity=0.5)
    assert recorder.remaining == 2
    recorder.screen(maps[:1], fidelity=0.25)
    assert recorder.remaining == 1
    with pytest.raises(OutOfEvaluations):
        recorder.screen(maps, fidelity=0.9)
    recorder.evaluate(maps[:1])
    assert recorder.remaining == 0
    assert {fidelity for fidelity, _ in problem.evaluator.asked} == {0.25, 0.5, 1.0}
    assert recorder.result().tokens == problem.evaluator.tokens_spent - 1


@pytest.mark.parametrize("evaluations", [7, 64])
def test_evopress_reads_no_more_than_its_evaluations(evaluations):
    problem = entangled_problem()
    make("evopress").search(problem, evaluations=evaluations, seed=0)
    read = {(f, one.tobytes()) for f, maps in problem.evaluator.asked for one in maps}
    assert sum(fidelity for fidelity, _ in read) <= evaluations
    screened = [fidelity for fidelity, _ in read if fidelity < 1]
    assert bool(screened) == (evaluations > 1)


def test_evopress_keeps_what_is_stored_where_steps_are_equal():
    problem = entangled_problem()
    result = make("evopress").search(problem, evaluations=30, seed=0)
    stored = [candidate.effective_bits for candidate in result.history]
    np.testing.assert_allclose(stored, stored[0])


def test_nsga2_leaves_a_better_front_than_random_maps():
    problem = entangled_problem()
    result = make("nsga2").search(problem, evaluations=48, seed=0)
    points = np.array([(one.kl, one.effective_bits) for one in result.history])
    every = np.array([*product(range(3), repeat=problem.num_decisions)])
    every = every[problem.feasible(every)]
    worst = np.array([problem.evaluate(every).kl.max(), problem.effective_bits(every).max()])
    from pymoo.indicators.hv import HV

    covered = HV(ref_point=[1.01, 1.01])
    for seed in range(10):
        maps = np.random.default_rng(seed).choice(every, len(points), replace=False)
        drawn = np.stack([problem.evaluate(maps).kl, problem.effective_bits(maps)], axis=1)
        assert covered(points / worst) > covered(drawn / worst)
    beaten = (points[:, None] >= points).all(2) & (points[:, None] > points).any(2)
    front = points[~beaten.any(1)]
    assert np.ptp(front[:, 1]) > 0.8 * np.ptp(points[:, 1])


def test_nsga2_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(InputError, match=r"dmpq\[search\]"):
        agents.make("nsga2").search(make_problem(), evaluations=4, seed=0)


def test_steps_follow_the_size():
    sizes = np.array([[3, 1, 2], [1, 2, 3], [5, 6, 4]])
    assert stepped(sizes, np.array([2, 2, 2]), 1).tolist() == [0, -1, 0]
    assert stepped(sizes, np.array([2, 2, 2]), -1).tolist() == [1, 1, -1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("evopress", {"offspring": 0}, "offspring is 0"),
        ("evopress", {"survivors": (40, 2)}, "must fall"),
        ("evopress", {"fidelities": (0.5,)}, "one share of the text for each"),
        ("evopress", {"fidelities": (0.5, 0.1)}, "rising"),
        ("bandit", {"doubt": 0.0}, "doubt is 0.0"),
        ("greedy-true", {"candidates": 0}, "candidates is 0"),
        ("nsga2", {"batch": 0}, "batch is 0"),
        ("dqn", {"exploration": 1.5}, "exploration is 1.5"),
        ("a2c", {"episodes": 0}, "episodes is 0"),
        ("recurrent-ppo", {"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        agents.make(name, **options)
