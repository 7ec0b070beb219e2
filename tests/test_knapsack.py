"""The exact knapsack against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.solvers import knapsack
from dmpq.solvers.knapsack import Mckp, solve_mckp, solve_mckp_multi, solve_mip


def brute_force(values, sizes, capacities):
    """Try every assignment; sizes (C, D, B). Returns the least (value, first size)."""
    decisions, choices = values.shape
    rows = np.arange(decisions)
    found = []
    for assignment in itertools.product(range(choices), repeat=decisions):
        taken = sizes[:, rows, assignment].sum(1)
        if (taken <= capacities).all():
            found.append((values[rows, assignment].sum(), taken[0]))
    return min(found)


@st.composite
def instances(draw, limits=1):
    decisions = draw(st.integers(1, 6))
    choices = draw(st.integers(1, 4))
    shape = (decisions, choices)
    cells = decisions * choices
    # Integers keep sums exact, so that ties are ties.
    values = np.array(draw(st.lists(st.integers(-9, 9), min_size=cells, max_size=cells)), float)
    sizes = np.array(
        draw(st.lists(st.integers(0, 12), min_size=cells * limits, max_size=cells * limits))
    )
    sizes = sizes.reshape(limits, *shape)
    least, most = sizes.min(2).sum(1), sizes.max(2).sum(1)
    share = draw(st.floats(0, 1))
    return values.reshape(shape), sizes, (least + share * (most - least)).astype(int)


@settings(max_examples=300, deadline=None)
@given(instances())
def test_equals_brute_force_and_ties_go_to_fewer_bits(instance):
    values, sizes, capacities = instance
    choice = solve_mckp(values, sizes[0], int(capacities[0]))
    rows = np.arange(len(values))
    taken = values[rows, choice].sum(), sizes[0, rows, choice].sum()
    assert taken == brute_force(values, sizes, capacities)


@settings(max_examples=100, deadline=None)
@given(instances(), st.integers(0, 2**32 - 1))
def test_equals_brute_force_on_real_values(instance, seed):
    _, sizes, capacities = instance
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(-5, 4, sizes[0].shape))
    choice = solve_mckp(values, sizes[0], int(capacities[0]))
    best, _ = brute_force(values, sizes, capacities)
    assert values[np.arange(len(values)), choice].sum() == pytest.approx(best, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(instances(limits=2))
def test_several_limits_equal_brute_force_or_are_refused(instance):
    values, sizes, capacities = instance
    try:
        best, _ = brute_force(values, sizes, capacities)
    except ValueError:
        with pytest.raises(InputError, match="together"):
            solve_mckp_multi(values, sizes, capacities)
        return
    rows = np.arange(len(values))
    choice = solve_mckp_multi(values, sizes, capacities)
    assert (sizes[:, rows, choice].sum(1) <= capacities).all()
    assert values[rows, choice].sum() == best


def experts(seed, count):
    """Convex-ish damage over five widths of equal experts, and their stored bits."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 1.5, (count, 1)))
    noise = np.exp(rng.normal(0, 0.2, (count, 5)))
    values = scale * noise * np.array([1.0, 0.2, 0.05, 2e-4, 0.0])
    sizes = np.tile(np.array([36, 52, 68, 132, 256]) * 1000, (count, 1))
    return values, sizes


