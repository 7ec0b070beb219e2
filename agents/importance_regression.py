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
from scipy.linalg import cho_factor, cho_solve

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


def posterior_importance(problem: Problem, maps: NDArray[np.integer], kl: Floats) -> Floats:
    """Return the posterior mean importance of each decision, (D,).

    Args:
        problem: Whose sensitivities are scaled.
        maps: (n, D), evaluated maps.
        kl: (n,), their KL, nats per token; maps without a finite loss say nothing.
    """
    usable = np.isfinite(kl) & (kl < FAILURE_NATS)
    maps, kl = np.asarray(maps)[usable], np.asarray(kl)[usable]
    if len(kl) < 2:
        return np.ones(problem.num_decisions)
    rows = np.arange(problem.num_decisions)
    additive = problem.sensitivity[rows, maps]
    missed = kl - additive.sum(1)
    spread = float(missed.std())
    if spread <= _ROUNDING * float(np.abs(kl).max()):
        return np.ones(len(rows))
    layers = problem.per_decision(problem.spec.layer_of_expert.astype(np.float64)).astype(int)
    in_layer = layers[:, None] == np.unique(layers)
    by_layer = additive @ in_layer
    own, shared = additive @ additive.T, by_layer @ by_layer.T
    overall = np.outer(additive.sum(1), additive.sum(1)) * _OVERALL_STD**2

    def fit(own_std: float, layer_std: float, noise: float) -> tuple[float, Floats]:
        """Return the log evidence, up to a constant, and the weights of the evaluations."""
        kernel = overall + own_std**2 * own + layer_std**2 * shared
        kernel[np.diag_indices_from(kernel)] += (noise * spread) ** 2
        impossible = -np.inf, np.zeros(len(kl))  # noise below the kernel's rounding
        try:
            factor = cho_factor(kernel, lower=True)
        except LinAlgError:
            return impossible
        ones = np.ones(len(kl))
        solved = cho_solve(factor, np.stack([missed, ones], axis=1))
        precision = float(ones @ solved[:, 1])
        if precision <= 0:
            return impossible
        weights = solved[:, 0] - solved[:, 1] * float(ones @ solved[:, 0]) / precision
        log_determinant = 2 * float(np.log(np.diag(factor[0])).sum()) + np.log(precision)
        return -float(missed @ weights) - log_determinant, weights

    grid = product(_OWN_STDS, _LAYER_STDS, _NOISE_SHARES)
    own_std, layer_std, noise = max(grid, key=lambda chosen: fit(*chosen)[0])
    weights = fit(own_std, layer_std, noise)[1]
    overall_part = _OVERALL_STD**2 * float(additive.sum(1) @ weights)
    layer_part = layer_std**2 * (by_layer.T @ weights)
    own_part = own_std**2 * (additive.T @ weights)
    result: Floats = 1 + overall_part + in_layer @ layer_part + own_part
    return result
