"""The loss of bit maps: what every evaluator answers, and the additive surrogate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from dmpq.profile import Profile

Assignments = NDArray[np.integer]

FAILURE_NATS: Final = 100.0
"""KL and NLL of a map whose logits are not finite: finite, and worse than any working map."""


@dataclass(frozen=True)
class LossUnit:
    """What a search makes small, in the words of its tables and figures.

    Attributes:
        noun: Whose loss it is: the KL, or a task's metric.
        unit: Of what is shown.
        per: What it is a mean over; ``None`` where it is of the text as a whole.
        text: What it is measured on.
        shown: Units in one of an evaluator's.
    """

    noun: str = "KL"
    unit: str = "nats"
    per: str | None = "token"
    text: str = "text"
    shown: float = 1.0

    @property
    def axis(self) -> str:
        """The label of an axis."""
        if self.per is None:
            return f"{self.noun} lost on search {self.text}, {self.unit}"
        return f"{self.noun} to full precision on search {self.text}, {self.unit}/{self.per}"

    def amount(self, loss: float) -> str:
        """Return a loss, as evaluators measure it, with its unit."""
        return f"{loss * self.shown:.3g} {self.unit} of {self.noun}"

    def mean(self, loss: float) -> str:
        """Return a loss with its unit, and what it is a mean over."""
        per = f" of {self.noun}" if self.per is None else f" per {self.per}"
        return f"{loss * self.shown:g} {self.unit}{per}"

    @classmethod
    def of_task(cls, metric: str | None = None) -> LossUnit:
        """Return the unit of a task's KL, or of what its metric loses, in points of a percent.

        Args:
            metric: By which maps are searched; ``None`` where that is by the KL.
        """
        if metric is None:
            return cls(per="answer", text="examples")
        return cls(metric, "points", None, "examples", 100.0)


@dataclass(frozen=True, eq=False)
class Evaluations:
    """What K bit maps cost in quality.

    Attributes:
        kl: (K,), KL divergence of the full-precision next-token distribution to the map's, nats
            per token.
        nll: (K,), negative log-likelihood, nats per token.
        router_shift: (K,), share of token-expert selections that the map changes; NaN where the
            evaluator runs no model.
        tokens: What answering cost, in FLOP-equivalents of a forwarded token; 0 where every
            answer was known.
    """

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    router_shift: NDArray[np.float64]
    tokens: float

    @property
    def perplexity(self) -> NDArray[np.float64]:
        """Perplexity per token, (K,)."""
        return np.exp(self.nll)


class Evaluator(Protocol):
    """Measures bit maps: exact, deterministic, cached and metered."""

    name: str

    @property
    def tokens(self) -> int:
        """Tokens of the text: what a map costs at most; 0 where answers are free."""

    @property
    def tokens_spent(self) -> float:
        """What all answers so far have cost, in forwarded tokens."""

    def evaluate(self, assignments: Assignments, *, fidelity: float = 1.0) -> Evaluations:
        """Measure K maps.

        Args:
            assignments: (K, N) menu indices of whole experts, or (K, 2N) of gate+up and down in
                turn.
            fidelity: Share of the text to measure on, in (0, 1].
        """

    def hold(self, assignment: Assignments) -> None:
        """Expect later maps to be near this one, which replaces the one held before.

        Changes no value, only what answers cost: a map that shares leading layers with the held
        one may resume where they part.

        Args:
            assignment: (N,) or (2N,), as in :meth:`evaluate`.
        """


class SurrogateEvaluator:
    """The sum of the profile's sensitivities: exact where losses add up, and free.

    Without projection sensitivities, an expert whose projections differ is priced at the mean of
    the two formats' sensitivities.
    """

    name = "surrogate"

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    @property
    def tokens(self) -> int:
        """None: no text is read."""
        return 0

    @property
    def tokens_spent(self) -> float:
        """Nothing: no model runs."""
        return 0.0

    def evaluate(self, assignments: Assignments, *, fidelity: float = 1.0) -> Evaluations:
        """Add the sensitivities up; see :meth:`Evaluator.evaluate`."""
        del fidelity
        profile = self._profile
        experts = np.arange(profile.spec.num_experts)
        maps = np.atleast_2d(assignments)
        if maps.shape[1] == len(experts):
            kl = profile.sensitivity[experts, maps].sum(1)
        else:
            both = maps.reshape(len(maps), -1, 2)
            if profile.projection_sensitivity is None:
                kl = profile.sensitivity[experts[:, None], both].mean(2).sum(1)
            else:
                kl = profile.projection_sensitivity[experts[:, None], [0, 1], both].sum((1, 2))
        kl = kl + profile.uniform_kl[-1]  # what sensitivities are measured above
        return Evaluations(kl, profile.full_nll + kl, np.full(len(maps), np.nan), 0.0)

    def hold(self, assignment: Assignments) -> None:
        """Do nothing: answers are free."""


class _OwnSurrogate(SurrogateEvaluator):
    """What an owner is given when nobody names an evaluator: its own profile's surrogate."""


class _Profiled(Protocol):
    """What an :class:`EvaluatorField` belongs to."""

    @property
    def profile(self) -> Profile:
        """The profile that is summed up where no evaluator is named."""


class EvaluatorField:
    """A dataclass field that gives an evaluator for the ``None`` it was set to.

    A surrogate that stood in for ``None`` is set as ``None`` again, so that
    ``dataclasses.replace(problem, profile=other)`` does not keep the old profile's.
    """

    @overload
    def __get__(self, owner: None, kind: type[_Profiled]) -> None: ...

    @overload
    def __get__(self, owner: _Profiled, kind: type[_Profiled]) -> Evaluator: ...

    def __get__(self, owner: _Profiled | None, kind: type[_Profiled]) -> Evaluator | None:
        # Of the class itself, dataclass asks for the default.
        return None if owner is None else owner.__dict__["evaluator"]

    def __set__(self, owner: _Profiled, given: Evaluator | None) -> None:
        own = given is None or isinstance(given, _OwnSurrogate)
        owner.__dict__["evaluator"] = _OwnSurrogate(owner.profile) if own else given
