"""The statistics of a comparison, against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from dmpq.referee.referee import Outcome
from dmpq.referee.report import curves, markdown, table
from dmpq.referee.standings import ALL, interquartile_mean, standings

ONE = Outcome(
    model="m",
    contest="bits=3",
    seed=0,
    agent="mckp",
    factor=1,
    kl=0.1,
    perplexity=3.0,
    accuracy=0.6,
    search_kl=0.1,
    effective_bits=2.99,
    memory_bytes=1.0,
    latency_s=1.0,
    energy_j=1.0,
    evaluations=1,
    tokens=2e6,
    allowed=3e6,
    seconds=1.0,
    curve=((2e6, 0.1),),
)


def outcomes(values, **more):
    return [replace(ONE, seed=seed, kl=kl, **more) for seed, kl in enumerate(values)]


def find(rows, agent, contest="bits=3"):
    return next(row for row in rows if (row.agent, row.contest) == (agent, contest))


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert np.isnan(interquartile_mean(np.array([])))


def test_an_agent_is_compared_with_the_reference_on_the_same_draw():
    rows = standings(
        outcomes([0.1, 0.2, 0.4, 0.8]) + outcomes([0.09, 0.18, 0.36, 0.72], agent="ppo")
    )
    ppo = find(rows, "ppo")
    assert ppo.over == pytest.approx(-0.1)  # in every draw, though draws differ eightfold
    assert (ppo.over_low, ppo.over_high) == pytest.approx((-0.1, -0.1))
    assert ppo.kl == pytest.approx(0.27)
    assert ppo.kl_low < ppo.kl < ppo.kl_high
    assert ppo.better == (4 + 3 + 2 + 1) / 16  # of all pairs of draws
    assert find(rows, "mckp").better == 0.5
    assert [row.agent for row in rows if row.contest == "bits=3"] == ["ppo", "mckp"]


def test_an_interval_covers_models_and_draws():
    base = outcomes([0.1] * 16) + outcomes([0.1] * 16, model="n")
    halves = [0.09, 0.11] * 8
    same = outcomes(halves, agent="a") + outcomes(halves, agent="a", model="n")
    apart = outcomes([0.09] * 16, agent="b") + outcomes([0.11] * 16, agent="b", model="n")
    rows = standings(base + same + apart)
    assert find(rows, "b").over_low == pytest.approx(-0.1)
    assert find(rows, "b").over_high == pytest.approx(0.1)
    assert -0.1 < find(rows, "a").over_low < find(rows, "a").over_high < 0.1
    assert find(rows, "a").over == pytest.approx(0.0, abs=1e-12)


def test_all_contests_together_weigh_alike_whatever_their_loss():
    base = outcomes([0.1] * 2) + outcomes([10.0] * 2, contest="bits=2")
    other = outcomes([0.05] * 2, agent="a") + outcomes([15.0] * 2, agent="a", contest="bits=2")
    row = find(standings(base + other), "a", ALL)
    assert row.over == pytest.approx(0.0)
    assert np.isnan(row.kl)
    assert (row.runs, row.better) == (4, 0.5)


def test_regret_is_against_the_best_that_more_evaluations_found():
    more = [replace(ONE, agent="ppo", factor=20, kl=0.08)]
    rows = standings(outcomes([0.1, 0.2]) + outcomes([0.16, 0.2], agent="ppo") + more)
    assert find(rows, "mckp").regret == pytest.approx(0.25)  # of seed 0 alone
    assert find(rows, "ppo").regret == pytest.approx(1.0)
    assert find(rows, "ppo").runs == 2
    lucky = standings([*outcomes([0.04]), *more])
    assert find(lucky, "mckp").regret == 0.0


def test_without_the_reference_there_is_an_order_and_no_ratio():
    rows = standings(outcomes([0.2], agent="a") + outcomes([0.1], agent="b"))
    assert [row.agent for row in rows if row.contest == "bits=3"] == ["b", "a"]
    assert np.isnan(find(rows, "a").over)
    assert "| a | 1 | 0.2000 |  |" in markdown(rows)


def test_tables_hold_every_agent_and_a_picture_every_panel():
    found = outcomes([0.1, 0.2]) + outcomes(
        [0.1, 0.2], agent="ppo", curve=((1e6, 0.3), (2e6, 0.2))
    )
    found += outcomes([0.3], contest="bits=2")
    rows = standings(found)
    text = markdown(rows)
    assert text.count("| mckp |") == 3
    assert "All contests together" in text
    assert table("bits=3", [row for row in rows if row.contest == "bits=3"]).row_count == 2
    figure = curves(found)
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == ["m, bits=3", "m, bits=2"]
    (line,) = [x for x in figure.axes[0].get_lines() if x.get_label() == "ppo"]
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.3], [2, 0.2]])
