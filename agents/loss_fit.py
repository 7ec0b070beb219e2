"""The loss around a map, fitted to measured maps: what steps add, and what pairs of them add.

The model is CLADO's (Deng et al., arXiv 2307.05657, section 3): to second order, the loss of
quantized weights is a sum over steps plus a sum over pairs of steps, all of it seen by forward
passes alone. The paper measures every pair; here some are, and ridge regression does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DOUBT: Final = 0.5
"""Prior deviation of what a step adds, relative to what the rule says."""
_LEAST: Final = 0.01
"""Of the mean step: what a step may add at least, one that the rule thinks free too."""
_NOISES: Final = (0.03, 0.1, 0.3)
"""Deviation of a measurement that are tried, relative to the prior's of the same map."""
_ENTANGLED: Final = (0.0, 0.03, 0.1, 0.3)
"""Prior deviations of pairs that are tried, relative to what the two errors allow at most."""
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, eq=False)
class LossFit:
    """A loss that is quadratic in the steps from a map.

    Attributes:
        centre: (D,), the map.
        values: (D, B), nats per token that each format adds to the centre's loss by itself; 0 at
            the centre's own.
        cells: (S,), steps that were measured: decision times B plus format.
        pairs: (S, S), nats per token that two of these steps add beyond their sum; symmetric,
            0 on the diagonal and for two formats of one decision.
        entangled: Prior deviations of pairs that the measurements speak for, relative to what the
            two errors allow: within a layer, and across layers.
    """

    centre: Ints
    values: Floats
    cells: Ints
    pairs: Floats
    entangled: tuple[float, float] = (0.0, 0.0)

    def loss(self, maps: Ints) -> Floats:
        """Return what maps (K, D) add to the centre's loss, nats per token, (K,)."""
        alone: Floats = self.values[np.arange(len(self.centre)), maps].sum(1)
        taken = self._taken(maps)
        both: Floats = ((taken @ self.pairs) * taken).sum(1) / 2
        return alone + both

    def marginal(self, choice: Ints) -> Floats:
        """Return what each format would add where all other decisions are as in a map, (D, B)."""
        found: Floats = self.values.copy()
        # A decision's own steps have no pair with each other, so that it does not see itself.
        found.ravel()[self.cells] += self.pairs @ self._taken(choice[None])[0]
        return found

    def _taken(self, maps: Ints) -> Floats:
        decisions, formats = np.divmod(self.cells, self.values.shape[1])
        taken: Floats = (maps[:, decisions] == formats).astype(np.float64)
        return taken


@dataclass(frozen=True, eq=False)
class _Design:
    """Measured maps as sets of steps, and what they were expected to add."""

    steps: Floats
    """(K, S), 1 where a map takes a step."""
    said: Floats
    """(S,), what the rule says that each step adds, in its unit."""
    reach: Floats
    """(S,), root of the most that a step's error adds to a pair, in root nats."""
    layers: Ints
    """(S,), layer of each step."""

    @property
    def spread(self) -> Floats:
        """Prior variance of what each step adds, in the rule's unit squared, (S,)."""
        size = np.abs(self.said)
        deviation: Floats = _DOUBT * np.maximum(size, _LEAST * size.mean())
        return deviation**2

    def pair_kernels(self) -> tuple[Floats, Floats]:
        """Return the prior covariances of maps' pairs, within layers and across, (K, K) each.

        A pair counts for two maps where both take both its steps, so that the sum over pairs is
        half of a square less its diagonal.
        """
        own = (self.steps * self.reach**4) @ self.steps.T
        whole = ((self.steps * self.reach**2) @ self.steps.T) ** 2
        inside = np.zeros_like(whole)
        for layer in np.unique(self.layers):
            here = self.steps[:, self.layers == layer]
            inside += ((here * self.reach[self.layers == layer] ** 2) @ here.T) ** 2
        return (inside - own) / 2, (whole - inside) / 2


