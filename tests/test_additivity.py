"""The additivity report: sums that are exact, losses that interact, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem

from dmpq.additivity import main, measure_additivity
from dmpq.evaluation import Evaluations, SurrogateEvaluator


class Interacting:
    """Sums of sensitivities, and a share more for every pair of one layer that loses."""

    name = "interacting"
    tokens_spent = 0.0

    def __init__(self, profile, within=0.0, noise=0.0):
        self._sums, self._profile = SurrogateEvaluator(profile), profile
        self._layers = profile.spec.layer_of_expert
        self._within, self._rng, self._noise = within, np.random.default_rng(0), noise

    def evaluate(self, assignments, *, fidelity=1.0):
        found = self._sums.evaluate(assignments, fidelity=fidelity)
        own = self._profile.sensitivity[np.arange(assignments.shape[1]), assignments]
        more = np.zeros(len(own))
        for layer in np.unique(self._layers):
            part = own[:, self._layers == layer]
            more += self._within * ((part > 0).sum(1) > 1) * part.sum(1)
        kl = found.kl + more
        kl = kl * (1 + self._noise * self._rng.standard_normal(len(kl)))
        return Evaluations(kl, found.nll, found.router_shift, 0.0)

    def hold(self, assignment):
        """Do nothing: answers are free."""


def report_of(**options):
    plain = make_problem(layers=3, experts=8, weights="acc=1")
    problem = replace(plain, evaluator=Interacting(plain.profile, **options))
    seen = []
    report = measure_additivity(
        problem, maps=24, pairs=12, seed=0, progress=lambda *done: seen.append(done)
    )
    assert seen == [(i + 1, 2 * 24 + 6 * 12) for i in range(2 * 24 + 6 * 12)]
    return report


def test_where_losses_add_up_all_agrees():
    report = report_of()
    for agreement in (report.random, report.near):
        assert agreement.maps == 24
        assert agreement.spearman == pytest.approx(1)
        assert agreement.r2 == pytest.approx(1)
        assert agreement.ratio == pytest.approx(1)
    for interaction in (report.within, report.across):
        assert interaction.pairs == 12
        assert interaction.mean == pytest.approx(0, abs=1e-9)
    assert report.verdict.startswith("Additive is fine here")


def test_interactions_are_told_where_they_are():
    report = report_of(within=0.5)
    assert report.within.mean == pytest.approx(0.5)
    assert report.within.std == pytest.approx(0, abs=1e-9)
    assert report.across.mean == pytest.approx(0, abs=1e-9)
    assert report.near.ratio == pytest.approx(1.5, abs=0.01)


def test_sums_that_say_little_are_said_to():
    report = report_of(noise=0.3)
    assert report.near.spearman < 0.9
    assert "true losses" in report.verdict


def test_where_nothing_is_lost_nothing_is_divided_by():
    problem = make_problem(layers=2, experts=4, bits="16", avg_bits=None, weights="acc=1")
    report = measure_additivity(problem, maps=3, pairs=2, seed=0)
    assert (report.near.spearman, report.near.ratio) == (0.0, 1.0)
    assert (report.within.pairs, report.within.mean) == (0, 0.0)


def test_the_command_writes_and_shows(tmp_path, capsys):
    flags = ["--profile-tokens=256", "--search-tokens=256", "--selection-tokens=128"]
    flags += ["--heldout-tokens=128", "--bits=2,4,16", "--threads=1", "--maps=3", "--pairs=2"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert "near the knapsack's" in told
    assert "across layers" in told
    found = json.loads((tmp_path / "additivity.json").read_text())
    assert found["near"]["maps"] == 3
    assert found["within"]["pairs"] == 2
    assert found["verdict"] in " ".join(told.split())  # wherever the terminal folds it
    assert main([*flags, "--pairs=1", f"--out={tmp_path}"]) == 2
    assert "2 or more" in capsys.readouterr().err
