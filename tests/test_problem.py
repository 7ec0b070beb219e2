"""The problem: exact budgets, projections within every limit, features, and refusals."""

import copy
import itertools
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem, make_profile, make_spec

from dmpq.errors import InputError
from dmpq.evaluation import Evaluations, SurrogateEvaluator
from dmpq.formats import Menu
from dmpq.objective import Constraints, Weights
from dmpq.spec import load_geometry

SERVES = ["expert", "projection", "layer"]


def every_map(problem):
    formats = range(len(problem.menu))
    return np.array(list(itertools.product(formats, repeat=problem.num_decisions)))


def linear_value(problem, maps):
    return problem.linear_values()[np.arange(problem.num_decisions), maps].sum(-1)


@pytest.mark.parametrize("serve", SERVES)
def test_decisions_cover_the_model_once(serve):
    problem = make_problem(serve=serve)
    expected = {"expert": 16, "projection": 32, "layer": 2}[serve]
    assert problem.num_decisions == expected
    stored = problem.spec.stored_bits(problem.menu)
    np.testing.assert_array_equal(problem.sizes.sum(0), stored.sum((0, 1)))
    assert problem.decision_weights.sum() == problem.num_weights
    maps = np.stack([problem.uniform(key) for key in problem.menu.keys])
    np.testing.assert_allclose(problem.effective_bits(maps), [2.25, 3.25, 4.25, 8.25, 16])


@pytest.mark.parametrize("serve", SERVES)
def test_linearised_reward_is_the_surrogates_up_to_launches(serve):
    """Damage and memory are exactly linear; rows of the values differ by what a change costs."""
    problem = make_problem(serve=serve, weights="acc=1,mem=1")
    rng = np.random.default_rng(0)
    maps = rng.integers(len(problem.menu), size=(20, problem.num_decisions))
    rewards = problem.surrogate(maps).reward
    np.testing.assert_allclose(np.ptp(rewards + linear_value(problem, maps)), 0, atol=1e-12)


@pytest.mark.parametrize("serve", SERVES)
def test_projections_without_sensitivities_share_their_experts(serve):
    problem = make_problem(serve=serve, projections=False)
    np.testing.assert_allclose(problem.sensitivity.sum(0), problem.profile.sensitivity.sum(0))


@pytest.mark.parametrize("avg_bits", [2.25, 3.0, 5.5])
def test_zero_log_importance_is_the_exact_optimum(avg_bits):
    problem = make_problem(layers=1, experts=5, avg_bits=avg_bits)
    maps = every_map(problem)
    feasible = maps[problem.feasible(maps)]
    best = linear_value(problem, feasible).min()
    assert linear_value(problem, problem.mckp()) == pytest.approx(best, rel=1e-12)


def test_bits_and_memory_together_are_exact():
    other = make_spec(layers=1, experts=5, hidden=64)
    plain = make_problem(layers=1, experts=5, avg_bits=None, cost_spec=other)
    memory = plain.costs(every_map(plain)).memory_bytes
    limit = float(np.quantile(np.unique(memory), 0.15))
    problem = replace(plain, constraints=Constraints(avg_bits=4.0, memory_bytes=limit))
    maps = every_map(problem)
    feasible = maps[problem.feasible(maps)]
    assert linear_value(problem, problem.mckp()) == pytest.approx(
        linear_value(problem, feasible).min(), rel=1e-9
    )
    assert problem.feasible(problem.mckp()[None])[0]


