"""What evaluated maps say of each decision's importance: a Bayesian linear regression.

A map's KL is modelled as ``c + sum_d w_d S[d, x_d]`` plus noise: the additive surrogate, with an
importance ``w_d`` for each decision's row of sensitivities. Before any evaluation ``w = 1``, the
knapsack's own belief. Evaluations move it: decisions one by one, layers as a whole, and all
together. Where maps were evaluated on several texts, each has an intercept and importances of its
own around the common ones, so that what one text alone says moves these little.

The prior on ``c`` is flat; the standard deviations of the others, but for that of what all share,
are those of a grid under which the evaluations are likeliest, one after the other until none
changes (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 and
5.4.1). What the evaluations do not show stays at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.linalg import LinAlgError
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, helmert

from dmpq.agents.base import Candidate
from dmpq.evaluation import FAILURE_NATS
from dmpq.problem import Problem

Floats = NDArray[np.float64]

_OVERALL_STD: Final = 0.5
"""Prior standard deviation of what all importances share."""

_OWN_STDS: Final = (0.03, 0.1, 0.2, 0.4, 0.8)
"""Candidates for the prior standard deviation of a decision's own part."""

_LAYER_STDS: Final = (0.0, 0.1, 0.3, 1.0, 10.0, 100.0)
"""Candidates for that of what a layer's decisions share; large ones leave layers free."""

_TEXT_STDS: Final = (0.0, 0.1, 0.2, 0.4, 0.8)
"""Candidates for that of what a text's importances deviate from the common ones."""

_NOISE_SHARES: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates for the noise, relative to the spread of what additive sensitivities miss."""

_FEW: Final = 512
"""Rows up to which the standard deviations are looked for each time."""

_GROWTH: Final = 1.05
"""By how much rows grow until they are looked for again, where there are more."""

_OWN_TEXT: Final = -1
"""Number of the search's own text among the further ones."""

_ROUNDING: Final = 1e-9
"""Share of the KL below which what additive sensitivities miss is rounding."""


def posterior_importance(
    problem: Problem,
    maps: NDArray[np.integer],
    kl: Floats,
    texts: NDArray[np.integer] | None = None,
) -> Floats:
    """Return the posterior mean importance of each decision, (D,); see the class."""
    return ImportanceRegression(problem).posterior(maps, kl, texts)


