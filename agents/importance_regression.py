"""What evaluated maps say of each decision's importance: a Bayesian linear regression.

A map's KL is modelled as ``c + sum_d w_d S[d, x_d]`` plus noise: the additive surrogate, with an
importance ``w_d`` for each decision's row of sensitivities. Before any evaluation ``w = 1``, the
knapsack's own belief. Evaluations move it: decisions one by one, layers as a whole, and all
together. The prior on ``c`` is flat; the standard deviations of the others, but for that of what
all share, are those of a grid under which the evaluations are likeliest (Rasmussen and Williams,
Gaussian Processes for Machine Learning, 2006, sections 2.7 and 5.4.1). What the evaluations do not
show stays at 1.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
from numpy.linalg import LinAlgError
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, helmert

from dmpq.evaluation import FAILURE_NATS
from dmpq.problem import Problem

Floats = NDArray[np.float64]

_OVERALL_STD: Final = 0.5
"""Prior standard deviation of what all importances share."""

_OWN_STDS: Final = (0.03, 0.1, 0.2, 0.4, 0.8)
"""Candidates for the prior standard deviation of a decision's own part."""

_LAYER_STDS: Final = (0.0, 0.1, 0.3, 1.0, 10.0, 100.0)
"""Candidates for that of what a layer's decisions share; large ones leave layers free."""

_NOISE_SHARES: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates for the noise, relative to the spread of what additive sensitivities miss."""

_ROUNDING: Final = 1e-9
"""Share of the KL below which what additive sensitivities miss is rounding."""


def posterior_importance(
    problem: Problem,
    maps: NDArray[np.integer],
    kl: Floats,
    texts: NDArray[np.integer] | None = None,
) -> Floats:
    """Return the posterior mean importance of each decision, (D,).

    Args:
        problem: Whose sensitivities are scaled.
        maps: (n, D), evaluated maps.
        kl: (n,), their KL, nats per token; maps without a finite loss say nothing.
        texts: (n,), the text that each was evaluated on; ``None`` where it was one. Texts differ
            in how much any map loses there: each is brought to their common scale, and only maps
            of one text are compared.
    """
    usable = np.isfinite(kl) & (kl < FAILURE_NATS)
    maps, kl = np.asarray(maps)[usable], np.asarray(kl, np.float64)[usable]
    text = np.zeros(len(kl), int) if texts is None else np.asarray(texts)[usable]
    rows = np.arange(problem.num_decisions)
    additive = problem.sensitivity[rows, maps]
    missed = _on_one_scale(kl, additive.sum(1), text) - additive.sum(1)
    design, missed = _contrasts(additive, text), _contrasts(missed, text)
    if not len(missed):
        return np.ones(len(rows))
    spread = float(np.sqrt(missed @ missed / len(kl)))
    if spread <= _ROUNDING * float(np.abs(kl).max()):
        return np.ones(len(rows))
    left_out, degrees = 0.0, max(len(missed) - len(rows), 0)
    if degrees:  # what no importance can explain is noise, whatever the widths
        basis, reduced = np.linalg.qr(design)
        left_out = float(missed @ missed)
        design, missed = reduced, basis.T @ missed
        left_out -= float(missed @ missed)
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(np.float64)).astype(int)
    in_layer = layers[:, None] == np.unique(layers)
    by_layer, total = design @ in_layer, design.sum(1)
    own, shared = design @ design.T, by_layer @ by_layer.T
    overall = np.outer(total, total) * _OVERALL_STD**2

    def fit(own_std: float, layer_std: float, noise: float) -> tuple[float, Floats]:
        """Return the log evidence, up to a constant, and the weights of the evaluations."""
        variance = (noise * spread) ** 2
        kernel = overall + own_std**2 * own + layer_std**2 * shared
        kernel[np.diag_indices_from(kernel)] += variance
        try:
            factor = cho_factor(kernel, lower=True)
        except LinAlgError:
            return -np.inf, np.zeros(len(missed))  # noise below the kernel's rounding
        weights = cho_solve(factor, missed)
        log_determinant = 2 * float(np.log(np.diag(factor[0])).sum())
        rest = left_out / variance + degrees * float(np.log(variance))
        return -float(missed @ weights) - log_determinant - rest, weights

    grid = product(_OWN_STDS, _LAYER_STDS, _NOISE_SHARES)
    own_std, layer_std, noise = max(grid, key=lambda chosen: fit(*chosen)[0])
    weights = fit(own_std, layer_std, noise)[1]
    overall_part = _OVERALL_STD**2 * float(total @ weights)
    layer_part = layer_std**2 * (by_layer.T @ weights)
    own_part = own_std**2 * (design.T @ weights)
    result: Floats = 1 + overall_part + in_layer @ layer_part + own_part
    return result


def _on_one_scale(kl: Floats, additive: Floats, text: NDArray[np.integer]) -> Floats:
    """Return KLs (n,) as they would be on a text of the mean difficulty.

    A text's difficulty is what its maps lose over what additive sensitivities say of them; the
    mean is the geometric one.
    """
    _, which = np.unique(text, return_inverse=True)
    lost, said = np.bincount(which, kl), np.bincount(which, additive)
    if len(lost) < 2 or not ((lost > 0) & (said > 0)).all():
        return kl
    difficulty = np.log(lost / said)
    scaled: Floats = kl * np.exp(difficulty.mean() - difficulty)[which]
    return scaled


def _contrasts(values: Floats, text: NDArray[np.integer]) -> Floats:
    """Return orthonormal contrasts within each text, (n - texts, ...): what no intercept changes.

    With them for data the evidence is that of restricted maximum likelihood, in which each text
    has an intercept of flat prior (Rasmussen and Williams, section 2.7).

    Args:
        values: (n, ...), a row per evaluation.
        text: (n,).
    """
    members = (np.flatnonzero(text == one) for one in np.unique(text))
    parts = [helmert(len(rows)) @ values[rows] for rows in members if len(rows) > 1]
    return np.concatenate([values[:0], *parts])
