"""What evaluations say of importances: recovered where shown, left alone where not."""

import numpy as np
import pytest
from factories import make_problem

from dmpq.agents.importance_regression import posterior_importance


@pytest.fixture
def problem():
    return make_problem(layers=4, experts=16, weights="acc=1")


def drawn_maps(problem, count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([problem.propose(rng.normal(0, 0.5, 64)) for _ in range(count)])


def additive_kl(problem, maps, importance):
    rows = np.arange(problem.num_decisions)
    return 0.05 + (importance * problem.sensitivity[rows, maps]).sum(1)


def test_where_the_surrogate_is_right_nothing_moves(problem):
    maps = drawn_maps(problem, 40)
    kl = additive_kl(problem, maps, np.ones(64))
    np.testing.assert_allclose(posterior_importance(problem, maps, kl), 1.0, atol=1e-6)


@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12, 1e-15])
def test_the_smaller_the_misses_the_smaller_the_moves(problem, share):
    maps = drawn_maps(problem, 100)
    kl = additive_kl(problem, maps, np.ones(64))
    kl = kl * (1 + share * np.random.default_rng(0).normal(size=100))
    # The widths offered are far above the smaller shares, so that noise is fitted as it is.
    np.testing.assert_allclose(posterior_importance(problem, maps, kl), 1.0, atol=1000 * share)


def test_one_evaluation_says_nothing(problem):
    maps = drawn_maps(problem, 1)
    kl = 3 * additive_kl(problem, maps, np.ones(64))
    np.testing.assert_array_equal(posterior_importance(problem, maps, kl), 1.0)


def test_maps_without_a_finite_loss_say_nothing(problem):
    maps = drawn_maps(problem, 30)
    truth = np.where(problem.spec.layer_of_expert == 1, 2.0, 1.0)
    kl = additive_kl(problem, maps, truth)
    spoiled = kl.copy()
    spoiled[[3, 7, 9]] = [np.nan, np.inf, 100.0]
    others = np.delete(np.arange(30), [3, 7, 9])
    np.testing.assert_array_equal(
        posterior_importance(problem, maps, spoiled),
        posterior_importance(problem, maps[others], kl[others]),
    )
    nothing = np.full(30, np.nan)
    np.testing.assert_array_equal(posterior_importance(problem, maps, nothing), 1.0)


def test_a_layer_misjudged_as_a_whole_is_found_in_few_evaluations(problem):
    truth = np.where(problem.spec.layer_of_expert == 2, 3.0, 1.0)
    maps = drawn_maps(problem, 24)
    found = posterior_importance(problem, maps, additive_kl(problem, maps, truth))
    in_layer = found[truth == 3.0].mean()
    others = found[truth == 1.0].mean()
    assert in_layer / others == pytest.approx(3.0, rel=0.15)


def test_with_as_many_evaluations_as_decisions_each_is_told_apart(problem):
    truth = np.random.default_rng(1).lognormal(0, 0.4, 64)
    maps = drawn_maps(problem, 200)
    found = posterior_importance(problem, maps, additive_kl(problem, maps, truth))
    weight = problem.sensitivity[:, 0]
    before = weight @ (1 - truth) ** 2
    assert weight @ (found - truth) ** 2 < 0.1 * before


def test_it_is_the_textbook_s_posterior_mean(problem):
    """The kernel form equals the weight-space form (Rasmussen and Williams, eq. 2.8)."""
    from dmpq.agents import importance_regression as module

    maps, rng = drawn_maps(problem, 30), np.random.default_rng(2)
    truth = rng.lognormal(0, 0.3, 64)
    kl = additive_kl(problem, maps, truth) + rng.normal(0, 1e-3, 30)
    rows = np.arange(64)
    design = problem.sensitivity[rows, maps]
    missed = kl - design.sum(1)
    layers = problem.spec.layer_of_expert[:, None] == np.arange(4)
    own, layer, noise = 0.2, 0.3, 0.1
    prior = (
        own**2 * np.eye(64)
        + layer**2 * (layers @ layers.T)
        + module._OVERALL_STD**2 * np.ones((64, 64))
    )
    variance = (noise * missed.std()) ** 2
    centred = design - design.mean(0)
    precision = centred.T @ centred / variance + np.linalg.inv(prior)
    expected = 1 + np.linalg.solve(precision, centred.T @ (missed - missed.mean()) / variance)
    grids = {"_OWN_STDS": (own,), "_LAYER_STDS": (layer,), "_NOISE_SHARES": (noise,)}
    with pytest.MonkeyPatch.context() as patch:
        for name, grid in grids.items():
            patch.setattr(module, name, grid)
        found = posterior_importance(problem, maps, kl)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("per_text", [30, 100])
