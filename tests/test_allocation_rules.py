"""Published allocation rules, each on a profile small enough that its map is known by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem, make_profile
from scipy.cluster.vq import kmeans2

from dmpq import agents
from dmpq.agents import mopeq, moqa, router_norm, super_expert
from dmpq.agents.allocation import layer_of_decision
from dmpq.errors import InputError
from dmpq.objective import Constraints
from dmpq.spec import MoELayer

NARROW, WIDE = 0, 1


def known(problem, **arrays):
    """Return the problem with some of its profile's numbers replaced; all experts like others."""
    count = problem.spec.num_experts
    plain = {
        "hits": np.full(count, 512),
        "frequency": np.full(count, 0.125),
        "routing_weight": np.full(count, 0.05),
        "contribution": np.ones(count),
        "output_error": np.ones((count, len(problem.menu))),
        "weight_norm": np.ones(count),
        "kurtosis": np.zeros(count),
        "outlier_ratio": np.full(count, 5.0),
        "max_row_variance": np.ones(count),
        "router_norm": np.ones(count),
        "router_norm_change": np.zeros(count),
    }
    return replace(problem, profile=replace(problem.profile, **{**plain, **arrays}))


def two_or_three(**arrays):
    """Return a problem of 2 layers of 4 experts where half of them may have 3 bits, the rest 2."""
    return known(make_problem(experts=4, bits="2,3", avg_bits=2.75), **arrays)


def proposed(name, problem, **options):
    return agents.make(name, **options).propose(problem)


SCORE = np.array([3.0, 1.0, 8.0, 2.0, 7.0, 5.0, 4.0, 6.0])
TOP = np.array([0, 0, 1, 0, 1, 1, 0, 1])
TOP_OF_LAYERS = np.array([1, 0, 1, 0, 1, 0, 0, 1])


@pytest.mark.parametrize(
    ("name", "arrays", "expected"),
    [
        ("frequency", {"frequency": SCORE / 16}, TOP),
        ("frequency-layer", {"frequency": SCORE / 16}, TOP_OF_LAYERS),
        ("inverse-frequency", {"hits": (SCORE * 10).astype(np.int64)}, 1 - TOP),
        ("routing-weight", {"routing_weight": SCORE / 20}, TOP),
        ("weight-norm", {"weight_norm": SCORE}, TOP),
        ("outlier-ratio", {"outlier_ratio": SCORE}, TOP),
        ("kurtosis", {"kurtosis": SCORE - 4}, TOP),
        ("mopeq-model", {"weight_norm": SCORE}, 1 - TOP),
        ("router-norm", {"router_norm": SCORE}, 1 - TOP_OF_LAYERS),
        ("router-norm-change", {"router_norm_change": SCORE - 5}, 1 - TOP_OF_LAYERS),
        ("router-norm-pruning", {"router_norm_change": SCORE - 5}, TOP_OF_LAYERS),
    ],
)
def test_a_rule_gives_more_bits_by_its_own_score_alone(name, arrays, expected):
    problem = two_or_three(**arrays)
    np.testing.assert_array_equal(proposed(name, problem), expected)
    assert problem.effective_bits(expected[None])[0] == 2.75


@pytest.mark.parametrize("name", ["router-norm", "router-norm-change"])
def test_both_signs_of_the_router_rules(name):
    problem = two_or_three(router_norm=SCORE, router_norm_change=SCORE - 5)
    found = proposed(name, problem, largest_first=True)
    np.testing.assert_array_equal(found, TOP_OF_LAYERS)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("first-layers", {}, [1, 0, 0, 0]),
        ("first-layers", {"layers": 2}, [1, 1, 0, 0]),
        ("last-layers", {}, [0, 0, 0, 1]),
        ("last-layers", {"layers": 3}, [0, 1, 1, 1]),
        ("first-last-layers", {}, [1, 0, 0, 1]),
        ("frequency-first-layers", {}, [1, 0, 0, 0]),
    ],
)
def test_places(name, options, expected):
    """Protected layers deserve 2 bits more: 4 where all others have 2."""
    wide = sum(expected)
    problem = known(make_problem(layers=4, bits="2,4", avg_bits=2.25 + wide * 2 / 4))
    found = proposed(name, problem, **options)
    np.testing.assert_array_equal(found, np.repeat(expected, 8))


