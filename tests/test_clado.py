"""CLADO's program on a loss of known pairs: it finds what no sum can."""

from itertools import product

import numpy as np
import pytest
from factories import make_problem
from test_searchers import entangled_problem

from dmpq import agents
from dmpq.agents.clado import _fitted, _pairs, minimum
from dmpq.agents.loss_fit import LossFit
from dmpq.agents.neighbours import neighbours
from dmpq.agents.programs import layer_of_decision
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations


class Quadratic:
    """The profile's sum and pairs of errors: ``sum s + sum_{i<j} r_ij sqrt(s_i s_j)``."""

    name = "quadratic"
    tokens = 0
    tokens_spent = 0.0

    def __init__(self, profile, seed, strength=1.5):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(0, 1, (profile.spec.num_experts, 3))
        vectors /= np.linalg.norm(vectors, axis=1)[:, None]
        self.profile, self.ratio = profile, strength * vectors @ vectors.T
        np.fill_diagonal(self.ratio, 0.0)
        self.held = []

    def evaluate(self, assignments, *, fidelity=1.0):
        del fidelity
        maps = np.atleast_2d(assignments)
        own = self.profile.sensitivity[np.arange(maps.shape[1]), maps]
        root = np.sqrt(own)
        kl = own.sum(1) + ((root @ self.ratio) * root).sum(1) / 2
        return Evaluations(kl, self.profile.full_nll + kl, np.zeros(len(maps)), 0.0)

    def hold(self, assignment):
        self.held.append(assignment)


def quadratic_problem(seed, **options):
    options = {"layers": 2, "experts": 4, "bits": "2,3,4", "weights": "acc=1", **options}
    plain = make_problem(seed=seed, **options)
    return make_problem(seed=seed, evaluator=Quadratic(plain.profile, seed), **options)


def every(problem):
    maps = np.array([*product(range(len(problem.menu)), repeat=problem.num_decisions)])
    return maps[problem.feasible(maps)]


@pytest.mark.parametrize("seed", range(4))
def test_finds_a_better_map_than_the_knapsack_and_nearly_the_best(seed):
    problem = quadratic_problem(seed)
    rewards = np.sort(problem.evaluate(every(problem)).reward)[::-1]
    result = agents.make("clado").search(problem, evaluations=64, seed=0)
    knapsack, found = problem.evaluate(problem.mckp()[None]).reward[0], result.scores.reward[0]
    assert knapsack < found
    assert rewards[0] - found <= 0.1 * (rewards[0] - knapsack)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_predict_what_sums_do_not(seed):
    """Of the maps that a search has not seen, the form orders the good ones."""
    problem = quadratic_problem(seed)
    recorder = agents.Recorder(problem, evaluations=80)
    centre = problem.mckp()
    maps = every(problem)
    recorder.evaluate(centre[None])
    recorder.evaluate(neighbours(problem, centre, count=10))
    near = maps[((maps != centre).sum(1) == 2)]
    recorder.evaluate(near[np.random.default_rng(seed).permutation(len(near))[:40]])
    fit = _fitted(problem, centre, recorder)
    true = problem.evaluate(maps).kl - problem.evaluate(centre[None]).kl
    fresh = (maps != centre).sum(1) == 3
    both, alone = fit.loss(maps), fit.values[np.arange(len(centre)), maps].sum(1)
    missed = [np.mean((guess[fresh] - true[fresh]) ** 2) for guess in (both, alone)]
    assert max(fit.entangled) > 0
    assert missed[0] < 0.7 * missed[1]


@pytest.mark.parametrize("seed", range(4))
def test_the_local_search_is_near_the_program_s_optimum(seed):
    problem = quadratic_problem(seed)
    rng = np.random.default_rng(seed)
    decisions, formats = problem.sensitivity.shape
    centre = problem.mckp()
    cells = np.setdiff1d(np.arange(decisions * formats), np.arange(decisions) * formats + centre)
    reach = np.sqrt(problem.sensitivity.ravel()[cells])
    pairs = rng.normal(0, 0.5, (len(cells),) * 2) * np.multiply.outer(reach, reach)
    pairs = (pairs + pairs.T) / 2
    pairs[cells[:, None] // formats == cells // formats] = 0.0
    values = problem.sensitivity - problem.sensitivity[np.arange(decisions), centre][:, None]
    fit = LossFit(centre, values, cells, pairs)
    losses = np.sort(fit.loss(every(problem)))
    found = minimum(problem, fit, centre, set())
    assert fit.loss(found[None])[0] <= losses[4]
    other = minimum(problem, fit, centre, {found.tobytes()})
    assert not np.array_equal(other, found)
    assert problem.feasible(np.stack([found, other])).all()


def test_no_map_is_left_where_all_were_seen():
    problem = make_problem(layers=1, experts=2, bits="2,4")
    centre = problem.mckp()
    fit = LossFit(centre, problem.sensitivity, np.arange(0), np.zeros((0, 0)))
    seen = {one.tobytes() for one in every(problem)}
    assert minimum(problem, fit, centre, seen) is None


def test_pairs_of_one_layer_are_measured_first_and_all_are_within_limits():
    problem = make_problem(layers=3, experts=8)
    centre = problem.mckp()
    maps = _pairs(problem, centre, neighbours(problem, centre, count=6))
    moved = maps != centre
    layers = layer_of_decision(problem)
    apart = np.array([len(set(layers[one].tolist())) for one in moved]) - 1
    assert (moved.sum(1) == 2).all()
    assert (np.diff(apart) >= 0).all()
    assert set(apart.tolist()) == {0, 1}
    assert problem.feasible(maps).all()
    assert len({one.tobytes() for one in maps}) == len(maps)


def test_measured_maps_are_near_the_one_held():
    problem = quadratic_problem(0)
    agents.make("clado", rounds=3).search(problem, evaluations=40, seed=0)
    held = problem.evaluator.held
    assert len(held) == 3
    np.testing.assert_array_equal(held[0], problem.mckp())


def test_hardware_terms_count():
    """Where bytes cost more than they are worth, minima are narrow."""
    rich = entangled_problem(bits="2,3,4,8,16", avg_bits=8.0, weights="acc=1,mem=0.01")
    poor = entangled_problem(bits="2,3,4,8,16", avg_bits=8.0, weights="acc=1,mem=30")
    wide, narrow = (
        p.effective_bits(agents.make("clado").search(p, evaluations=24, seed=0).assignment[None])
        for p in (rich, poor)
    )
    assert narrow[0] < wide[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"singles": 1.0}, "singles is 1.0; it is a share"),
        ({"pairs": -0.1}, "pairs is -0.1"),
        ({"singles": 0.6, "pairs": 0.4}, "left for minima"),
        ({"batch": 0}, "batch is 0"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        agents.make("clado", **options)
