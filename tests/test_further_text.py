"""Further text: pieces of it, maps that are counted on them, and a search that holds elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import build
from factories import make_problem

from dmpq.agents import OutOfEvaluations, Recorder
from dmpq.agents.ppo import PPOAgent
from dmpq.bank import Bank
from dmpq.evaluation import Evaluations
from dmpq.files import JsonLines
from dmpq.formats import Menu
from dmpq.further_text import FurtherText
from dmpq.moe import MoEModel
from dmpq.objective import Constraints


class Text:
    """A text on which some sensitivities are larger and some smaller than on all texts."""

    name = "text"
    tokens = 100

    def __init__(self, profile, truth, seed, spread=0.5):
        rng = np.random.default_rng(seed)
        own = rng.lognormal(0, spread, len(truth)) * rng.lognormal(0, 0.2)
        self._losses = profile.sensitivity * (truth * own)[:, None]
        self._full_nll = profile.full_nll
        self.tokens_spent = 0.0
        self.maps = 0

    def evaluate(self, assignments, *, fidelity=1.0):
        del fidelity
        maps = np.atleast_2d(assignments)
        self.maps += len(maps)
        tokens = float(self.tokens * len(maps))
        self.tokens_spent += tokens
        kl = self._losses[np.arange(len(self._losses)), maps].sum(1)
        return Evaluations(kl, self._full_nll + kl, np.zeros(len(maps)), tokens)

    def hold(self, assignment):
        """Do nothing: no answer resumes."""


def problem_with_texts(texts=40, *, pieces=1.0, seed=0, **options):
    plain = make_problem(layers=4, experts=8, weights="acc=1", **options)
    truth = np.random.default_rng(seed).lognormal(0, 0.5, plain.num_decisions)
    further = [Text(plain.profile, truth, 1000 * seed + i) for i in range(1, texts + 1)]
    for text in further:
        text.tokens = int(100 * pieces)
    problem = replace(
        plain,
        evaluator=Text(plain.profile, truth, 1000 * seed),
        selector=Text(plain.profile, truth, 1000 * seed + 999),
        further=further,
    )
    return problem, Text(plain.profile, truth, 0, spread=0.0)


def test_pieces_are_whole_and_one_is_kept(tmp_path):
    bank = Bank(MoEModel(build("olmoe"), name="tiny"), Menu.parse("2g16,16"))
    windows = np.random.default_rng(0).integers(0, 60, (7, 16))
    journal = JsonLines(tmp_path / "journal.jsonl")
    further = FurtherText(bank, windows, tokens=40, journal=journal)
    assert len(further) == 3
    assert [piece.tokens for piece in further] == [32] * 3
    assert further[1] is further[1]
    first = further[0]
    assert further[-1].evaluate(np.zeros((1, 16), int)).kl[0] > 0
    assert further[0] is not first, "made anew, since another was asked for"
    np.testing.assert_array_equal(first.id_batches[0].numpy(), windows[:2])
    with pytest.raises(IndexError):
        further[3]
    assert [piece.tokens for piece in further[1:]] == [32, 32]
    assert len(FurtherText(bank, windows[:1], tokens=40)) == 0
    (kept,) = journal
    journal.close()
    assert kept["text"].startswith("further 2:")


def test_a_map_counts_as_its_share_and_so_does_full_precision_once():
    problem, _ = problem_with_texts(pieces=0.25)
    seen = []
    recorder = Recorder(problem, evaluations=3, on_candidate=seen.append)
    maps = np.stack([problem.uniform("2"), problem.mckp()])
    recorder.read(maps, text=5)
    assert recorder.left == 3 - 3 * 0.25
    recorder.read(maps, text=5)
    assert recorder.left == 3 - 3 * 0.25
    assert recorder.remaining == 2
    recorder.read(maps[:1], text=6)
    assert recorder.left == 3 - 5 * 0.25
    recorder.evaluate(maps[:1])
    assert recorder.left == 2 - 5 * 0.25
    assert [(one.text, one.spent) for one in seen] == [
        (5, 0.75),
        (5, 0.75),
        (6, 1.25),
        (None, 2.25),
    ]
    assert [one.evaluation for one in seen] == [1, 2, 3, 4]
    assert seen[-1].tokens == 25 * 5 + 100  # asked for again is measured again, by this text


def test_what_is_not_left_is_not_read():
    problem, _ = problem_with_texts()
    recorder = Recorder(problem, evaluations=2)
    with pytest.raises(OutOfEvaluations):
        recorder.read(np.stack([problem.uniform("2"), problem.mckp()]), text=0)
    assert problem.further[0].maps == 0
    assert recorder.left == 2
    recorder.read(problem.mckp()[None], text=0)
    assert recorder.remaining == 0


def test_what_was_read_cannot_be_the_result():
    problem, _ = problem_with_texts()
    recorder = Recorder(problem, evaluations=8)
    recorder.read(problem.mckp()[None], text=0)
    recorder.evaluate(problem.uniform("2")[None])
    result = recorder.result()
    assert (result.assignment == 0).all()
    assert result.evaluations == 1
    assert [one.text for one in result.history] == [0, None]


@pytest.mark.parametrize(
    ("pieces", "evaluations", "last_samples"), [(1.0, 120, 0), (1.0, 120, 6), (1.5, 180, 6)]
)
def test_ppo_spends_no_more_than_it_may(pieces, evaluations, last_samples):
    problem, _ = problem_with_texts(pieces=pieces)
    seen = []
    search = PPOAgent(last_samples=last_samples).search
    result = search(problem, evaluations=evaluations, seed=0, on_candidate=seen.append)
    assert tuple(seen) == result.history
    assert evaluations - 1 - 19 * pieces < seen[-1].spent <= evaluations
    assert len({one.text for one in seen} - {None}) >= 5
    own = [one.assignment.tolist() for one in seen if one.text is None]
    assert own[0] == problem.mckp().tolist()
    # The knapsack's map, the last mean's and those of the samples near it, some of them alike.
    assert result.evaluations == len(own) <= 2 + last_samples
    assert len(own) == 2 if not last_samples else len(own) > 2
    assert result.assignment.tolist() in own


def test_ppo_spends_no_more_tokens_than_it_may():
    problem, _ = problem_with_texts()
    limited = replace(problem, max_tokens=12000.0)
    result = PPOAgent().search(limited, evaluations=1, seed=0)
    assert 10500 < result.tokens <= 12000


def test_few_evaluations_are_spent_on_the_search_s_own_text():
    problem, _ = problem_with_texts()
    result = PPOAgent().search(problem, evaluations=20, seed=0)
    assert {one.text for one in result.history} == {None}


def test_a_search_on_more_text_than_a_piece_stays_there():
    problem, _ = problem_with_texts(pieces=0.5)
    result = PPOAgent().search(problem, evaluations=100, seed=0)
    assert {one.text for one in result.history} == {None}


def test_a_search_within_a_time_stays_on_its_own_text():
    problem, _ = problem_with_texts(avg_bits=None)
    middle = float(np.median(problem.costs(np.arange(5)[:, None].repeat(32, 1)).latency_s))
    limited = replace(problem, constraints=Constraints(latency_s=middle))
    result = PPOAgent().search(limited, evaluations=60, seed=0)
    assert {one.text for one in result.history} == {None}


def test_texts_are_read_again_where_there_are_no_more():
    problem, _ = problem_with_texts(texts=2)
    result = PPOAgent().search(problem, evaluations=150, seed=0)
    assert {one.text for one in result.history} == {None, 0, 1}


def test_what_many_texts_say_holds_on_all():
    """Searches of one length, judged where no text is odd."""
    lost = {}
    for further in (True, False):
        for seed in range(2):
            problem, judge = problem_with_texts(seed=seed)
            result = PPOAgent(further=further).search(problem, evaluations=200, seed=seed)
            maps = np.stack([problem.mckp(), result.assignment])
            first, found = judge.evaluate(maps).kl
            lost[further, seed] = found / first
    many, one = (1 - np.mean([lost[way, seed] for seed in range(2)]) for way in (True, False))
    assert many > 0.03
    assert many > 1.5 * one
