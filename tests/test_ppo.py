"""The reinforcement learners: better than their start, within the budget, the same every time."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from factories import make_problem

from dmpq.agents.maskable_ppo import MaskablePPOAgent
from dmpq.agents.networks import AntitheticGaussian
from dmpq.agents.ppo import PPOAgent
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations

AGENTS = {
    "ppo": PPOAgent(),
    "maskable-ppo": MaskablePPOAgent(episodes=16, episodes_per_update=8),
}


class Misjudged:
    """A loss that the sensitivities misjudge: late layers matter far more than they say."""

    name = "misjudged"
    tokens_spent = 0.0

    def __init__(self, profile):
        self.profile = profile
        self.calls = []

    def evaluate(self, assignments, *, fidelity=1.0):
        del fidelity
        maps = np.atleast_2d(assignments)
        self.calls.extend(map(tuple, maps.tolist()))
        weight = np.exp(4.0 * self.profile.spec.layer_of_expert)
        sensitivity = self.profile.sensitivity * weight[:, None]
        kl = sensitivity[np.arange(len(sensitivity)), maps].sum(1)
        return Evaluations(kl, self.profile.full_nll + kl, np.zeros(len(maps)), 0.0)

    def hold(self, assignment):
        """Do nothing: answers are free."""


def misjudged_problem(**kwargs):
    plain = make_problem(**kwargs)
    return make_problem(evaluator=Misjudged(plain.profile), **kwargs)


@pytest.mark.parametrize("name", AGENTS)
def test_stays_within_the_budget_of_distinct_maps(name):
    problem = misjudged_problem()
    seen = []
    result = AGENTS[name].search(problem, evaluations=25, seed=0, on_candidate=seen.append)
    assert len(set(problem.evaluator.calls)) <= 25
    assert len(seen) == result.evaluations == len(result.history) <= 25
    assert [candidate.evaluation for candidate in seen] == list(range(1, len(seen) + 1))
    assert problem.feasible(result.assignment[None]).all()
    assert result.scores.reward[0] == max(candidate.reward for candidate in seen)


@pytest.mark.parametrize("name", AGENTS)
def test_same_seed_same_search(name):
    first, again, other = (
        AGENTS[name].search(misjudged_problem(), evaluations=25, seed=seed) for seed in (3, 3, 4)
    )
    maps = [[c.assignment.tolist() for c in r.history] for r in (first, again, other)]
    assert maps[0] == maps[1]
    assert maps[0] != maps[2]


def test_same_seed_same_search_in_another_process():
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'tests');"
        "from test_ppo import fingerprint; print(fingerprint())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == fingerprint()


def fingerprint():
    """Return every map of a short search, and the policy's weights, as text."""
    result = PPOAgent().search(misjudged_problem(), evaluations=40, seed=1)
    maps = [candidate.assignment.tolist() for candidate in result.history]
    weights = {name: value.tobytes().hex() for name, value in result.policy.weights.items()}
    return str((maps, weights))


@pytest.mark.parametrize("name", AGENTS)
def test_leaves_the_callers_generators_alone(name):
    torch.manual_seed(0)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    AGENTS[name].search(make_problem(), evaluations=3, seed=9)
    assert (torch.get_rng_state() == expected[0]).all()
    assert random.getstate() == expected[1]
    assert (np.random.get_state()[1] == expected[2]).all()  # noqa: NPY002


def test_ppo_starts_at_the_knapsack_and_improves_on_it():
    problem = misjudged_problem()
    result = PPOAgent().search(problem, evaluations=200, seed=0)
    first = result.history[0]
    assert (first.assignment == problem.mckp()).all()
    assert result.scores.reward[0] > first.reward


def test_learning_beats_random_perturbations():
    """The gain over the knapsack, against that of the same search without learning."""

    def gain(**options):
        problem = misjudged_problem(layers=2, experts=16)
        result = PPOAgent(**options).search(problem, evaluations=200, seed=0)
        return result.scores.reward[0] - result.history[0].reward

    learned, drawn = gain(), gain(learning_rate=0.0, imitation=0, probe_share=0.0)
    assert learned > 1.2 * drawn > 0


def test_without_epochs_the_imitation_learns_alone():
    problem = misjudged_problem(layers=2, experts=16)
    result = PPOAgent(epochs=0).search(problem, evaluations=60, seed=0)
    assert result.scores.reward[0] > result.history[0].reward
    assert np.any(result.policy.log_importance(problem) != 0)
    still = PPOAgent(epochs=0, imitation=0).search(problem, evaluations=20, seed=0)
    assert (still.policy.log_importance(problem) == 0).all()


def test_one_evaluation_is_enough():
    result = PPOAgent().search(make_problem(), evaluations=1, seed=0)
    assert result.evaluations == 1
    assert result.policy is not None


def test_a_problem_with_few_maps_ends():
    """Duplicates are free, but not without end."""
    problem = make_problem(layers=1, experts=2)
    result = PPOAgent().search(problem, evaluations=50, seed=0)
    assert result.evaluations < 50


@pytest.mark.parametrize(
    "make",
    [
        lambda: PPOAgent(samples=3),
        lambda: PPOAgent(std=0.0),
        lambda: PPOAgent(learning_rate=float("nan")),
        lambda: PPOAgent(embedding=-1),
        lambda: PPOAgent(imitation=-1),
        lambda: PPOAgent(imitation=1.5),
        lambda: PPOAgent(samples=8.0),
        lambda: PPOAgent(std_decay=2.0),
        lambda: PPOAgent(probe_share=1.0),
        lambda: PPOAgent(imitation_rate=-1.0),
        lambda: PPOAgent(target_kl=0.0),
        lambda: MaskablePPOAgent(episodes=0),
        lambda: MaskablePPOAgent(learning_rate=0.0),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_samples_come_in_mirrored_pairs():
    noise = AntitheticGaussian(3).proba_distribution(torch.ones(1, 3), torch.zeros(1))
    first, mirrored, fresh = (noise.sample() for _ in range(3))
    torch.testing.assert_close(first + mirrored, torch.full((1, 3), 2.0))
    assert (fresh != first).all()