def test_texts_have_importances_of_their_own(problem, monkeypatch, per_text):
    """The weight-space form with what each text adds to the common weights, written out."""
    from dmpq.agents import importance_regression as module

    count = 3 * per_text
    maps, rng = drawn_maps(problem, count), np.random.default_rng(2)
    texts = np.repeat([4, 0, 7], per_text)
    design = problem.sensitivity[np.arange(64), maps]
    missed = design @ rng.normal(0, 0.3, 64) + rng.normal(0, 1e-3, count)
    kl = design.sum(1) + missed
    own, layer, text_std, noise = 0.2, 0.3, 0.4, 0.1
    layers = problem.spec.layer_of_expert[:, None] == np.arange(4)
    prior = own**2 * np.eye(64) + layer**2 * (layers @ layers.T) + module._OVERALL_STD**2
    # On one scale already, so that what is left to check are an intercept and weights per text.
    monkeypatch.setattr(module, "_on_one_scale", lambda kl, *_: kl)
    grids = {"OWN_STDS": own, "LAYER_STDS": layer, "TEXT_STDS": text_std, "NOISE_SHARES": noise}
    for name, width in grids.items():
        monkeypatch.setattr(module, f"_{name}", (width,))
    found = posterior_importance(problem, maps, kl, texts)
    apart = np.zeros((count, 3 * 64))
    for i, text in enumerate((0, 4, 7)):
        for values in (design, missed):
            values[texts == text] -= values[texts == text].mean(0)
        apart[texts == text, 64 * i : 64 * (i + 1)] = design[texts == text]
    whole = np.concatenate([design, apart], axis=1)
    variance = (noise * np.sqrt(np.mean(missed**2))) ** 2
    inverse = np.zeros((256, 256))
    inverse[:64, :64] = np.linalg.inv(prior)
    inverse[64:, 64:] = np.eye(192) / text_std**2
    precision = whole.T @ whole / variance + inverse
    expected = 1 + np.linalg.solve(precision, whole.T @ missed / variance)[:64]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_one_text_says_moves_little_and_what_all_say_moves_much(problem):
    rng = np.random.default_rng(5)
    truth = rng.lognormal(0, 0.5, 64)
    maps = drawn_maps(problem, 384)
    texts = np.repeat(np.arange(32), 12)
    of_text = truth * rng.lognormal(0, 0.4, (32, 64))[texts]
    kl = (of_text * problem.sensitivity[np.arange(64), maps]).sum(1)
    weight = problem.sensitivity[:, 0]

    def missed(found):
        """Return how far importances are from the truth, but for what all share."""
        scale = (truth * weight).sum() / (found * weight).sum()
        return weight @ (scale * found - truth) ** 2

    apart = missed(posterior_importance(problem, maps, kl, texts))
    mixed = missed(posterior_importance(problem, maps, kl))
    assert apart < 0.5 * missed(np.ones(64))
    assert apart < 0.5 * mixed


