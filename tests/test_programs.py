"""Published allocators against brute force under their own objectives."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from factories import make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq import agents
from dmpq.agents.mxmoe import MxMoEAgent, least_product
from dmpq.agents.pmq import PmqCodeAgent, PmqPaperAgent, code_values, paper_values
from dmpq.agents.programs import by_decision, layer_of_decision, solve_layer
from dmpq.errors import InputError
from dmpq.solvers.knapsack import solve_mckp
from dmpq.testing.agent import AgentContract

FACTORS = Path(__file__).parents[2] / "shared" / "data" / "mixtral-8x7b" / "factors.json"
PROGRAMS = ["pmq-paper", "pmq-code", "gemq", "mxmoe", "error-layer", "error-model"]
WITH_MODEL = ["fisher", "hessian-layer", "hessian-model"]


@pytest.mark.parametrize("agent", PROGRAMS, indirect=True)
class TestPrograms(AgentContract):
    @pytest.fixture
    def agent(self, request):
        return agents.make(request.param)

    @pytest.fixture
    def problem(self):
        return make_problem()


@pytest.mark.parametrize("serve", ["projection", "layer"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_granularity(name, serve):
    problem = make_problem(serve=serve)
    result = agents.make(name).search(problem, evaluations=1, seed=0)
    assert problem.feasible(result.assignment[None]).all()


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_limits_are_met(name):
    base = make_problem().baselines
    for limits in (
        {"latency_s": base.latency_s * 1.01},
        {"avg_bits": None, "memory_bytes": base.memory_bytes * 0.8},
        {"avg_bits": None, "energy_j": base.energy_j * 1.05},
    ):
        problem = make_problem(**limits)
        result = agents.make(name).search(problem, evaluations=1, seed=0)
        assert problem.feasible(result.assignment[None]).all()


@pytest.mark.parametrize("name", WITH_MODEL)
def test_what_differentiates_the_model_says_so_where_there_is_none(name):
    with pytest.raises(InputError, match="differentiates"):
        agents.make(name).search(make_problem(), evaluations=1, seed=0)


def every(decisions, choices):
    return np.array([*itertools.product(range(choices), repeat=decisions)])


def brute_layer(values, sizes, capacity, at_least=(), *, spend_all=False):
    """Try every assignment; returns (size if all is to be spent, value, size) of the best."""
    maps = every(*values.shape)
    rows = np.arange(len(values))
    taken, worth = sizes[rows, maps].sum(1), values[rows, maps].sum(1)
    ok = taken <= capacity
    for mask in at_least:
        ok &= mask[maps].any(1)
    if not ok.any():
        return brute_layer(values, sizes, capacity, at_least[:-1], spend_all=spend_all)
    if spend_all:
        ok &= taken == taken[ok].max()
    return min(zip(worth[ok], taken[ok], strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layers_program_equals_brute_force(data):
    decisions, choices = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    cells = decisions * choices
    integers = st.lists(st.integers(0, 9), min_size=cells, max_size=cells)
    values = np.array(data.draw(integers), float).reshape(decisions, choices)
    sizes = np.array(data.draw(integers)).reshape(decisions, choices)
    flags = st.lists(st.booleans(), min_size=choices, max_size=choices)
    at_least = [np.array(data.draw(flags)) for _ in range(data.draw(st.integers(0, 2)))]
    least = int(sizes.min(1).sum())
    capacity = data.draw(st.integers(least, int(sizes.max(1).sum()) + 1))
    spend_all = data.draw(st.booleans())
    choice = solve_layer(values, sizes, capacity, at_least=at_least, spend_all=spend_all)
    rows = np.arange(decisions)
    assert (values[rows, choice].sum(), sizes[rows, choice].sum()) == brute_layer(
        values, sizes, capacity, at_least, spend_all=spend_all
    )
    with pytest.raises(InputError, match="below"):
        solve_layer(values, sizes, least - 1)


def made_up():
    """Factors of two layers of six experts, 1 to 3 bits, with a super expert in the first."""
    rng = np.random.default_rng(0)
    error = np.exp(rng.normal(6, 0.4, (2, 6, 1))) * np.array([2.6, 1.4, 0.6])
    error[0, 2] *= 100
    return [(rng.integers(1e4, 9e4, 6).astype(float), rng.random(6) * 2e4, e) for e in error]


def released():
    """The factors that MC-MoE released of Mixtral-8x7B, layer by layer."""
    if not FACTORS.exists():
        pytest.skip("needs ../shared/data")
    rows = json.loads(FACTORS.read_text())
    layers = [[r for r in rows if r["layer"] == layer] for layer in range(32)]
    return [
        (
            np.array([r["frequency"] for r in layer]),
            np.array([r["gate_weight"] for r in layer]),
            np.array([[r["output_error"][b] for b in "123"] for r in layer]),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("table", [made_up, released])
def test_pmq_on_factors_equals_brute_force_under_its_objective(table, form):
    values_of = {"paper": paper_values, "code": code_values}[form]
    at_least = [np.array([False, False, True]), np.array([False, True, False])]
    for frequency, weight, error in table():
        experts = len(frequency)
        values = values_of(frequency, weight, error)
        sizes = np.tile([1, 2, 3], (experts, 1))
        for budget in (1.5, 2.0, 2.5):
            capacity = int(budget * experts)
            choice = solve_layer(
                values, sizes, capacity, at_least=at_least, spend_all=form == "paper"
            )
            worth, taken = brute_layer(
                values, sizes, capacity, at_least, spend_all=form == "paper"
            )
            own = values[np.arange(experts), choice].sum()
            assert own == pytest.approx(worth, rel=1e-12)
            bits = choice + 1
            assert bits.sum() == taken <= capacity
            assert bits.sum() == capacity or form == "code"
            assert (bits == 3).any()
            assert (bits == 2).any()


def test_pmqs_code_ignores_gamma_and_its_normalisation_changes_no_optimum():
    frequency, weight, error = made_up()[0]
    plain = paper_values(frequency, weight, error, gamma=1.0)
    ratio = code_values(frequency, weight, error) / plain
    assert ratio == pytest.approx(np.full(ratio.shape, ratio[0, 0]))


def layer_budgets(problem, choice):
    """Return per layer the bits taken and the bits that its share of the limit allows."""
    layers, rows = layer_of_decision(problem), np.arange(len(choice))
    for layer in np.unique(layers):
        own = layers == layer
        weights = problem.decision_weights[own].sum()
        yield problem.sizes[rows, choice][own].sum(), problem.limits.avg_bits * weights


@pytest.mark.parametrize("agent", [PmqPaperAgent(), PmqCodeAgent()])
def test_pmq_on_a_profile_equals_brute_force(agent):
    problem = make_problem(layers=2, experts=5, bits="2,3,4", seed=3)
    choice, profile = agent.propose(problem), problem.profile
    layers = problem.spec.layer_of_expert
    for layer, (taken, allowed) in enumerate(layer_budgets(problem, choice)):
        own = layers == layer
        paper = isinstance(agent, PmqPaperAgent)
        value = (profile.frequency * profile.routing_weight**1.5)[own, None]
        error = profile.output_error[own] ** (1.0 if paper else 0.5)
        at_least = [problem.menu.bits == b for b in (3, 2)]
        sizes = problem.sizes[own]
        worth, size = brute_layer(value * error, sizes, allowed, at_least, spend_all=paper)
        own_worth = (value * error)[np.arange(5), choice[own]].sum()
        assert own_worth == pytest.approx(worth, rel=1e-12)
        assert taken == size <= allowed


def test_errors_layer_by_layer_and_at_once_equal_brute_force():
    problem = make_problem(layers=2, experts=4, bits="2,3,4", avg_bits=3.1)
    error, rows = problem.profile.output_error, np.arange(8)
    choice = agents.make("error-layer").propose(problem)
    for layer, (taken, allowed) in enumerate(layer_budgets(problem, choice)):
        own = slice(4 * layer, 4 * layer + 4)
        worth, _ = brute_layer(error[own], problem.sizes[own], allowed)
        assert error[own][np.arange(4), choice[own]].sum() == pytest.approx(worth)
        assert taken <= allowed
    choice = agents.make("error-model").propose(problem)
    worth, _ = brute_layer(error, problem.sizes, 3.1 * problem.num_weights)
    assert error[rows, choice].sum() == pytest.approx(worth)


@pytest.mark.parametrize("seed", range(4))
def test_gemq_equals_brute_force_with_its_floors(seed):
    problem = make_problem(layers=2, experts=4, bits="2,3,4", seed=seed, avg_bits=2.9)
    problem.profile.proxy[:4] *= 1e3  # so that the second layer would get the narrowest alone
    choice = agents.make("gemq").propose(problem)
    maps, rows = every(8, 3), np.arange(8)
    fits = problem.sizes[rows, maps].sum(1) <= 2.9 * problem.num_weights
    floors = [
        (maps[:, half] == problem.menu.index(key)).any(1)
        for half in (slice(0, 4), slice(4, 8))
        for key in "32"
    ]
    value = problem.profile.proxy[rows, maps].sum(1)
    assert value[(maps == choice).all(1)][0] == pytest.approx(
        value[fits & np.all(floors, axis=0)].min(), rel=1e-6
    )
    free = agents.make("gemq", at_least=()).propose(problem)
    assert value[(maps == free).all(1)][0] == pytest.approx(value[fits].min(), rel=1e-9)


def test_floors_that_nothing_can_pay_for_are_dropped():
    problem = make_problem(avg_bits=2.26)
    for name in PROGRAMS:
        result = agents.make(name).search(problem, evaluations=1, seed=0)
        assert problem.feasible(result.assignment[None]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9, 1.0]))
def test_the_least_product_equals_brute_force(seed, r):
    rng = np.random.default_rng(seed)
    shape = (5, 4)
    loss, time = np.exp(rng.normal(0, 2, shape)), np.exp(rng.normal(0, 1, shape))
    sizes = rng.integers(1, 9, shape)
    capacity = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    maps, rows = every(*shape), np.arange(5)
    product = loss[rows, maps].sum(1) ** r * time[rows, maps].sum(1) ** (1 - r)
    best = product[sizes[rows, maps].sum(1) <= capacity].min()
    choice = least_product(loss, time, lambda v: solve_mckp(v, sizes, capacity), r)
    found = loss[rows, choice].sum() ** r * time[rows, choice].sum() ** (1 - r)
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("serve", ["expert", "projection"])
def test_mxmoe_trades_loss_for_time(serve):
    """Against every map of a small problem, and monotone in r."""
    problem = make_problem(layers=1, experts=3, bits="2,4,8", serve=serve, avg_bits=5.0)
    loss, time = problem.sensitivity, problem.linear_latency
    rows, maps = np.arange(len(loss)), every(len(loss), 3)
    fits = problem.sizes[rows, maps].sum(1) <= 5.0 * problem.num_weights
    losses, times = (table[rows, maps].sum(1) for table in (loss, time))
    for r in (0.25, 0.75, 1.0):
        for scope in ("layer", "model"):
            choice = MxMoEAgent(r=r, scope=scope).propose(problem)
            own = (maps == choice).all(1)
            product = losses**r * times ** (1 - r)
            assert product[own][0] == pytest.approx(product[fits].min(), rel=1e-6)


@pytest.mark.parametrize(("option", "value"), [("r", 1.5), ("scope", "expert")])
def test_mxmoe_refuses(option, value):
    with pytest.raises(InputError):
        agents.make("mxmoe", **{option: value})


def test_rows_of_experts_are_shared_out_without_loss():
    rows = make_problem().profile.output_error
    for serve in ("expert", "projection", "layer"):
        problem = make_problem(serve=serve)
        assert by_decision(problem, rows).sum(0) == pytest.approx(rows.sum(0))