class ImportanceRegression:
    """Infers importances from a search's evaluations, more of them each time.

    Args:
        problem: Whose sensitivities are scaled.
        believed: (D,), importances believed in before any evaluation; ``None`` for 1.
    """

    def __init__(self, problem: Problem, *, believed: Floats | None = None) -> None:
        self._believed = np.ones(problem.num_decisions) if believed is None else believed
        self._sensitivity = problem.sensitivity * self._believed[:, None]
        layers = problem.per_decision(problem.spec.layer_of_expert.astype(np.float64)).astype(int)
        self._in_layer = layers[:, None] == np.unique(layers)
        self._stds = tuple(kind[len(kind) // 2] for kind in _candidates(several=True))
        self._looked_at = 0

    def believed_after(self, history: Sequence[Candidate]) -> Floats:
        """Return the posterior mean importances, (D,), given a search's history."""
        return self.posterior(
            np.array([candidate.assignment for candidate in history]),
            np.array([candidate.kl for candidate in history]),
            np.array([_OWN_TEXT if one.text is None else one.text for one in history]),
        )

    def posterior(
        self,
        maps: NDArray[np.integer],
        kl: Floats,
        texts: NDArray[np.integer] | None = None,
    ) -> Floats:
        """Return the posterior mean importance of each decision, (D,).

        The standard deviations are looked for from those of the time before; of many evaluations
        not each time, since every candidate takes a factorization.

        Args:
            maps: (n, D), evaluated maps.
            kl: (n,), their KL, nats per token; maps without a finite loss say nothing.
            texts: (n,), the text that each was evaluated on; ``None`` where it was one. Texts
                differ in how much any map loses there: each is brought to their common scale, and
                only maps of one text are compared.
        """
        usable = np.isfinite(kl) & (kl < FAILURE_NATS)
        maps, kl = np.asarray(maps)[usable], np.asarray(kl, np.float64)[usable]
        text = np.zeros(len(kl), int) if texts is None else np.asarray(texts)[usable]
        decisions = len(self._sensitivity)
        additive = self._sensitivity[np.arange(decisions), maps]
        missed = _on_one_scale(kl, additive.sum(1), text) - additive.sum(1)
        data = _reduced(additive, missed, text)
        spread = float(np.sqrt((data.missed @ data.missed + data.left_out) / max(len(kl), 1)))
        if not spread or spread <= _ROUNDING * float(np.abs(kl).max()):
            return self._believed.copy()
        by_layer, total = data.design @ self._in_layer, data.design.sum(1)
        own, shared = data.design @ data.design.T, by_layer @ by_layer.T
        of_text = np.where(data.text[:, None] == data.text, own, 0.0)
        overall = np.outer(total, total) * _OVERALL_STD**2

        @cache
        def fit(own_std: float, layer_std: float, text_std: float, noise: float) -> _Fit:
            """Return what such standard deviations make of the evaluations."""
            variance = (noise * spread) ** 2
            kernel = overall + own_std**2 * own + layer_std**2 * shared + text_std**2 * of_text
            kernel[np.diag_indices_from(kernel)] += variance
            try:
                factor = cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
            except LinAlgError:
                return _Fit(-np.inf, np.zeros(len(data.missed)))  # noise below the rounding
            weights = cho_solve(factor, data.missed, check_finite=False)
            log_determinant = 2 * float(np.log(np.diag(factor[0])).sum())
            rest = data.left_out / variance + data.degrees * float(np.log(variance))
            return _Fit(-float(data.missed @ weights) - log_determinant - rest, weights)

        rows = len(data.missed)
        if rows <= _FEW or rows >= _GROWTH * self._looked_at:
            candidates = _candidates(several=len(np.unique(data.text)) > 1)
            self._stds = _likeliest(lambda stds: fit(*stds).evidence, candidates, self._stds)
            self._looked_at = rows
        own_std, layer_std, _, _ = self._stds
        weights = fit(*self._stds).weights
        overall_part = _OVERALL_STD**2 * float(total @ weights)
        layer_part = layer_std**2 * (by_layer.T @ weights)
        own_part = own_std**2 * (data.design.T @ weights)
        relative = 1 + overall_part + self._in_layer @ layer_part + own_part
        result: Floats = self._believed * relative
        return result


def _candidates(*, several: bool) -> tuple[tuple[float, ...], ...]:
    """Return the candidates of each standard deviation; one text is not told from all."""
    return _OWN_STDS, _LAYER_STDS, _TEXT_STDS if several else (0.0,), _NOISE_SHARES


@dataclass(frozen=True, eq=False)
class _Fit:
    """Log evidence, up to a constant, and the weights of the evaluations in the posterior mean."""

    evidence: float
    weights: Floats


@dataclass(frozen=True, eq=False)
class _Data:
    """Evaluations without their texts' intercepts, in as few rows as say the same.

    Attributes:
        design: (m, D), what decisions add.
        missed: (m,), what additive sensitivities miss.
        text: (m,), the text of each row.
        left_out: Squared sum of what no importances can explain.
        degrees: Rows that were left out with it.
    """

    design: Floats
    missed: Floats
    text: NDArray[np.integer]
    left_out: float
    degrees: int


def _likeliest(
    evidence: Callable[[tuple[float, ...]], float],
    candidates: Sequence[Sequence[float]],
    start: tuple[float, ...],
) -> tuple[float, ...]:
    """Return candidates, one of each kind, than which no other of one kind is likelier.

    Args:
        evidence: Of some candidates.
        candidates: Of each kind.
        start: Where to begin, as far as these are candidates.
    """
    chosen = tuple(
        one if one in kind else kind[len(kind) // 2]
        for kind, one in zip(candidates, start, strict=True)
    )
    while True:
        before = chosen
        for i, kind in enumerate(candidates):
            tried = [(*chosen[:i], one, *chosen[i + 1 :]) for one in kind]
            chosen = max((chosen, *tried), key=evidence)  # of equals, the first
        if chosen == before:
            return chosen


def _reduced(additive: Floats, missed: Floats, text: NDArray[np.integer]) -> _Data:
    """Return the evaluations as orthonormal contrasts within each text: what no intercept changes.

    With them for data the evidence is that of restricted maximum likelihood, in which each text
    has an intercept of flat prior (Rasmussen and Williams, section 2.7). Of a text with more
    contrasts than decisions, those that importances can explain are kept.

    Args:
        additive: (n, D), what decisions add to each map.
        missed: (n,), what additive sensitivities miss of it.
        text: (n,).
    """
    parts: list[tuple[Floats, Floats, int]] = []
    left_out, degrees = 0.0, 0
    for one in np.unique(text):
        rows = np.flatnonzero(text == one)
        if len(rows) < 2:
            continue
        contrasts = helmert(len(rows))
        design, value = contrasts @ additive[rows], contrasts @ missed[rows]
        if len(value) > design.shape[1]:
            basis, design = np.linalg.qr(design)
            kept = basis.T @ value
            left_out += float(value @ value) - float(kept @ kept)
            degrees += len(value) - len(kept)
            value = kept
        parts.append((design, value, one))
    return _Data(
        design=np.concatenate([additive[:0], *(design for design, _, _ in parts)]),
        missed=np.concatenate([missed[:0], *(value for _, value, _ in parts)]),
        text=np.repeat([one for _, _, one in parts], [len(value) for _, value, _ in parts]),
        left_out=left_out,
        degrees=degrees,
    )


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
