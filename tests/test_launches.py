"""Maps chosen group by group, launches included, against brute force."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmpq.envs import make_problem
from dmpq.objective import Constraints, Weights
from dmpq.solvers.launches import GroupMenus
from dmpq.solvers.local_search import improved

FORMATS = 3
GROUPS = np.repeat([0, 1], 3)
SETS = np.array([s for s in product([False, True], repeat=FORMATS) if any(s)])
EVERY = np.array(list(product(range(FORMATS), repeat=len(GROUPS))))
ROWS = np.arange(len(GROUPS))


def drawn(seed, *, budgets=0):
    """Wider formats take more and lose less; a launch takes as much as some decisions."""
    rng = np.random.default_rng(seed)
    values = -np.sort(-rng.exponential(size=(6, FORMATS)), axis=1)
    return values, GroupMenus(
        shares=np.sort(rng.uniform(0.02, 0.1, (1, 6, FORMATS)), axis=2),
        launches=rng.uniform(0.05, 0.15, (1, 2, FORMATS)),
        worth=np.zeros((2, FORMATS)),
        taken=np.sort(rng.uniform(0.05, 0.3, (budgets, 6, FORMATS)), axis=2),
        groups=GROUPS,
        sets=SETS,
    )


def usage(menus, maps):
    """The slow twin: shares and launches of maps, (K,)."""
    total = menus.shares[0][ROWS, maps].sum(1)
    for i, one in enumerate(maps):
        for group in (0, 1):
            total[i] += menus.launches[0, group, np.unique(one[group == GROUPS])].sum()
    return total


@pytest.mark.parametrize("budgets", [0, 1])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), room=st.floats(0.5, 1.2))
@example(seed=1337, room=0.5)  # two decisions change formats at nearly one price
@example(seed=5704, room=0.6)  # with a budget, two maps fit
def test_maps_are_within_the_limits_and_near_the_best(budgets, seed, room):
    values, menus = drawn(seed, budgets=budgets)
    fits = usage(menus, EVERY) <= room
    if budgets:
        fits &= menus.taken[0][ROWS, EVERY].sum(1) <= 1
    found = menus.best(menus.columns(values), np.array([room]))
    if found is None:
        # Columns are the best at some prices: the smallest map is, so that it would be found.
        assert not fits.any() or usage(menus, np.zeros((1, 6), int))[0] > room or budgets
        return
    assert usage(menus, found[None])[0] <= room * (1 + 1e-9)
    assert fits[(found == EVERY).all(1)].all()
    worth = values[ROWS, EVERY].sum(1)
    best, worst = worth[fits].min(), worth[fits].max()
    if not budgets:  # two limits: few maps fit, and what no price reaches can be all of them
        assert values[ROWS, found].sum() <= best + 0.35 * (worst - best) + 1e-9

    # Single changes and exchanges follow, as in a projection.
    def beyond(maps):
        over = usage(menus, maps) > room
        if budgets:
            over |= menus.taken[0][ROWS, maps].sum(1) > 1
        return over.astype(float)

    near = 0.2 if budgets else 0.05
    found = improved(found, values, GROUPS, beyond)
    assert values[ROWS, found].sum() <= best + near * (worst - best) + 1e-9


def test_it_sees_launches_that_prices_of_decisions_cannot():
    """One group with a second format is worth more than a second format in each."""
    values = np.tile([3.0, 1.0], (6, 1))
    values[0] = [3.2, 1.0]
    values[3] = [3.1, 1.0]
    menus = GroupMenus(
        shares=np.tile([0.0, 0.1], (1, 6, 1)),
        launches=np.full((1, 2, 2), 0.2),
        worth=np.zeros((2, 2)),
        taken=np.zeros((0, 6, 2)),
        groups=GROUPS,
        sets=np.array([[True, False], [False, True], [True, True]]),
    )
    # Two launches are 0.4; 0.3 are left: a third launch and one decision, or all of one group.
    found = menus.best(menus.columns(values), np.array([0.7]))
    assert found.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("weights", ["acc=1,lat=0.1", "acc=1,lat=1", "acc=1,lat=0.3,eng=0.3"])
@pytest.mark.parametrize("avg_bits", [None, 3.5])
def test_where_launches_are_weighed_no_uniform_map_is_better(weights, avg_bits):
    plain = make_problem(hw="rtx4090")
    problem = replace(
        plain, weights=Weights.parse(weights), constraints=Constraints(avg_bits=avg_bits)
    )
    found = problem.evaluate(problem.mckp()[None])
    uniform = np.stack([problem.uniform(key) for key in problem.menu.keys])
    others = problem.evaluate(uniform[problem.feasible(uniform)])
    assert found.feasible.all()
    assert found.reward[0] >= others.reward.max() - 1e-6
    if avg_bits is None:  # by values alone, which see no launches, one is
        blind = problem.evaluate(problem.project(problem.linear_values())[None])
        assert blind.reward[0] < others.reward.max()
    rng = np.random.default_rng(0)
    sampled = np.stack([problem.propose(rng.normal(0, 0.3, 64)) for _ in range(8)])
    assert problem.feasible(sampled).all()
    assert problem.evaluate(sampled).reward.max() <= found.reward[0] + 1e-6