@pytest.mark.parametrize("serve", SERVES)
@pytest.mark.parametrize("weights", ["acc=1", "acc=1,lat=0.1,mem=0.1,eng=0.1"])
@pytest.mark.parametrize("share", [1.0, 1.3])
def test_every_proposal_meets_every_limit(serve, weights, share):
    olmoe = load_geometry("olmoe-1b-7b")
    plain = make_problem(serve=serve, weights=weights, cost_spec=make_spec().with_widths_of(olmoe))
    base = plain.baselines
    limits = Constraints(
        avg_bits=3.5,
        memory_bytes=base.memory_bytes * 0.75,
        latency_s=base.latency_s * share,
        energy_j=base.energy_j * share,
    )
    problem = replace(plain, constraints=limits)
    rng = np.random.default_rng(0)
    maps = [problem.propose(rng.normal(0, 1, problem.num_decisions)) for _ in range(5)]
    maps.append(problem.project(rng.normal(size=problem.sizes.shape)))
    assert problem.feasible(np.array(maps)).all()


def test_latency_limit_is_close_to_the_best():
    olmoe = load_geometry("olmoe-1b-7b")
    cost_spec = make_spec(layers=1, experts=6).with_widths_of(olmoe)
    plain = make_problem(layers=1, experts=6, avg_bits=None, weights="acc=1", cost_spec=cost_spec)
    maps = every_map(plain)
    for quantile in (0.05, 0.3, 0.7):
        limit = float(np.quantile(plain.costs(maps).latency_s, quantile))
        problem = replace(plain, constraints=Constraints(latency_s=limit))
        values = linear_value(problem, maps[problem.feasible(maps)])
        found = linear_value(problem, problem.mckp())
        # Not exact, and not far: within a tenth of what separates the best from the median.
        assert values.min() <= found <= values.min() + 0.1 * (np.median(values) - values.min())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"avg_bits": 1.5}, "--avg-bits 1.5 is below 2.25, the effective bits of uniform 2"),
        ({"memory_bytes": 1e6}, "--memory-gb 0.001 is below"),
        ({"latency_s": 1e-9}, "--latency-ms 1e-06 is below"),
        ({"energy_j": 1e-9}, "--energy-j 1e-09 is below"),
    ],
)
def test_infeasible_limits_are_refused_at_once(limits, message):
    with pytest.raises(InputError, match=message):
        make_problem(**{"avg_bits": None, **limits})


def test_the_least_that_is_named_can_be_reached():
    problem = make_problem(avg_bits=None)
    least = float(problem.costs(problem.uniform("2")[None]).memory_bytes[0])
    tight = make_problem(avg_bits=None, memory_bytes=least)
    np.testing.assert_array_equal(tight.mckp(), tight.uniform("2"))


def test_other_experts_than_the_costs_are_refused():
    with pytest.raises(InputError, match="other layers or experts"):
        make_problem(cost_spec=make_spec(experts=4))


def test_unknown_granularity_is_refused():
    with pytest.raises(InputError, match="did you mean 'layer'"):
        make_problem(serve="layers")


def test_experts_never_hit_stay_narrow_until_budget_is_left():
    tight = make_problem(unhit=3, weights="acc=1", avg_bits=3.0)
    np.testing.assert_array_equal(tight.mckp()[-3:], tight.sizes[-3:].argmin(1))
    loose = make_problem(unhit=3, weights="acc=1", avg_bits=16.0)
    np.testing.assert_array_equal(loose.mckp(), loose.uniform("16"))
    priced = make_problem(unhit=3, weights="acc=1,mem=0.1", avg_bits=16.0)
    np.testing.assert_array_equal(priced.mckp()[-3:], priced.uniform("2")[-3:])


@pytest.mark.parametrize("serve", SERVES)
def test_features_are_finite_and_bounded(serve):
    problem = make_problem(serve=serve, unhit=2)
    for array in (problem.features, problem.context):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert np.abs(array).max() <= 1
    assert problem.features.shape == (problem.num_decisions, len(problem.feature_names))
    assert len(set(problem.feature_names)) == len(problem.feature_names)
    assert problem.feature_names == make_problem().feature_names
    unknown = problem.feature_names.index("router_norm_change")
    assert (problem.features[:, unknown] == 0).all()