def fitted(
    centre: Ints,
    values: Floats,
    maps: Ints,
    losses: Floats,
    *,
    layers: Ints,
    reach: Floats | None = None,
) -> LossFit:
    """Return the loss around a map that measurements speak for.

    Bayesian ridge regression. A step's prior mean is what a rule says, times the factor that fits
    the measurements best, so that the rule's unit does not matter; steps that were not measured
    keep that. A pair's prior mean is 0; how far pairs of one layer, and of two, may be from it is
    chosen by the evidence of the measurements, out of a few, 0 among them. Pairs that were not
    measured so stay 0. Last, the matrix of all pairs is made positive semidefinite (the paper's
    projection, section 3.3): errors in a loss of positive curvature are no more entangled than
    each of them is large. What steps add by themselves is left as measured.

    Args:
        centre: (D,), the map.
        values: (D, B), what a rule says that each format costs, in any unit.
        maps: (K, D), measured maps; distinct, and not the centre.
        losses: (K,), what each adds to the centre's loss, nats per token.
        layers: (D,), layer of each decision.
        reach: (D, B), root of what two errors of this size in line would add as a pair, root
            nats; ``None`` for a loss without pairs.
    """
    rows, formats = np.arange(len(centre)), values.shape[1]
    relative = values - values[rows, centre][:, None]
    moved = np.flatnonzero((maps != centre).any(0))
    cells = np.unique([d * formats + maps[:, d] for d in moved]) if len(moved) else np.array([])
    cells = np.setdiff1d(cells.astype(np.int64), rows * formats + centre)
    if not len(cells):
        return LossFit(centre, relative, cells, np.zeros((0, 0)))
    decisions = cells // formats
    design = _Design(
        steps=(maps[:, decisions] == cells % formats).astype(np.float64),
        said=relative.ravel()[cells],
        reach=np.zeros(len(cells)) if reach is None else reach.ravel()[cells],
        layers=layers[decisions],
    )
    alone = (design.steps * design.spread) @ design.steps.T
    unit = _unit(design, alone, losses)
    missed = losses - unit * (design.steps @ design.said)
    entangled, weights = _posterior(design, unit**2 * alone, missed, pairs=reach is not None)
    found = unit * relative
    found.ravel()[cells] += unit**2 * design.spread * (design.steps.T @ weights)
    same = design.layers[:, None] == design.layers
    prior = np.where(same, *entangled) ** 2 * np.multiply.outer(design.reach, design.reach) ** 2
    prior[decisions[:, None] == decisions] = 0.0
    pairs = prior * ((design.steps.T * weights) @ design.steps)
    return LossFit(centre, found, cells, _stable(pairs, design.reach), entangled)


def _unit(design: _Design, alone: Floats, losses: Floats) -> float:
    """Return the nats per token that one of the rule's units is worth, by least squares."""
    said = design.steps @ design.said
    covariance = alone + np.diag(_NOISES[1] ** 2 * alone.diagonal() + _ROUNDING * alone.max())
    solved = cho_solve(cho_factor(covariance), said)
    unit = float(solved @ losses) / (float(solved @ said) or 1.0)
    # A rule that is wrong in sign still orders; then sizes alone tell the unit.
    return unit if unit > 0 else float(np.abs(losses).sum() / (np.abs(said).sum() or 1.0)) or 1.0


def _posterior(
    design: _Design, alone: Floats, missed: Floats, *, pairs: bool
) -> tuple[tuple[float, float], Floats]:
    """Return the deviations of pairs of most evidence, and the solved residuals, (K,)."""
    inside, across = design.pair_kernels()
    best: tuple[float, tuple[float, float], Floats] | None = None
    for within, between in product(_ENTANGLED, _ENTANGLED) if pairs else [(0.0, 0.0)]:
        for noise in _NOISES:
            kernel = alone + within**2 * inside + between**2 * across
            ridge = noise**2 * alone.diagonal() + _ROUNDING * alone.max()
            factor = cho_factor(kernel + np.diag(ridge), lower=True)
            solved: Floats = cho_solve(factor, missed)
            evidence = -missed @ solved / 2 - np.log(factor[0].diagonal()).sum()
            if best is None or evidence > best[0]:
                best = float(evidence), (within, between), solved
    assert best is not None
    return best[1], best[2]


def _stable(pairs: Floats, reach: Floats) -> Floats:
    """Return the pairs of a positive semidefinite matrix near theirs, in units of their reach.

    The diagonal, what an error adds to itself, is 1 in these units. Negative eigenvalues are cut,
    which alone gives the nearest such matrix; what that adds to the diagonal is scaled away.
    """
    scale = np.multiply.outer(reach, reach)
    ones = np.divide(pairs, scale, out=np.zeros_like(pairs), where=scale > 0) + np.eye(len(pairs))
    eigenvalues, vectors = np.linalg.eigh(ones)
    if eigenvalues[0] >= 0:
        return pairs
    projected = (vectors * eigenvalues.clip(0)) @ vectors.T
    own = np.sqrt(projected.diagonal())
    projected *= scale / np.multiply.outer(own, own)
    stable: Floats = np.where(pairs != 0, (projected + projected.T) / 2, 0.0)
    return stable
