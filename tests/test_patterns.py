"""The literature's exact facts, and the script that checks its patterns, on a tiny model."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build
from factories import make_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.bank import Bank
from dmpq.config import SearchConfig
from dmpq.data import Splits
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel, run_stacked
from dmpq.profiling import measure_profile
from dmpq.session import Session

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "patterns.json"
DEFAULT = Menu.parse("2,3,4,8,16")


@pytest.fixture(scope="module", autouse=True)
def script():
    """The benchmark's modules, which import each other as neighbours of a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import pattern_cases
        import pattern_claims
        import pattern_measures
        import pattern_tables
        import patterns

        yield SimpleNamespace(
            cases=pattern_cases,
            claims=pattern_claims,
            measures=pattern_measures,
            tables=pattern_tables,
            command=patterns,
        )
        for name in [name for name in sys.modules if name.startswith("pattern")]:
            del sys.modules[name]


def routed_by(router, hidden, k):
    """Return the sets of experts that a linear router selects, by brute force."""
    logits = hidden @ router.T
    return [frozenset(np.argsort(-row, kind="stable")[:k].tolist()) for row in logits]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(3, 9), k=st.integers(1, 2))
def test_a_router_s_radius_is_exact(seed, experts, k):
    from pattern_measures import radius

    rng = np.random.default_rng(seed)
    router, hidden = rng.normal(size=(experts, 6)), rng.normal(size=(1, 6))
    found = float(radius(torch.from_numpy(hidden), torch.from_numpy(router), k)[0])
    before = routed_by(router, hidden, k)
    steps = rng.normal(size=(64, 6))
    steps *= found * (1 - 1e-9) / np.linalg.norm(steps, axis=1, keepdims=True)
    assert set(routed_by(router, hidden + steps, k)) == set(before)
    inside = sorted(before[0])
    outside = sorted(set(range(experts)) - before[0])
    apart = [router[j] - router[i] for i in inside for j in outside]
    towards = np.array([found * (1 + 1e-6) * d / np.linalg.norm(d) for d in apart])
    assert any(set_ != before[0] for set_ in routed_by(router, hidden + towards, k))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_constant_added_to_all_router_rows_changes_neither_selection_nor_radius(seed):
    from pattern_measures import radius

    rng = np.random.default_rng(seed)
    router, hidden = rng.normal(size=(8, 6)), rng.normal(size=(5, 6))
    shifted = router + 3 * rng.normal(size=6)
    assert routed_by(router, hidden, 2) == routed_by(shifted, hidden, 2)
    radii = [
        radius(torch.from_numpy(hidden), torch.from_numpy(rows), 2) for rows in (router, shifted)
    ]
    torch.testing.assert_close(radii[0], radii[1], rtol=1e-8, atol=0)


def test_a_model_whose_router_rows_are_shifted_says_the_same(token_ids):
    moe = MoEModel(build("olmoe"), name="shifted")
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        before = moe.logits(token_ids)
        for container in moe.containers:
            container.router.data += torch.randn(32, generator=generator)
        after = moe.logits(token_ids)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)  # fp32


@pytest.fixture(scope="module")
def top_one():
    """One MoE layer's variants, an input, and a random top-1 routing."""
    bank = Bank(MoEModel(build("olmoe"), name="tiny"), DEFAULT)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(96, 32, generator=generator)
    index = torch.randint(0, 8, (96, 2), generator=generator)
    index[:, 1] = (index[:, 0] + 1 + torch.randint(0, 7, (96,), generator=generator)) % 8
    return bank.layers[0], hidden, index, torch.rand(96, 2, generator=generator)


def squared_error(layer, hidden, index, weights, choice):
    outputs = [
        run_stacked(layer.experts.stacked(*layer.select(c)), hidden, index, weights)
        for c in (choice, np.full((8, 2), len(DEFAULT) - 1))
    ]
    return float((outputs[0].double() - outputs[1].double()).square().sum())


