"""A combinatorial bandit: Thompson sampling of what each expert's step is worth.

Agrawal and Goyal, "Thompson Sampling for Contextual Bandits with Linear Payoffs", ICML 2013 (arXiv
1209.3352), algorithm 1, where an arm is a set of steps and the knapsack is what finds the best
arm of a sample; Wang and Chen, "Thompson Sampling for Combinatorial Semi-Bandits", ICML 2018,
describe the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.steps import stepped
from dmpq.errors import InputError
from dmpq.evaluation import FAILURE_NATS
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FRUITLESS: Final = 20
"""Samples in a row that lead to maps met before, after which the search ends."""

_ROUNDING: Final = 1e-9
"""Share of the largest variance that is added to all, so that the observations can be solved."""


@dataclass(frozen=True, kw_only=True)
class BanditAgent:
    """Samples what every step of one format up or down is worth, and plays the best set of steps.

    A play is a map at most one step per decision away from the incumbent, the best map so far. It
    is observed as a whole: its KL against that of the first map, the knapsack's. The KL is
    modelled as a sum over decisions and formats, whose prior mean is the profile's sensitivity and
    whose prior deviation is ``doubt`` times that; what a play misses by interaction is noise, of
    ``noise`` times the prior deviation of the play. A sample of the posterior replaces the
    sensitivities in the problem's objective, and the exact knapsack plays its optimum.

    Where we differ: the prior is the profile's, not one for all arms; the noise grows with the
    play; the paper's factor on the posterior's deviation, which its bound needs, is 1.

    Attributes:
        doubt: Prior standard deviation of a sensitivity, relative to it.
        noise: Standard deviation of an observation, relative to the prior's of the same play.
    """

    name: ClassVar[str] = "bandit"
    signal: ClassVar[str] = "sampled worth of steps"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 1209.3352"

    doubt: float = 0.5
    noise: float = 0.3

    def __post_init__(self) -> None:
        for name in ("doubt", "noise"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive.")

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map played; see :meth:`dmpq.agents.Agent.search`."""
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        rng = np.random.default_rng(seed)
        recorder.evaluate(problem.mckp()[None])
        fruitless = 0
        while recorder.remaining and fruitless < _FRUITLESS:
            before = recorder.remaining
            incumbent = max(recorder.history, key=lambda candidate: candidate.reward)
            damage = self._sample(problem, recorder, rng)
            recorder.evaluate(_best_play(problem, incumbent.assignment, damage)[None])
            fruitless = 0 if recorder.remaining < before else fruitless + 1
        return recorder.result()

    def _sample(self, problem: Problem, recorder: Recorder, rng: np.random.Generator) -> Floats:
        """Return a sample of the posterior of every decision's and format's damage, (D, B).

        By Matheron's rule: a sample of the prior, corrected by what it mispredicts.
        """
        deviation = self.doubt * np.abs(problem.sensitivity)
        damage: Floats = problem.sensitivity + deviation * rng.standard_normal(deviation.shape)
        first, *later = recorder.history
        usable = [one for one in later if one.kl < FAILURE_NATS]
        if not usable or not first.kl < FAILURE_NATS:
            return damage
        rows = np.arange(len(damage))
        plays = np.zeros((len(usable), *damage.shape))  # formats added by a play, less those left
        for play, candidate in zip(plays, usable, strict=True):
            play[rows, candidate.assignment] += 1.0
            play[rows, first.assignment] -= 1.0
        flat = plays.reshape(len(plays), -1)
        variance = (deviation**2).ravel()
        kernel = (flat * variance) @ flat.T
        noise = self.noise**2 * np.diag(kernel)
        noise = noise + _ROUNDING * noise.max()
        if not noise.max() > 0:
            return damage
        missed = np.array([one.kl - first.kl for one in usable]) - flat @ damage.ravel()
        missed -= np.sqrt(noise) * rng.standard_normal(len(noise))
        weights = cho_solve(cho_factor(kernel + np.diag(noise), lower=True), missed)
        corrected: Floats = damage + (variance * (flat.T @ weights)).reshape(damage.shape)
        return corrected


def _best_play(problem: Problem, incumbent: Ints, damage: Floats) -> Ints:
    """Return the best map at most one step per decision away from a map, (D,).

    Where limits on latency or energy bind, the projection may need more steps.
    """
    ratios, weights = problem.linear_ratios, problem.weights.as_array()
    values = (ratios[:, :, 1:] * weights[1:]).sum(2)
    values = values + weights[0] * damage / problem.baselines.damage
    near = np.zeros(values.shape, bool)
    rows = np.arange(len(incumbent))
    near[rows, incumbent] = True
    for by in (-1, 1):
        formats = stepped(problem.sizes, incumbent, by)
        exists = formats >= 0
        near[rows[exists], formats[exists]] = True
    far = np.ptp(values) * len(values)
    return problem.project(np.where(near, values, values.max() + far))