def test_features_keep_the_order_and_ignore_the_scale():
    problem = make_problem(layers=4)
    column = problem.features[:, problem.feature_names.index("sensitivity_2")]
    order = np.argsort(problem.sensitivity[:, 0])
    assert (np.diff(column[order]) > 0).all()
    profile = problem.profile
    scaled = replace(problem, profile=replace(profile, sensitivity=profile.sensitivity * 7))
    np.testing.assert_allclose(scaled.features, problem.features, atol=1e-6)


def test_a_profile_of_zeros_is_a_problem():
    profile = make_profile()
    zero = np.zeros_like(profile.sensitivity)
    empty = replace(profile, sensitivity=zero, uniform_kl=zero[0], projection_sensitivity=None)
    problem = make_problem(avg_bits=3.0)
    problem = replace(problem, profile=empty)
    assert np.isfinite(problem.features).all()
    assert problem.evaluate(problem.mckp()[None]).feasible.all()


def test_the_default_evaluator_follows_the_profile():
    problem = make_problem()
    assert problem.evaluator.name == "surrogate"
    other = make_profile(seed=1)
    maps = problem.mckp()[None]
    for changed in (
        replace(problem, profile=other),
        replace(replace(problem, profile=other), weights=Weights()),
        replace(problem, profile=other, evaluator=None),
    ):
        assert changed.evaluate(maps).kl == SurrogateEvaluator(other).evaluate(maps).kl
        assert changed.evaluate(maps).kl != problem.evaluate(maps).kl


def test_an_evaluator_that_was_given_is_kept():
    given = SurrogateEvaluator(make_profile(seed=1))
    problem = replace(make_problem(), evaluator=given)
    assert problem.evaluator is given
    assert replace(problem, profile=make_profile(seed=2)).evaluator is given
    assert replace(problem, evaluator=None).evaluator is not given


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles(twin):
    problem = make_problem(latency_s=1.0)
    again = twin(problem)
    np.testing.assert_array_equal(again.mckp(), problem.mckp())
    maps = problem.mckp()[None]
    assert again.evaluate(maps).reward == problem.evaluate(maps).reward
    other = make_profile(seed=1)
    assert replace(again, profile=other).evaluate(maps).kl == (
        SurrogateEvaluator(other).evaluate(maps).kl
    )


def test_baselines_without_eight_bits_are_the_widest_quantized():
    problem = make_problem(bits="2,2g64,4,4g32,16")
    expected = problem.costs(problem.uniform("4")[None])
    assert problem.baselines.memory_bytes == expected.memory_bytes[0]


def test_a_loss_that_is_not_finite_earns_minus_infinity():
    class Broken:
        name = "broken"
        tokens_spent = 0.0

        def evaluate(self, assignments, *, fidelity=1.0):
            bad = np.full(len(assignments), np.nan)
            return Evaluations(bad, bad, bad, 7.0)

    problem = make_problem(evaluator=Broken(), weights="lat=1")
    scores = problem.evaluate(problem.mckp()[None])
    assert scores.reward[0] == -np.inf
    assert scores.tokens == 7.0


@pytest.mark.parametrize("bad", [np.zeros(3), np.full(16, np.nan)])
def test_bad_log_importances_are_refused(bad):
    with pytest.raises(InputError, match=r"[Ll]og-importance"):
        make_problem().propose(bad)


def test_a_large_model_is_projected_in_reasonable_time():
    problem = make_problem(layers=48, experts=128)
    _ = problem.linear_ratios
    start = time.process_time()  # not of other processes
    choice = problem.mckp()
    assert time.process_time() - start < 5
    assert problem.effective_bits(choice[None])[0] == pytest.approx(3.0, abs=1e-3)


def test_menu_with_groups_need_not_be_ordered_by_size():
    problem = make_problem(bits="2,2g32,2g16,3,4", avg_bits=3.3)
    assert problem.menu == Menu.parse("2,2g32,2g16,3,4")
    assert problem.effective_bits(problem.mckp()[None])[0] <= 3.3
