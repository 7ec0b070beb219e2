"""The final choice: nominated maps reach the finals, and fresh text alone decides there."""

import numpy as np
from factories import make_problem

from dmpq.agents import Recorder
from dmpq.agents.base import FINALISTS
from dmpq.evaluation import Evaluations, SurrogateEvaluator


class Favouring:
    """An evaluator to which one map is the best of all."""

    name = "favouring"

    def __init__(self, profile, favourite):
        self._inner, self._favourite = SurrogateEvaluator(profile), favourite
        self.asked = 0

    @property
    def tokens_spent(self):
        return 0.0

    def evaluate(self, assignments, *, fidelity=1.0):
        self.asked = len(assignments)
        found = self._inner.evaluate(assignments, fidelity=fidelity)
        kl = np.where((assignments == self._favourite).all(1), 0.0, found.kl)
        return Evaluations(kl, found.nll, found.router_shift, 0.0)


def searched(nominate):
    plain = make_problem(weights="acc=1")
    rng = np.random.default_rng(0)
    maps = np.unique(
        [plain.project(rng.random(plain.sizes.shape)) for _ in range(4 * FINALISTS)], axis=0
    )
    worst = maps[np.argmax(plain.evaluate(maps).kl)]
    selector = Favouring(plain.profile, worst)
    problem = make_problem(weights="acc=1", selector=selector)
    recorder = Recorder(problem, evaluations=len(maps) + 1)
    recorder.evaluate(problem.mckp()[None])
    recorder.evaluate(maps)
    if nominate:
        recorder.nominate(worst)
    return recorder.result(), worst, selector


def test_a_nominated_map_is_a_finalist_whatever_its_score():
    result, worst, selector = searched(nominate=True)
    np.testing.assert_array_equal(result.assignment, worst)
    assert selector.asked <= FINALISTS


def test_without_nomination_the_worst_is_no_finalist():
    result, worst, _ = searched(nominate=False)
    assert (result.assignment != worst).any()
