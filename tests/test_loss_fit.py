"""The loss around a map: what is fitted is what was measured, and nothing that was not."""

import numpy as np
import pytest

from dmpq.agents.loss_fit import fitted

DECISIONS, FORMATS = 6, 3
LAYERS = np.repeat([0, 1], 3)
CENTRE = np.ones(DECISIONS, np.int64)


def known(seed=0, entangled=0.3):
    """Return what steps add, (D, B), roots of the most that pairs add, and pairs (DB, DB)."""
    rng = np.random.default_rng(seed)
    alone = rng.uniform(0.5, 2, (DECISIONS, FORMATS)) * [1.0, 0.0, -0.4]
    reach = np.sqrt(np.abs(alone) + 1e-12)
    vectors = rng.normal(0, 1, (DECISIONS * FORMATS, 4))
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    pairs = entangled * (vectors @ vectors.T) * np.multiply.outer(reach.ravel(), reach.ravel())
    own = np.arange(DECISIONS * FORMATS) // FORMATS
    pairs[own[:, None] == own] = 0.0
    centre = np.arange(DECISIONS) * FORMATS + CENTRE
    pairs[centre] = 0.0
    pairs[:, centre] = 0.0
    return alone, reach, pairs


def losses(maps, alone, pairs):
    taken = np.arange(DECISIONS) * FORMATS + maps
    both = pairs[taken[:, :, None], taken[:, None, :]].sum((1, 2)) / 2
    return alone[np.arange(DECISIONS), maps].sum(1) + both


def singles():
    moved = np.repeat(CENTRE[None], 2 * DECISIONS, axis=0)
    moved[np.arange(2 * DECISIONS), np.repeat(np.arange(DECISIONS), 2)] = [0, 2] * DECISIONS
    return moved


def drawn(count, seed=1):
    rng = np.random.default_rng(seed)
    maps = np.unique(rng.integers(0, FORMATS, (count, DECISIONS)), axis=0)
    return maps[(maps != CENTRE).any(1)]


@pytest.mark.parametrize("unit", [1.0, 1e-3, 50.0])
def test_singles_are_learned_in_whatever_unit_the_rule_is(unit):
    alone, _, pairs = known(entangled=0.0)
    misjudged = alone * np.exp(np.random.default_rng(3).normal(0, 0.3, alone.shape)) / unit
    fit = fitted(CENTRE, misjudged, singles(), losses(singles(), alone, pairs), layers=LAYERS)
    np.testing.assert_allclose(fit.values, alone, rtol=0.02)
    assert not fit.pairs.any()


def test_a_step_that_was_not_measured_keeps_the_rule_s_value_in_nats():
    alone, _, pairs = known(entangled=0.0)
    maps = singles()[2:]  # not those of the first decision
    fit = fitted(CENTRE, alone / 7 + 3.0, maps, losses(maps, alone, pairs), layers=LAYERS)
    np.testing.assert_allclose(fit.values, alone, rtol=1e-6, atol=1e-9)


def test_a_rule_that_is_wrong_in_sign_is_put_right():
    alone, _, pairs = known(entangled=0.0)
    fit = fitted(CENTRE, -alone, singles(), losses(singles(), alone, pairs), layers=LAYERS)
    # Twice the value is four prior deviations away, so that shrinking shows.
    np.testing.assert_allclose(fit.values, alone, rtol=0.2)


def test_pairs_that_were_measured_are_found_and_others_are_zero():
    alone, reach, pairs = known(entangled=1.0)
    one, other = np.unravel_index(np.abs(pairs).argmax(), pairs.shape)
    pair = CENTRE.copy()
    for cell in (one, other):
        pair[cell // FORMATS] = cell % FORMATS
    maps = np.concatenate([singles(), pair[None]])
    fit = fitted(
        CENTRE, alone, maps, losses(maps, alone, pairs), layers=LAYERS, reach=reach * np.sqrt(2)
    )
    first, second = (np.flatnonzero(fit.cells == cell)[0] for cell in (one, other))
    found, true = fit.pairs[first, second], pairs[one, other]
    assert 0.3 < found / true <= 1.001
    others = fit.pairs.copy()
    others[first, second] = others[second, first] = 0.0
    assert not others.any()


def test_what_is_learned_of_pairs_predicts_other_maps():
    alone, reach, pairs = known()
    seen, fresh = drawn(150), drawn(300, seed=2)
    fresh = np.array([m for m in fresh if not (seen == m).all(1).any()])
    true = losses(fresh, alone, pairs)
    missed, entangled = {}, {}
    for name, used in (("pairs", reach * np.sqrt(2)), ("none", None)):
        fit = fitted(CENTRE, alone, seen, losses(seen, alone, pairs), layers=LAYERS, reach=used)
        entangled[name] = fit.entangled
        missed[name] = np.sqrt(np.mean((fit.loss(fresh) - true) ** 2))
    assert missed["pairs"] < 0.5 * missed["none"]
    assert entangled["none"] == (0.0, 0.0)
    assert min(entangled["pairs"]) > 0


def test_a_loss_that_adds_up_has_no_pairs():
    alone, reach, pairs = known(entangled=0.0)
    seen = drawn(80)
    fit = fitted(CENTRE, alone, seen, losses(seen, alone, pairs), layers=LAYERS, reach=reach)
    assert fit.entangled == (0.0, 0.0)
    assert not fit.pairs.any()


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_no_more_entangled_than_errors_allow(seed):
    """Whatever was measured: here, noise as large as the losses."""
    alone, reach, _ = known(seed)
    seen = drawn(60, seed)
    noise = np.random.default_rng(seed).normal(0, 3, len(seen))
    fit = fitted(CENTRE, alone, seen, noise, layers=LAYERS, reach=reach)
    scale = np.multiply.outer(*[reach.ravel()[fit.cells]] * 2)
    assert (np.abs(fit.pairs) <= scale * (1 + 1e-9)).all()
    np.testing.assert_array_equal(fit.pairs, fit.pairs.T)
    assert not fit.pairs.diagonal().any()


def test_the_marginal_is_what_a_change_adds():
    alone, reach, pairs = known()
    seen = drawn(150)
    fit = fitted(CENTRE, alone, seen, losses(seen, alone, pairs), layers=LAYERS, reach=reach)
    here = seen[5]
    marginal = fit.marginal(here)
    for decision in range(DECISIONS):
        for fmt in range(FORMATS):
            moved = here.copy()
            moved[decision] = fmt
            change = fit.loss(moved[None])[0] - fit.loss(here[None])[0]
            expected = marginal[decision, fmt] - marginal[decision, here[decision]]
            assert change == pytest.approx(expected, abs=1e-9)


def test_nothing_measured_is_the_rule_itself():
    alone, reach, _ = known()
    none = np.empty((0, DECISIONS), np.int64)
    fit = fitted(CENTRE, alone + 1, none, np.empty(0), layers=LAYERS, reach=reach)
    np.testing.assert_allclose(fit.values, alone)
    np.testing.assert_allclose(fit.loss(singles()), alone[alone != 0].reshape(-1))