@settings(max_examples=10, deadline=None)
@given(formats=st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_squared_errors_add_exactly_for_top_1_and_fixed_routing(top_one, formats):
    layer, hidden, index, weights = top_one
    index, weights = index[:, :1], weights[:, :1]
    alone = np.full((8, 8, 2), len(DEFAULT) - 1)
    alone[np.arange(8), np.arange(8)] = np.array(formats)[:, None]
    parts = [squared_error(layer, hidden, index, weights, choice) for choice in alone]
    together = squared_error(layer, hidden, index, weights, np.repeat([formats], 2, 0).T)
    assert together == pytest.approx(sum(parts), rel=1e-5)


def test_squared_errors_do_not_add_for_top_2(top_one):
    layer, *rest = top_one
    alone = np.full((8, 8, 2), len(DEFAULT) - 1)
    alone[np.arange(8), np.arange(8)] = 0
    parts = sum(squared_error(layer, *rest, choice) for choice in alone)
    assert squared_error(layer, *rest, np.zeros((8, 2), int)) != pytest.approx(parts, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    errors=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8),
    moves=st.lists(st.floats(-2, 2), min_size=8, max_size=8),
)
def test_the_head_room_is_what_the_best_continuous_widths_gain(errors, moves):
    errors = np.array(errors)
    profile = make_profile(layers=1, experts=8)
    measured = profile.output_error.copy()
    measured[:, 0] = errors
    profile = replace(profile, output_error=measured)
    best = np.log2(errors) / 2
    best -= best.mean()  # widths above the average, by the law of 4 per bit

    def lost(widths):
        return float((errors * 4.0**-widths).sum())

    gain = errors.sum() / lost(best)
    assert profile.head_room()["within_layers"] == pytest.approx(gain)
    moved = best + np.array(moves) - np.mean(moves)
    assert lost(moved) >= lost(best) * (1 - 1e-12)


@pytest.fixture(scope="module")
def identical(script, token_ids):
    moe = MoEModel(build("olmoe"), name="upcycled")
    script.measures.tie_experts(moe)
    evaluator = ModelEvaluator(Bank(moe, DEFAULT), token_ids.numpy(), label="profile")
    return measure_profile(evaluator, text="random", signal="gradient")


@pytest.mark.parametrize(
    "signal", ["weight_norm", "kurtosis", "outlier_ratio", "max_row_variance"]
)
def test_weights_of_upcycled_experts_tell_nothing(identical, signal):
    by_layer = getattr(identical, signal).reshape(2, 8)
    assert (by_layer == by_layer[:, :1]).all()
    assert len(set(by_layer[:, 0])) == 2  # other layers have another expert


def test_usage_still_tells_upcycled_experts_apart(identical):
    assert len(set(identical.frequency[:8])) > 1


class TinySubject:
    """What :class:`pattern_measures.Subject` is, on a random model and random text."""

    def __new__(cls, script, windows):
        measures = script.measures

        class Tiny(measures.Subject):
            def __init__(self):
                self.name, self.group = "tiny", 128
                self.settings = measures.Settings(
                    models=("tiny",),
                    draws=(0, 1),
                    budgets=(2.25, 2.5),
                    random_maps=1,
                    hessian_probes=1,
                    batches=(1,),
                    devices=("h100/gemlite",),
                )
                config = SearchConfig(
                    signal="gradient",
                    weights="acc=1",
                    avg_bits=16.0,
                    cost_geometry="olmoe-1b-7b",
                )
                splits = Splits(*[windows] * 5, source="random", drawn=None)
                moe = MoEModel(build("olmoe"), name="tiny")
                self.session = Session(config)
                self.session.__dict__.update(
                    _loaded=(moe, None), splits=splits, bank=Bank(moe, self.session.menu)
                )

            def drawn(self, draw, **options):
                found = super().drawn(draw, **options)
                found.__dict__["splits"] = self.session.splits
                return found

        return Tiny()


@pytest.fixture(scope="module")
def figures(script, token_ids):
    subject, measures = TinySubject(script, token_ids.numpy()), script.measures
    found = {}
    parts = (
        measures.full,
        measures.drawn_maps,
        measures.granularity,
        measures.sides,
        measures.routing,
    )
    for part in parts:
        for table, row in part(subject):
            found.setdefault(table, []).append({"model": "tiny", **row})
    return found