def test_the_evidence_is_that_of_all_evaluations_however_few_decisions(problem, monkeypatch):
    """The widths chosen by the reduced form are those of the whole one, written out."""
    from dmpq.agents import importance_regression as module

    maps, rng = drawn_maps(problem, 100), np.random.default_rng(3)
    design = problem.sensitivity[np.arange(64), maps]
    missed = design @ rng.normal(0, 0.2, 64) + rng.normal(0, 0.004, 100)
    kl = design.sum(1) + missed
    centred, rest = design - design.mean(0), missed - missed.mean()
    layers = problem.spec.layer_of_expert[:, None] == np.arange(4)
    spread = rest.std()

    def evidence(own, layer, noise):
        prior = own**2 * np.eye(64) + layer**2 * (layers @ layers.T) + module._OVERALL_STD**2
        kernel = centred @ prior @ centred.T + (noise * spread) ** 2 * np.eye(100)
        # Centring leaves one direction in which there is noise and no data.
        logdet = np.linalg.slogdet(kernel)[1] - 2 * np.log(noise * spread)
        return -rest @ np.linalg.solve(kernel, rest) - logdet

    grid = [
        (o, s, n)
        for o in module._OWN_STDS
        for s in module._LAYER_STDS
        for n in module._NOISE_SHARES
    ]
    best = max(grid, key=lambda widths: evidence(*widths))
    free = posterior_importance(problem, maps, kl)
    for name, width in zip(("_OWN_STDS", "_LAYER_STDS", "_NOISE_SHARES"), best, strict=True):
        monkeypatch.setattr(module, name, (width,))
    np.testing.assert_allclose(posterior_importance(problem, maps, kl), free, rtol=1e-9)


def test_texts_of_other_difficulty_say_the_same(problem):
    truth = np.random.default_rng(1).lognormal(0, 0.4, 64)
    maps = drawn_maps(problem, 240)
    texts = np.repeat(np.arange(15), 16)
    kl = (truth * problem.sensitivity[np.arange(64), maps]).sum(1)
    harder = kl * np.random.default_rng(4).lognormal(0, 0.3, 15)[texts]
    weight = problem.sensitivity[:, 0]
    before = weight @ (1 - truth) ** 2
    found = posterior_importance(problem, maps, harder, texts)
    mixed = posterior_importance(problem, maps, harder)
    scale = (truth * weight).sum() / (found * weight).sum()  # what all share is not told
    assert weight @ (scale * found - truth) ** 2 < 0.1 * before
    assert weight @ (mixed - truth) ** 2 > 0.5 * before


def test_a_text_with_one_map_says_nothing(problem):
    maps = drawn_maps(problem, 31)
    kl = additive_kl(problem, maps, np.random.default_rng(1).lognormal(0, 0.4, 64))
    texts = np.array([0] * 30 + [1])
    kls = np.append(kl[:30], 0.05 + problem.sensitivity[np.arange(64), maps[30]].sum())
    alone = posterior_importance(problem, maps[:30], kl[:30])
    both = posterior_importance(problem, maps, kls, texts)
    assert np.corrcoef(alone, both)[0, 1] > 0.99


@pytest.mark.parametrize("serve", ["projection", "layer"])
def test_every_granularity(serve):
    problem = make_problem(serve=serve, weights="acc=1")
    rng = np.random.default_rng(0)
    maps = np.stack([problem.propose(rng.normal(0, 1, problem.num_decisions)) for _ in range(12)])
    kl = rng.random(12)
    importance = posterior_importance(problem, maps, kl)
    assert importance.shape == (problem.num_decisions,)
    assert np.isfinite(importance).all()


def test_of_many_evaluations_the_deviations_are_looked_for_as_these_grow(problem, monkeypatch):
    from dmpq.agents import importance_regression as module

    maps, rng = drawn_maps(problem, 60), np.random.default_rng(4)
    kl = additive_kl(problem, maps, rng.lognormal(0, 0.5, 64))
    looked = []
    real = module._likeliest
    monkeypatch.setattr(module, "_likeliest", lambda *given: looked.append(1) or real(*given))
    monkeypatch.setattr(module, "_FEW", 30)
    regression = module.ImportanceRegression(problem)
    counts = []
    for count in (20, 21, 41, 42, 60):  # a row less each, for the intercept
        before = len(looked)
        found = regression.posterior(maps[:count], kl[:count])
        counts.append(len(looked) - before)
    assert counts == [1, 1, 1, 0, 1]
    np.testing.assert_allclose(found, posterior_importance(problem, maps, kl), rtol=0.05)
