"""NSGA-II over loss and stored bits, with a predictor of the loss: a whole front, as AMQ finds it.

Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 6, 2002, by
pymoo; the search around it is that of AMQ (EMNLP 2025, dlwns147/amq): evaluate a design, fit a
predictor, let NSGA-II find its front, evaluate a few maps of that, and again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.errors import InputError
from dmpq.evaluation import FAILURE_NATS
from dmpq.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Predict = Callable[[Ints], Floats]
"""Takes maps, (K, D), to their predicted KL, (K,), nats per token."""

_CROSSOVER: Final = 0.9
"""Share of offspring that have two parents, as in AMQ's script."""

_FRUITLESS: Final = 5
"""Fronts in a row without a new map after which the search ends."""

_LEAST_KL: Final = 1e-12
"""Below this a KL is rounding, and has no logarithm to speak of."""


@dataclass(frozen=True, kw_only=True)
class NSGA2Agent:
    """Searches the front of KL against stored bits, within every limit.

    The front is in the result's history: its maps are the ones that no other evaluated map beats
    in both ``kl`` and ``effective_bits``. The map returned is the one of best reward.

    As published, the design is the uniform maps within the limits and random maps, each drawn by
    random shares of the formats; the knapsack's map is not among them.

    Where we differ from AMQ: its radial basis functions interpolate the loss itself, which takes
    more evaluations than decisions; ours interpolate the logarithm of the loss over the additive
    surrogate, linear ones, with a constant. A map beyond a limit of the design is replaced by the
    nearest within, and NSGA-II handles limits as constraints; AMQ has none. Its mutation redraws a
    whole map, ours each decision with a chance of 1/D. Its genetic algorithm for the choice of the
    maps to evaluate, evenly spaced in bits, is a farthest-first choice here, for half of each
    batch; the other half are the maps of best predicted reward, since one map is wanted in the
    end. Its 250 + 200 x 50 evaluations are 16 + n x 8. No decision is fixed beforehand.

    Attributes:
        initial: Maps of the design, at most.
        batch: Maps evaluated per front.
        population: Maps of a generation.
        generations: Generations per front.
    """

    name: ClassVar[str] = "nsga2"
    signal: ClassVar[str] = "predicted loss, a front"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "AMQ, EMNLP 2025"

    initial: int = 16
    batch: int = 8
    population: int = 100
    generations: int = 20

    def __post_init__(self) -> None:
        for name in ("initial", "batch", "population", "generations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose 1 or more.")

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map of the fronts; see :meth:`dmpq.agents.Agent.search`.

        Raises:
            InputError: If pymoo is not installed.
        """
        _require_pymoo()
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        rng = np.random.default_rng(seed)
        recorder.evaluate(_design(problem, count=min(self.initial, evaluations), rng=rng))
        fruitless = 0
        while recorder.remaining and fruitless < _FRUITLESS:
            known = np.array([candidate.assignment for candidate in recorder.history])
            predict = _predictor(problem, known, np.array([one.kl for one in recorder.history]))
            found = self._front(problem, predict, known, seed=int(rng.integers(2**31)))
            seen = {one.tobytes() for one in known}
            new = np.array([one.tobytes() not in seen for one in found], bool)
            found = found[new & problem.feasible(found)]
            if len(found):
                count = min(self.batch, recorder.remaining)
                recorder.evaluate(_chosen(problem, predict, found, known, count=count))
            fruitless = 0 if len(found) else fruitless + 1
        return recorder.result()

    def _front(self, problem: Problem, predict: Predict, start: Ints, *, seed: int) -> Ints:
        """Return the last population of NSGA-II on the prediction, distinct maps, (n, D)."""
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import Problem as PymooProblem
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.optimize import minimize

        decisions, formats = problem.sizes.shape
        rows = np.arange(decisions)
        taken, limits = problem.linear_limits

        class Predicted(PymooProblem):  # type: ignore[misc]
            """Predicted KL and stored bits, both to be lowered, within the limits."""

            def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
                maps = np.asarray(x, np.int64)
                over = taken[:, rows, maps].sum(2) / limits[:, None] - 1
                # The limits that do not add up are only met or not.
                broken = np.where(problem.feasible(maps), 0.0, 1e-3)
                out["F"] = np.stack([predict(maps), problem.effective_bits(maps)], axis=1)
                out["G"] = np.stack([*np.maximum(over, 0), broken], axis=1)

        class Redraw(Mutation):  # type: ignore[misc]
            """Draws a format anew for each decision with a chance of 1/D."""

            def _do(self, _: Any, x: Any, *__: Any, random_state: Any = None, **___: Any) -> Any:
                drawn = random_state.integers(formats, size=x.shape)
                return np.where(random_state.random(x.shape) < 1 / decisions, drawn, x)

        result = minimize(
            Predicted(
                n_var=decisions,
                n_obj=2,
                n_ieq_constr=len(limits) + 1,
                xl=0,
                xu=formats - 1,
                vtype=int,
            ),
            NSGA2(
                pop_size=self.population,
                sampling=start,
                crossover=UniformCrossover(prob=_CROSSOVER),
                mutation=Redraw(),
            ),
            ("n_gen", self.generations),
            seed=seed,
        )
        return np.unique(np.asarray(result.pop.get("X"), np.int64), axis=0)


def _require_pymoo() -> None:
    try:
        import pymoo  # noqa: F401
    except ImportError:
        raise InputError(
            "The agent 'nsga2' needs pymoo, which is not installed; install the extra with: "
            "pip install 'dmpq[search]'."
        ) from None


def _design(problem: Problem, *, count: int, rng: np.random.Generator) -> Ints:
    """Return distinct maps within the limits: the uniform ones, then random ones, (n, D)."""
    decisions, formats = problem.sizes.shape
    uniform = np.stack([problem.uniform(key) for key in problem.menu.keys])
    maps = [*uniform[problem.feasible(uniform)]][:count]
    sizes = problem.sizes.astype(np.float64)
    for _ in range(count - len(maps)):
        shares = rng.random((formats,))
        drawn: Ints = rng.choice(formats, size=(decisions,), p=shares / shares.sum())
        if not problem.feasible(drawn[None])[0]:
            asked = np.take_along_axis(sizes, drawn[:, None], axis=1)
            drawn = problem.project(np.abs(sizes - asked) / sizes.max())
        maps.append(drawn)
    return np.unique(np.array(maps, np.int64), axis=0)


def _predictor(problem: Problem, maps: Ints, kl: Floats) -> Predict:
    """Return the additive surrogate, corrected by what evaluated maps (n, D) say of it."""
    from scipy.interpolate import RBFInterpolator

    scale = max(len(problem.menu) - 1, 1)
    usable = np.isfinite(kl) & (kl < FAILURE_NATS)
    if not usable.any():
        return lambda wanted: problem.surrogate(wanted).kl
    additive = problem.surrogate(maps[usable]).kl
    ratio = np.log(np.maximum(kl[usable], _LEAST_KL) / np.maximum(additive, _LEAST_KL))
    correction = RBFInterpolator(maps[usable] / scale, ratio, kernel="linear", degree=0)

    def predict(wanted: Ints) -> Floats:
        corrected: Floats = problem.surrogate(wanted).kl * np.exp(correction(wanted / scale))
        return corrected

    return predict


def _chosen(problem: Problem, predict: Predict, found: Ints, known: Ints, *, count: int) -> Ints:
    """Return the maps to evaluate, at most ``count``: half by reward, half by distance in bits."""
    scores = problem.surrogate(found)
    per_nat = problem.weights.as_array()[0] / problem.baselines.damage
    reward = scores.reward + per_nat * (scores.kl - predict(found))
    chosen = [*np.argsort(-reward, kind="stable")[: (count + 1) // 2].tolist()]
    bits = scores.effective_bits
    taken = [*problem.effective_bits(known), *bits[chosen]]
    while len(chosen) < min(count, len(found)):
        distance = np.abs(bits[:, None] - np.array(taken)).min(1)
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        taken.append(bits[chosen[-1]])
    return found[chosen]