def test_every_rule_is_judged_at_its_budget(script, figures):
    rows, cases = figures["maps"], script.cases
    rules = {row["rule"] for row in cases.chosen(rows, budget=2.5)}
    assert rules == {
        cases.FAIR,
        cases.RANDOM,
        "error-model",
        *cases.SINGLE_SIGNALS,
        *cases.PROGRAMS,
    }
    assert {row["rule"] for row in cases.chosen(rows, budget=2.25)} == {
        cases.FAIR,
        "error-model",
        *cases.PROGRAMS,
    }
    for row in rows:
        assert row["mean_bits"] <= row["budget"]
        assert row["kl"] > 0
    assert max(row["mean_bits"] for row in rows if row["budget"] == 2.5) == 2.5
    assert json.loads(json.dumps(figures)) == figures


def test_routing_of_the_tiny_model_shifts_and_no_certified_token_does(figures):
    by_bits = {row["bits"]: row for row in figures["routing"]}
    assert by_bits[2]["new"] > by_bits[4]["new"] > 0
    assert by_bits[4]["certified"] > by_bits[2]["certified"] > 0
    assert all(row["flips"] == 0 for row in by_bits.values())


def test_finer_choices_and_sides_are_measured(script, figures):
    assert {row["rule"] for row in figures["granularity"]} == {"projection", "expert", "layer"}
    sides = {(row["side"], row["bits"]): row for row in figures["sides"]}
    for side, weights in (("gate_up", 2 * 8 * 2 * 16 * 32), ("down", 2 * 8 * 16 * 32)):
        row = sides[side, 2]
        assert row["kl_per_million"] == pytest.approx(row["kl"] / weights * 1e6)


def test_a_claim_on_no_figures_is_refused(script):
    with pytest.raises(LookupError, match="no figures"):
        script.cases.chosen([{"model": "tiny"}], model="huge")


def test_the_published_page_is_what_its_figures_say(script):
    known = json.loads(RESULTS.read_text("utf-8"))
    page = script.tables.page(known["settings"], known["figures"])
    assert (ROOT / "docs" / "patterns.md").read_text("utf-8") == page
    assert known["settings"] == script.measures.described(script.measures.Settings())


def test_every_claim_has_cases_or_says_why_not(script):
    figures = json.loads(RESULTS.read_text("utf-8"))["figures"]
    keys = [claim.key for claim in script.claims.CLAIMS]
    assert len(keys) == len(set(keys))
    assert {key.rstrip("abcd") for key in keys} == {str(n) for n in range(1, 13)}
    for claim in script.claims.CLAIMS:
        verdict, right, cases = claim.verdict(figures)
        if claim.tested is None:
            assert (verdict, right, cases) == ("not testable here", 0, 0)
        else:
            assert cases > 0
            assert verdict == ("reproduced" if right == cases else "not reproduced")


def test_a_case_of_equal_maps_is_void(script):
    def figures(kl):
        rows = [
            {"model": "tiny", "budget": 3.0, "rule": rule, "kl": value}
            for rule, value in (("frequency", 0.5), ("inverse-frequency", kl))
        ]
        return {"maps": rows}

    (claim,) = (claim for claim in script.claims.CLAIMS if claim.key == "10c")
    assert claim.verdict(figures(0.5)) == ("not testable here", 0, 0)
    assert claim.verdict(figures(0.6)) == ("reproduced", 1, 1)
    assert claim.verdict(figures(0.4)) == ("not reproduced", 0, 1)


def test_check_tells_numbers_and_verdicts_that_changed(script):
    known = json.loads(RESULTS.read_text("utf-8"))
    again = json.loads(RESULTS.read_text("utf-8"))
    changes = script.command.changes
    assert not list(changes(known, again))
    again["figures"]["uniform"][0]["kl"] *= 1.001
    assert not list(changes(known, again))
    again["figures"]["uniform"][0]["kl"] *= 1.1
    (only,) = changes(known, again)
    assert only.startswith("uniform 0 kl: ")
    again["figures"]["routing"][0]["flips"] = 5
    assert any(line.startswith("12c: ") for line in changes(known, again))
    again["settings"]["draws"] = [9]
    assert "settings" in next(changes(known, again))
