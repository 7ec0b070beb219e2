"""What holds for every agent in the registry, and the command that lists them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from factories import make_problem
from test_agents import SIMPLE
from test_programs import PROGRAMS, WITH_MODEL
from test_searchers import SEARCHERS

from dmpq import agents
from dmpq.agents.__main__ import main
from dmpq.errors import InputError
from dmpq.testing.agent import AgentContract

RULES = [
    "uniform-fractional",
    "frequency-layer",
    "inverse-frequency",
    "routing-weight",
    "first-layers",
    "last-layers",
    "first-last-layers",
    "frequency-first-layers",
    "weight-norm",
    "outlier-ratio",
    "kurtosis",
    "super-expert",
    "mopeq-layer",
    "mopeq-model",
    "router-norm",
    "router-norm-change",
    "router-norm-pruning",
    "moqa",
]
"""Rules of one map, which the contract below is run on."""


def whole_problem(**options):
    """Return a problem whose profile also knows how router rows changed."""
    problem = make_problem(**options)
    change = np.random.default_rng(1).normal(0, 1, problem.spec.num_experts)
    problem.profile.router_norm_change[:] = change
    return problem


@pytest.mark.parametrize("agent", RULES, indirect=True)
class TestRules(AgentContract):
    @pytest.fixture
    def agent(self, request):
        return agents.make(request.param)

    @pytest.fixture
    def problem(self):
        return whole_problem()


@pytest.mark.parametrize("serve", ["expert", "projection", "layer"])
@pytest.mark.parametrize("name", RULES)
def test_every_granularity_under_every_limit_with_experts_never_hit(name, serve):
    base = make_problem().baselines
    problem = whole_problem(
        serve=serve,
        unhit=5,
        avg_bits=4.5,
        memory_bytes=base.memory_bytes * 0.9,
        latency_s=base.latency_s * 1.2,
        energy_j=base.energy_j * 1.2,
    )
    result = agents.make(name).search(problem, evaluations=1, seed=0)
    assert problem.feasible(result.assignment[None]).all()


@pytest.mark.parametrize("bits", [2.25, 2.6, 3.0, 5.1, 16.0])
@pytest.mark.parametrize("name", RULES)
def test_no_rule_exceeds_its_budget_or_leaves_a_step_of_it(name, bits):
    problem = whole_problem(layers=1, bits="2,3,4,16", avg_bits=bits)
    found = agents.make(name).search(problem, evaluations=1, seed=0).assignment[None]
    spent = problem.effective_bits(found)[0]
    widest_step = (16 - 4.25) / 8
    assert bits - widest_step < spent <= bits


@pytest.mark.parametrize("name", [n for n in agents.names() if n not in WITH_MODEL])
def test_every_agent_obeys_its_budget_whatever_its_kind(name):
    problem = whole_problem(layers=2, experts=4, bits="2,3,4")
    result = agents.make(name).search(problem, evaluations=3, seed=0)
    tried = np.array([candidate.assignment for candidate in result.history])
    assert problem.feasible(tried).all()
    assert problem.effective_bits(result.assignment[None])[0] <= 3.0


@pytest.mark.parametrize("name", WITH_MODEL)
def test_what_differentiates_the_model_says_that_it_needs_one(name):
    problem = whole_problem(layers=2, experts=4, bits="2,3,4")
    with pytest.raises(InputError, match="differentiates the model's loss"):
        agents.make(name).search(problem, evaluations=3, seed=0)


def test_every_agent_is_under_a_contract():
    ppo = {"ppo", "maskable-ppo"}  # tests/test_ppo.py
    tested = {*SIMPLE, *RULES, *PROGRAMS, *WITH_MODEL, *SEARCHERS, *ppo}
    assert tested == {*agents.names()}


def test_every_agent_is_called_what_it_is_registered_as():
    assert [agents.make(name).name for name in agents.names()] == agents.names()


def test_the_facts_are_those_of_the_classes():
    found = agents.facts()
    assert [one.name for one in found] == agents.names()
    assert all(one.signal for one in found)
    by_name = {one.name: one for one in found}
    for name in [*RULES, "uniform", "random", "frequency", "greedy", "mckp"]:
        kind, facts = type(agents.make(name)), by_name[name]
        assert (facts.signal, facts.cost, facts.source) == (kind.signal, kind.cost, kind.source)
        assert facts.cost
        assert facts.source


def test_an_agent_that_says_nothing_is_listed_by_its_docstring(monkeypatch):
    monkeypatch.setitem(agents.registry._AGENTS, "x", "dmpq.agents.base:Recorder")
    found = agents.facts()[-1]
    assert found == agents.Facts("x", found.signal, "", "")
    assert found.signal.startswith("Evaluates maps for an agent")


def test_listing_imports_no_torch_and_fits_80_columns():
    code = (
        "import sys; from dmpq.agents.__main__ import main; main(['list']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in agents.names():
        assert f" {name} " in done.stdout


def test_the_list_for_programs(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == agents.names()
    assert listed[0] == {"name": "uniform", "signal": "none", "cost": "1", "source": "baseline"}


def test_a_command_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lsit"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