@pytest.mark.parametrize("seed", range(5))
def test_table_and_branch_and_bound_agree(monkeypatch, seed):
    values, sizes = experts(seed, 64)
    solver = Mckp(sizes, 64 * 48_000)
    by_table = solver.solve(values)
    monkeypatch.setattr(knapsack, "_MAX_TABLE", 0)
    by_mip = solver.solve(values)
    rows = np.arange(64)
    assert values[rows, by_table].sum() == pytest.approx(values[rows, by_mip].sum(), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_core_does_not_matter(monkeypatch, seed):
    values, sizes = experts(seed, 64)
    solver = Mckp(sizes, 64 * 48_000)
    by_core = solver.solve(values)
    monkeypatch.setattr(knapsack, "_FIRST_CORE", values.size)
    np.testing.assert_array_equal(by_core, solver.solve(values))


@settings(max_examples=60, deadline=None)
@given(instances(), st.integers(20, 60))
def test_copies_of_few_experts_equal_the_full_table(instance, copies):
    """Ties by the dozen: the core is a few of them, and still proves the optimum."""
    values, sizes, capacities = instance
    values, sizes = np.tile(values, (copies, 1)), np.tile(sizes[0], (copies, 1))
    solver = Mckp(sizes, int(capacities[0]) * copies + 1)
    rows = np.arange(len(values))
    choice, open_ = solver.solve_proven(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FIRST_CORE", values.size)
        full = solver.solve(values)
    for part in (values, sizes):
        assert part[rows, choice].sum() == part[rows, full].sum()
    assert open_ <= 1e-9
    value = values[rows, choice].sum()
    assert solver.bound(values) <= value + 1e-9 * abs(value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_what_a_small_core_leaves_open_holds_the_optimum(seed, first):
    """Whatever gap is accepted, the optimum lies within it; sizes have several steps."""
    rng = np.random.default_rng(seed)
    steps = np.array([[0, 96, 192, 384], [0, 128, 256, 484], [0, 4, 6, 22], [0, 3, 9, 27]])
    sizes = 100 + steps[rng.integers(0, 4, 12)]
    jitter = 1 + 0.01 * rng.standard_normal(sizes.shape)
    values = sizes.max(1, keepdims=True) * np.array([1.0, 0.4, 0.1, 0.01]) * jitter
    solver = Mckp(sizes, int(sizes[:, 0].sum() + rng.random() * np.ptp(sizes, axis=1).sum()))
    rows = np.arange(12)
    best = values[rows, solver.solve(values)].sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FIRST_CORE", first)
        patch.setattr(knapsack, "_LARGE_CORE", 0)
        patch.setattr(knapsack, "_CLOSE", 1.0)
        choice, open_ = solver.solve_proven(values)
    value = values[rows, choice].sum()
    assert sizes[rows, choice].sum() <= solver.capacity
    assert value * (1 - open_) - 1e-9 <= best <= value + 1e-9


@pytest.mark.parametrize("seed", [0, 2])
def test_capacity_that_no_map_can_use_is_no_doubt(monkeypatch, seed):
    """Experts of several widths that pay alike: what must be left over proves a core's optimum.

    The bound is 2e-5 below it, and every expert has a choice that adds less than that, so that
    the core would have to be all of them.
    """
    rng = np.random.default_rng(seed)
    weights = rng.choice([96, 128, 176, 264], 3000)
    sizes = weights[:, None] * np.array([9, 13, 17, 33, 64])
    jitter = 1 + 0.001 * rng.standard_normal(sizes.shape)
    values = weights[:, None] * np.array([1.0, 0.25, 0.0625, 2e-4, 0.0]) * jitter
    solver, cores, solve = Mckp(sizes, 12 * int(weights.sum()) + 3), [], knapsack._solve_core

    def noted(own, core, *rest):
        cores.append(np.count_nonzero(core) - len(own))
        return solve(own, core, *rest)

    monkeypatch.setattr(knapsack, "_solve_core", noted)
    choice, open_ = solver.solve_proven(values)
    value = values[np.arange(3000), choice].sum()
    assert value * (1 - 1e-5) > solver.bound(values)
    assert open_ <= 1e-6
    assert max(cores) <= 1024


def test_thousands_of_equal_experts_need_no_large_table(monkeypatch):
    monkeypatch.setattr(knapsack, "_MAX_TABLE", 1 << 20)
    monkeypatch.setattr(knapsack, "solve_mip", None)
    sizes = np.tile([36, 52, 68, 132, 256], (5000, 1))
    values = np.tile([1.0, 0.2, 0.05, 2e-4, 0.0], (5000, 1))
    choice, open_ = Mckp(sizes, 5000 * 48 + 7).solve_proven(values)
    assert np.bincount(choice, minlength=5).tolist() == [1250, 3750, 0, 0, 0]
    assert open_ <= 1e-12


def test_branch_and_bound_takes_one_of_each_cover():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, sizes = rng.random((4, 3)), np.tile([2, 3, 4], (4, 1))
        covers = [rng.random((4, 3)) < 0.4 for _ in range(2)]
        rows = np.arange(4)
        found = [
            values[rows, one].sum()
            for one in itertools.product(range(3), repeat=4)
            if sizes[rows, one].sum() <= 11 and all(cover[rows, one].any() for cover in covers)
        ]
        if found:
            choice = solve_mip(values, sizes[None], [11], covers=covers)
            assert values[rows, choice].sum() == pytest.approx(min(found))
            assert all(cover[rows, choice].any() for cover in covers)


def test_equal_experts_share_the_budget():
    values, sizes = np.tile([4.0, 1.0, 0.25], (64, 1)), np.tile([2, 3, 4], (64, 1))
    choice = solve_mckp(values, sizes, 64 * 3)
    np.testing.assert_array_equal(choice, np.ones(64))


def test_choices_need_not_be_sorted_by_size():
    choice = solve_mckp(np.array([[0.0, 5.0, 1.0]]), np.array([[9, 1, 4]]), 4)
    np.testing.assert_array_equal(choice, [2])


def test_indifference_takes_the_smallest():
    sizes = np.array([[4, 2, 8]] * 3)
    np.testing.assert_array_equal(solve_mckp(np.zeros((3, 3)), sizes, 100), [1, 1, 1])


def test_a_large_instance_is_within_the_bound_of_its_relaxation():
    values, sizes = experts(0, 4000)
    capacity = 4000 * 48_000
    choice = solve_mckp(values, sizes, capacity)
    rows = np.arange(4000)
    assert sizes[rows, choice].sum() <= capacity
    prices = np.logspace(-8, -4, 2000)
    bound = max((values + p * sizes).min(1).sum() - p * capacity for p in prices)
    assert bound <= values[rows, choice].sum() <= bound * 1.001


def test_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="A capacity of 3 is below 4"):
        solve_mckp(np.zeros((2, 2)), np.array([[2, 3], [2, 3]]), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_values_that_are_not_finite(bad):
    with pytest.raises(InputError, match="finite"):
        solve_mckp(np.array([[0.0, bad]]), np.array([[1, 2]]), 2)


def test_refuses_values_of_another_shape():
    with pytest.raises(InputError, match="shape"):
        solve_mckp(np.zeros((3, 2)), np.array([[1, 2]]), 2)
