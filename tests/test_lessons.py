"""What a policy learns on some problems and keeps for others, and searches that begin with it."""

from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem

from dmpq.agents.lessons import Lesson, learn
from dmpq.agents.policy import Policy
from dmpq.agents.ppo import PPOAgent
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations
from dmpq.objective import Weights


class Misread:
    """A loss in which experts of large norm matter more than their sensitivities say."""

    name = "misread"
    tokens = 100
    tokens_spent = 0.0

    def __init__(self, problem):
        column = problem.feature_names.index("weight_norm")
        self.truth = np.exp(1.0 * problem.features[:, column].astype(float))
        self._losses = problem.sensitivity * self.truth[:, None]
        self._full_nll = problem.profile.full_nll

    def evaluate(self, assignments, *, fidelity=1.0):
        del fidelity
        maps = np.atleast_2d(assignments)
        kl = self._losses[np.arange(len(self._losses)), maps].sum(1)
        return Evaluations(kl, self._full_nll + kl, np.zeros(len(maps)), 0.0)

    def hold(self, assignment):
        """Do nothing: answers are free."""


def misread(layers, experts, seed, **options):
    plain = make_problem(
        layers=layers, experts=experts, seed=seed, weights="acc=1", **{"avg_bits": 3.0} | options
    )
    named = replace(plain.profile, fingerprint=f"model {seed}")
    plain = replace(plain, profile=named)
    return replace(plain, evaluator=Misread(plain))


@pytest.fixture(scope="module")
def policy():
    lessons = []
    for seed, (layers, experts) in enumerate([(4, 8), (2, 16), (3, 12)]):
        problem = misread(layers, experts, seed)
        result = PPOAgent().search(problem, evaluations=120, seed=seed)
        lessons.append(Lesson.of(problem, result))
    return learn(lessons, seed=0)


@pytest.mark.parametrize("avg_bits", [2.6, 3.0, 3.5])
def test_it_holds_on_a_model_that_it_was_not_trained_on(policy, avg_bits):
    other = misread(5, 10, 9, avg_bits=avg_bits)
    maps = np.stack([other.mckp(), policy.propose(other), other.propose(np.log(truth(other)))])
    first, found, best = other.evaluate(maps).kl
    assert found < first
    assert first - found > 0.3 * (first - best) > 0


def truth(problem):
    return problem.evaluator.truth


def test_it_survives_its_files(policy, tmp_path):
    policy.save(tmp_path)
    other = misread(5, 10, 9)
    again = Policy.load(tmp_path)
    assert (again.log_importance(other) == policy.log_importance(other)).all()
    assert again.training["lessons"] == "3"


def test_a_single_evaluation_is_the_policy_s_own_map(policy):
    other = misread(5, 10, 9)
    result = PPOAgent(start=policy).search(other, evaluations=1, seed=0)
    assert (result.assignment == policy.propose(other)).all()
    assert result.evaluations == 1
    assert (result.policy.propose(other) == result.assignment).all()


def test_a_search_goes_on_from_it_and_gets_further_than_from_none(policy):
    other = misread(5, 10, 9)
    started, blank = (
        PPOAgent(start=start).search(other, evaluations=12, seed=0) for start in (policy, None)
    )
    assert (started.history[0].assignment == other.mckp()).all()
    assert (started.history[1].assignment == policy.propose(other)).all()
    assert started.scores.kl[0] <= started.history[1].kl
    assert started.scores.kl[0] < blank.scores.kl[0]
    assert started.policy.config.embedding == 0
    assert started.policy.config.hidden == policy.config.hidden


def test_a_policy_goes_on_on_its_own_model_with_its_embedding():
    problem = misread(3, 8, 4)
    first = PPOAgent().search(problem, evaluations=60, seed=0)
    again = PPOAgent(start=first.policy).search(problem, evaluations=1, seed=1)
    assert (again.assignment == first.policy.propose(problem)).all()
    assert (again.policy.log_importance(problem) == first.policy.log_importance(problem)).all()


def test_what_does_not_hold_on_a_model_left_out_is_not_proposed(policy):
    """Importances at random teach nothing: what is learned by heart is shrunk away."""
    rng = np.random.default_rng(0)
    lessons = []
    for seed in range(4):
        problem = misread(3, 8, seed)
        lessons.append(Lesson(problem, rng.normal(0, 0.5, 24), np.full(24, 1 / 24)))
    random = learn(lessons, seed=0)
    assert float(random.training["shrinkage"]) < 0.3
    assert float(policy.training["shrinkage"]) > 0.7
    other = misread(5, 10, 9)
    by_heart = learn(lessons[:1], seed=0)  # nothing is told about other models
    assert by_heart.training["shrinkage"] == "1.000"
    spread = [float(np.std(one.log_importance(other))) for one in (random, by_heart)]
    assert spread[0] < 0.3 * spread[1]


def test_same_lessons_same_policy(policy):
    problem = misread(2, 6, 1)
    lesson = Lesson.of(problem, PPOAgent().search(problem, evaluations=30, seed=0))
    one, same, other = (learn([lesson], seed=seed, steps=20) for seed in (0, 0, 1))
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, same.weights[name])
    assert (one.log_importance(problem) != other.log_importance(problem)).any()


def test_lessons_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="no lessons"):
        learn([], seed=0)
    problems = misread(2, 6, 1), misread(2, 6, 2, bits="2,4,16")
    lessons = [Lesson(one, np.zeros(12), np.full(12, 1 / 12)) for one in problems]
    with pytest.raises(InputError, match="models of the same widths"):
        learn(lessons, seed=0)
    groups = misread(2, 6, 1, bits="2g32,3g32,4g32,8g32,16")
    learn([lessons[0], Lesson(groups, np.zeros(12), np.full(12, 1 / 12))], seed=0, steps=1)


def test_the_context_tells_one_policy_what_counts():
    """Experts with other importances at other weights: their rows alone cannot say which."""
    problem = misread(3, 12, 0, avg_bits=16.0)
    column = problem.features[:, problem.feature_names.index("weight_norm")].astype(float)
    lessons, told = [], {"acc=1": 0.8, "acc=1,lat=1": -0.8}
    for weights, slope in told.items():
        own = replace(problem, weights=Weights.parse(weights))
        lessons.append(Lesson(own, slope * column, np.full(len(column), 1 / len(column))))
    policy = learn(lessons, seed=0)
    between = replace(problem, weights=Weights.parse("acc=1,lat=0.4"))
    for lesson in lessons:
        missed = policy.log_importance(lesson.problem) - lesson.log_importance
        assert np.abs(missed).mean() < 0.1 * np.abs(lesson.log_importance).mean()
    slopes = [
        np.polyfit(column, policy.log_importance(one), 1)[0]
        for one in (lessons[0].problem, between, lessons[1].problem)
    ]
    assert slopes[0] > slopes[1] > slopes[2]