@pytest.mark.parametrize("name", ["first-layers", "last-layers", "first-last-layers"])
def test_what_protected_layers_leave_over_is_spread_over_the_others(name):
    problem = known(make_problem(layers=8, bits="2,3,4"))
    found = proposed(name, problem).reshape(8, 8)
    chosen = {"first-layers": [0], "last-layers": [7], "first-last-layers": [0, 7]}[name]
    assert (found[chosen] >= found.max(0)[None]).all()
    others = np.delete(found, chosen, axis=0)
    assert np.ptp(others.sum(1)) <= 2


def test_frequency_counts_beside_the_first_layers():
    problem = known(
        make_problem(layers=2, experts=4, bits="2,4", avg_bits=3.5), frequency=SCORE / 16
    )
    found = proposed("frequency-first-layers", problem)
    # 3, 1, 8, 2 count sixteenfold, and beat 7, 5, 4, 6 but for the room that is left.
    np.testing.assert_array_equal(found, [1, 1, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("name", ["first-layers", "last-layers", "frequency-first-layers"])
def test_layers_that_there_are_not(name, layers):
    with pytest.raises(InputError, match="from 1 to 2"):
        proposed(name, make_problem(), layers=layers)


@pytest.mark.parametrize("bits", [-1.0, 17.0, float("nan")])
def test_extra_bits_that_are_no_width(bits):
    with pytest.raises(InputError, match="from 0 to 16"):
        proposed("super-expert", make_problem(), extra_bits=bits)


@pytest.mark.parametrize("wide", range(9))
def test_uniform_fractional_is_evenly_spaced(wide):
    problem = known(make_problem(layers=1, bits="2,3", avg_bits=2.25 + wide / 8))
    found = proposed("uniform-fractional", problem)
    assert found.sum() == wide
    gaps = np.diff(np.flatnonzero(np.tile(found, 2)))
    assert not gaps.size or np.ptp(gaps) <= 1


def test_uniform_fractional_is_uniform_where_nothing_is_left():
    for bits, fmt in ((2.25, 0), (3.25, 1), (16.0, 4)):
        found = proposed("uniform-fractional", make_problem(avg_bits=bits))
        assert (found == fmt).all()


def test_super_experts_are_those_of_the_paper_s_two_thresholds():
    size = np.full((512, 5), 0.5)
    size[[3, 70, 200, 300]] = np.array([5.0, 50.0, 40.0, 4.9])[:, None]
    problem = known(
        make_problem(layers=8, experts=64, bits="2,3,4,8,16"),
        output_error=size**2 * 0.125,  # squared, and averaged over all tokens
    )
    # Above the percentile are the four largest or fewer; 4.9 is below a tenth of 50.
    above = size[:, 0] > np.percentile(size[:, 0], 99.5)
    expected = np.flatnonzero(above & (size[:, 0] > 5.0))
    assert expected.tolist() == [70, 200]
    np.testing.assert_array_equal(
        np.flatnonzero(super_expert.super_experts(problem.profile)), expected
    )
    found = proposed("super-expert", problem)
    assert found[expected].min() > np.delete(found, expected).max()
    assert np.ptp(np.delete(found, expected)) <= 1


def test_no_super_expert_where_all_are_alike_or_none_was_hit():
    problem = known(make_problem())
    assert not super_expert.super_experts(problem.profile).any()
    nothing = known(make_problem(), frequency=np.zeros(16), hits=np.zeros(16, np.int64))
    assert not super_expert.super_experts(nothing.profile).any()


def test_mopeq_s_score_is_the_trace_of_the_norm_s_hessian():
    """Against second-order autograd, whose trace over D probes of length 1 is exact."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    shape, matrices = (4, 6), []
    for _ in range(3):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        matrices.append(matrix / matrix.norm() * 1.7)
    trace = sum(
        torch.autograd.functional.hessian(lambda w: w.norm(), matrix)
        .reshape(24, 24)
        .trace()
        .item()
        / 24
        for matrix in matrices
    )
    profile = make_profile(layers=1, experts=1)
    spec = replace(profile.spec, moe_layers=(MoELayer("x", 1, 1, *shape),))
    norm = torch.cat(matrices).norm().item()
    tiny = replace(profile, spec=spec, weight_norm=np.array([norm]))
    assert mopeq.scores(tiny)[0] == pytest.approx(trace)
    assert mopeq.scores(tiny)[0] == pytest.approx(3 * (1 - 1 / 24) / 1.7)


def test_mopeq_s_score_of_zeros_is_zero():
    problem = known(make_problem(), weight_norm=np.array([0.0] + [1.0] * 15))
    assert mopeq.scores(problem.profile)[0] == 0
    assert proposed("mopeq-layer", problem)[0] == NARROW


def test_mopeq_by_layer_compares_within_the_layer_only():
    norms = np.array([1.0, 2.0, 3.0, 4.0, 100.0, 200.0, 300.0, 400.0])
    problem = two_or_three(weight_norm=norms)
    np.testing.assert_array_equal(proposed("mopeq-layer", problem), [1, 1, 0, 0] * 2)
    np.testing.assert_array_equal(proposed("mopeq-model", problem), [1] * 4 + [0] * 4)


def least_within_clusters(score, count):
    """Return the labels of the best split of sorted scores: what k-means looks for, exactly."""
    order = np.argsort(score)
    best = min(
        (
            np.split(order, cuts)
            for cuts in itertools.combinations(range(1, len(score)), count - 1)
        ),
        key=lambda parts: sum(np.var(score[part]) * len(part) for part in parts),
    )
    labels = np.empty(len(score), int)
    for label, part in enumerate(best):
        labels[part] = label
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_mopeq_as_released_is_k_means_with_the_widest_for_the_largest_mean(seed):
    rng = np.random.default_rng(seed)
    norms = rng.permutation(np.repeat([1.0, 1.6, 4.0], [5, 6, 5])) * rng.uniform(0.95, 1.05, 16)
    problem = known(make_problem(bits="2,3,4", avg_bits=16.0), weight_norm=norms)
    found = proposed("mopeq-model", problem, budget_free=True)
    score = mopeq.scores(problem.profile)
    np.testing.assert_array_equal(found, least_within_clusters(score, 3))
    centres, labels = kmeans2(score, 3, minit="++", rng=np.random.default_rng(0))
    np.testing.assert_array_equal(found, np.argsort(np.argsort(centres))[labels])

    by_layer = proposed("mopeq-layer", problem, budget_free=True).reshape(2, 8)
    for own, part in zip(by_layer, score.reshape(2, 8), strict=True):
        np.testing.assert_array_equal(own, least_within_clusters(part / part.sum(), 3))


@pytest.mark.parametrize("name", ["mopeq-model", "mopeq-layer", "moqa"])
def test_what_knows_no_budget_says_so_beyond_the_limits(name):
    problem = make_problem(avg_bits=2.25)
    with pytest.raises(InputError, match=r"knows no budget.*beyond the limits"):
        proposed(name, problem, budget_free=True)


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_fewer_scores_than_widths_leave_the_widest_unused(distinct):
    score = np.arange(12.0) % distinct
    np.testing.assert_array_equal(mopeq.clusters(score, 5), score)
    labels, centres = moqa.clusters(score, 5)
    np.testing.assert_array_equal(labels, score)
    np.testing.assert_allclose(centres, np.arange(distinct))


def slow_order(ranking, variance, zeta):
    """Return what the released code does, by lists and indices."""
    now = list(ranking)
    for expert in reversed(list(ranking)):
        places = [k for k, other in enumerate(now) if zeta * variance[other] < variance[expert]]
        if places and now.index(expert) > places[0]:
            now.remove(expert)
            now.insert(places[0], expert)
    return now


def test_an_expert_of_large_variance_moves_up():
    variance = np.array([1.0, 2.0, 1.0, 3.5, 100.0, 1.0])
    for ranking, expected in (
        ([0, 1, 2, 5], [0, 1, 2, 5]),
        ([0, 1, 2, 3], [3, 0, 1, 2]),
        ([1, 0, 2, 3], [1, 3, 0, 2]),
        ([0, 1, 3, 4], [4, 3, 0, 1]),
        ([0, 4, 1, 3], [4, 3, 0, 1]),
    ):
        moved = router_norm.moved_up(np.array(ranking), variance, 3.0)
        assert moved.tolist() == expected
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranking, variance = rng.permutation(12), np.exp(rng.normal(0, 1.5, 12))
        moved = router_norm.moved_up(ranking, variance, 3.0)
        assert moved.tolist() == slow_order(ranking, variance, 3.0)


def test_the_row_variance_takes_part_in_the_router_rule():
    variance = np.ones(8)
    variance[2] = 10.0
    problem = two_or_three(router_norm=SCORE, max_row_variance=variance)
    # Of layer 0, experts 1 and 3 have the shortest rows; 2 moves before both.
    expected = [0, 1, 1, 0, 0, 1, 1, 0]
    np.testing.assert_array_equal(proposed("router-norm", problem), expected)
    plain = proposed("router-norm", problem, zeta=None)
    np.testing.assert_array_equal(plain, 1 - TOP_OF_LAYERS)


@pytest.mark.parametrize("name", ["router-norm-change", "router-norm-pruning"])
def test_an_unknown_change_of_router_norms(name):
    with pytest.raises(InputError, match=r"does not know .*; take router-norm"):
        agents.make(name).search(make_problem(), evaluations=1, seed=0)


def test_unknown_routers_and_a_ratio_that_is_none():
    with pytest.raises(InputError, match="no router rows"):
        proposed("router-norm", known(make_problem(), router_norm=np.zeros(16)))
    with pytest.raises(InputError, match="ratio of 1 or more"):
        proposed("router-norm", make_problem(), zeta=0.5)


def test_fuzzy_clusters_settle_where_the_definition_says():
    values = np.concatenate([[0.0, 0.1, 0.2], [1.0, 1.1], [4.0, 4.2, 4.1]])
    labels, centres = moqa.clusters(values, 3)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 2, 2, 2])
    distance = np.abs(values[:, None] - centres)
    member = 1 / ((distance[:, :, None] / distance[:, None, :]) ** 2).sum(2)
    np.testing.assert_allclose(member.sum(1), 1)
    weight = member**2
    again = (weight * values[:, None]).sum(0) / weight.sum(0)
    np.testing.assert_allclose(again, centres, rtol=1e-6)


def test_between_two_clusters_the_lower_precision_comes_first():
    values = np.concatenate([np.zeros(20), np.ones(20), [0.5, 0.45, 0.9]])
    labels, centres = moqa.clusters(values, 2)
    np.testing.assert_array_equal(labels[:40], [0] * 20 + [1] * 20)
    assert abs(centres.mean() - 0.5) < 0.02
    assert labels[41] == NARROW
    assert labels[42] == WIDE


def test_moqa_follows_the_share_of_what_an_expert_carries():
    frequency = np.array([1, 1, 2, 4, 1, 1, 2, 4]) / 8
    gradient = np.array([1.0, 1, 1, 1, 50, 50, 50, 50])
    problem = known(
        make_problem(experts=4, bits="2,3,4", avg_bits=2.5),
        frequency=frequency,
        contribution=gradient,
    )
    share = np.array([1, 1, 2, 4] * 2) / 8
    np.testing.assert_allclose(moqa.significance(problem.profile), share)
    np.testing.assert_array_equal(proposed("moqa", problem), [0, 0, 0, 1] * 2)
    free = replace(problem, constraints=Constraints(avg_bits=16.0))
    found = proposed("moqa", free, budget_free=True)
    np.testing.assert_array_equal(found, [0, 0, 1, 2] * 2)


@pytest.mark.parametrize("serve", ["expert", "projection", "layer"])
def test_the_layer_of_a_decision(serve):
    problem = make_problem(serve=serve)
    repeat = {"expert": 8, "projection": 16, "layer": 1}[serve]
    np.testing.assert_array_equal(layer_of_decision(problem), np.repeat([0, 1], repeat))
