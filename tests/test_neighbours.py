"""The maps one step from a map: within limits, cheap to measure, those in doubt first."""

import numpy as np
import pytest
from factories import make_problem

from dmpq.agents.neighbours import neighbours

ALL = 10**6


def steps(problem, centre, maps):
    """Return how many places of its menu, sorted by size, each decision of each map moves."""
    place = np.argsort(np.argsort(problem.sizes, axis=1, kind="stable"), axis=1)
    rows = np.arange(len(centre))
    return np.array([place[rows, m] for m in maps]) - place[rows, centre]


@pytest.mark.parametrize("serve", ["expert", "projection", "layer"])
@pytest.mark.parametrize("avg_bits", [2.6, 3.0, 4.3])
def test_one_step_narrower_or_one_wider_that_another_pays(serve, avg_bits):
    problem = make_problem(layers=3, experts=8, serve=serve, avg_bits=avg_bits)
    centre = problem.mckp()
    maps = neighbours(problem, centre, count=ALL)
    moved = np.sort(steps(problem, centre, maps), axis=1)
    single = (moved[:, 0] == -1) & (moved[:, 1:] == 0).all(1)
    paid = (moved[:, 0] == -1) & (moved[:, -1] == 1) & (moved[:, 1:-1] == 0).all(1)
    assert (single | paid).all()
    assert single.any()
    assert problem.feasible(maps).all()
    assert len({m.tobytes() for m in maps}) == len(maps)


def test_a_step_wider_is_paid_in_the_same_layer_or_later():
    problem = make_problem(layers=3, experts=8)
    centre = problem.mckp()
    layers = problem.spec.layer_of_expert
    found = 0
    for change in steps(problem, centre, neighbours(problem, centre, count=ALL)):
        wider, narrower = layers[change > 0], layers[change < 0]
        if len(wider):
            found += 1
            assert narrower[0] >= wider[0]
    assert found


def test_those_in_doubt_come_first():
    """The cheapest step narrower is nearer to the map's price than the dearest."""
    problem = make_problem(layers=2, experts=8, weights="acc=1")
    centre = problem.mckp()
    maps = neighbours(problem, centre, count=ALL)
    loss = problem.surrogate(maps).kl - problem.surrogate(centre[None]).kl[0]
    single = (steps(problem, centre, maps) != 0).sum(1) == 1
    saved = (problem.effective_bits(centre[None]) - problem.effective_bits(maps))[single]
    prices = loss[single] / saved
    assert (np.diff(prices) > -1e-9).all()
    np.testing.assert_array_equal(neighbours(problem, centre, count=5), maps[:5])


def test_the_widest_map_has_nothing_to_exchange():
    problem = make_problem(avg_bits=16.0, weights="acc=1")
    assert neighbours(problem, problem.mckp(), count=ALL).shape == (0, problem.num_decisions)


def test_no_neighbours_are_asked_for_and_none_come():
    problem = make_problem()
    assert neighbours(problem, problem.mckp(), count=0).shape == (0, problem.num_decisions)
