"""Shadow prices: duals against finite differences of the relaxation, gains against every map."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from dmpq.evaluation import LossUnit
from dmpq.objective import Constraints, Weights
from dmpq.shadow_prices import relaxation_prices, said, shadow_prices
from dmpq.spec import load_geometry


def relaxation(values, sizes, capacities):
    """The least value of the linear relaxation, by HiGHS."""
    decisions, choices = values.shape
    one_each = np.kron(np.eye(decisions), np.ones((1, choices)))
    solved = linprog(
        values.ravel(),
        A_ub=sizes.reshape(len(sizes), -1),
        b_ub=capacities,
        A_eq=one_each,
        b_eq=np.ones(decisions),
    )
    return solved.fun


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.floats(0.05, 0.95))
def test_duals_are_finite_differences_of_the_relaxation(seed, limits, share):
    rng = np.random.default_rng(seed)
    decisions, choices = int(rng.integers(1, 7)), int(rng.integers(2, 5))
    values = rng.uniform(0, 1, (decisions, choices))
    first = rng.integers(0, 40, (decisions, choices))
    # The second limit ranks as the first does, as bits and memory do.
    sizes = np.array([first, first * 3 + rng.integers(0, 2, first.shape)])[:limits]
    least, most = sizes.min(2).sum(1), sizes.max(2).sum(1)
    capacities = np.ceil(least + share * (most - least)).astype(int) + 1
    prices = relaxation_prices(values, sizes, capacities)
    here = relaxation(values, sizes, capacities)
    for i in range(limits):
        step = np.zeros(limits)
        step[i] = 1e-3
        slope = (here - relaxation(values, sizes, capacities + step)) / step[i]
        assert prices[i] == pytest.approx(slope, abs=2e-4)


def test_a_limit_beyond_what_is_wanted_has_no_price():
    values, sizes = np.array([[1.0, 0.5, 0.7]]), np.array([[[1, 2, 4]]])
    assert relaxation_prices(values, sizes, np.array([2])) == 0
    assert relaxation_prices(values, sizes, np.array([1])) == pytest.approx(0.5)


def test_at_a_corner_the_price_is_that_of_more():
    values, sizes = np.array([[8.0, 2.0, 0.0]]), np.array([[[1, 2, 3]]])
    assert relaxation_prices(values, sizes, np.array([2])) == pytest.approx(2)
    twice = np.concatenate([sizes, sizes])
    both = relaxation_prices(values, twice, np.array([2, 9]))
    np.testing.assert_allclose(both, [2, 0], atol=1e-6)


def test_units():
    problem = make_problem(layers=4, experts=16, weights="acc=1")
    (price,) = shadow_prices(problem).values()
    assert (price.unit, price.active, price.raised) == ("effective_bit", True, 0.0)
    more = replace(problem, constraints=Constraints(avg_bits=3.1))
    rows = np.arange(problem.num_decisions)
    gain = (
        problem.sensitivity[rows, problem.mckp()].sum()
        - problem.sensitivity[rows, more.mckp()].sum()
    )
    assert price.loss == pytest.approx(gain / 0.1, rel=0.15)  # the slope flattens with the limit
    assert price.reward == pytest.approx(price.loss / problem.baselines.damage)
    keys = {"active", "nats_per_effective_bit", "reward_per_effective_bit", "raised_by"}
    assert set(price.to_json()) == keys
    assert said(price, problem).split(": ")[1].startswith(f"{price.loss:.3g} nats of KL, ")
    # Of two limits of which one is looser, only the tight one has a price, in its own unit.
    memory = float(problem.costs(problem.mckp()[None]).memory_bytes[0])
    both = replace(problem, constraints=Constraints(avg_bits=8.0, memory_bytes=memory))
    loose, tight = shadow_prices(both).values()
    assert (loose.active, loose.loss, loose.reward) == (False, 0.0, 0.0)
    assert (tight.unit, tight.active) == ("GB", True)
    per_bit = price.loss / problem.num_weights
    assert tight.loss == pytest.approx(per_bit * 8e9, rel=0.05)


def test_a_limit_that_does_not_bind_is_said_to_be_inactive():
    problem = make_problem(avg_bits=16.0)
    (price,) = shadow_prices(problem).values()
    assert not price.active
    assert price.loss == price.reward == 0.0
    assert said(price, problem) == "--avg-bits 16 is not active"


@pytest.mark.parametrize("quantile", [0.1, 0.3])
def test_gains_of_latency_and_energy_are_those_of_the_best_maps(quantile):
    olmoe = load_geometry("olmoe-1b-7b")
    plain = make_problem(
        layers=1,
        experts=6,
        avg_bits=None,
        weights="acc=1",
        hw="cpu",
        cost_spec=make_spec(layers=1, experts=6).with_widths_of(olmoe),
    )
    maps = np.array(list(itertools.product(range(5), repeat=6)))
    cost = plain.costs(maps)
    values = plain.linear_values()[np.arange(6), maps].sum(1)
    limit = float(np.quantile(cost.latency_s, quantile))
    problem = replace(plain, constraints=Constraints(latency_s=limit))
    (price,) = shadow_prices(problem).values()
    now, more = (values[cost.latency_s <= limit * f].min() for f in (1, 1 + price.raised))
    assert (price.unit, price.active, price.raised) == ("ms", True, 0.1)
    assert price.reward == pytest.approx((now - more) / (0.1 * limit) * 1e-3)
    assert price.loss == pytest.approx(price.reward * plain.baselines.damage)
    assert said(price, problem).endswith("per ms over the next 10%")


def test_the_device_s_own_memory_has_a_price():
    spec = make_spec(layers=32, experts=8).with_widths_of(load_geometry("mixtral-8x7b"))
    problem = make_problem(
        layers=32, experts=8, avg_bits=None, hw="rtx4090", cost_spec=spec, weights="acc=1"
    )
    (price,) = shadow_prices(problem).values()
    assert price.active
    assert said(price, problem).startswith("the memory of rtx4090 (21.6 GB) is active")
    assert replace(problem, weights=Weights.parse("mem=1")).mckp().max() == 0


def test_a_price_is_said_in_the_unit_of_what_the_search_makes_small():
    problem = make_problem(layers=4, experts=16, weights="acc=1")
    (price,) = shadow_prices(problem).values()
    answers, points = LossUnit.of_task(), LossUnit.of_task("bleu")
    assert said(price, problem, answers) == said(price, problem)
    assert f": {100 * price.loss:.3g} points of bleu, " in said(price, problem, points)
    assert "KL" not in said(price, problem, points)
    assert price.to_json(points)["points_per_effective_bit"] == 100 * price.loss
    assert "nats_per_effective_bit" not in price.to_json(points)
    assert points.mean(0.5) == "50 points of bleu"
    assert answers.mean(100) == "100 nats per answer"
