"""CLADO's program (arXiv 2307.05657, DAC 2025): bits by a quadratic form of measured pairs.

Deng, Sharify, Wang et al., "Mixed-Precision Quantization for Deep Vision Models with Integer
Quadratic Programming" (first called CLADO): to second order, the loss of a quantized network is
a quadratic form of which bits each layer has; its diagonal is what each layer adds by itself, and
the cross terms what two layers add beyond that, by differences of forward passes (section 3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import objective
from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.loss_fit import LossFit, fitted
from dmpq.agents.neighbours import neighbours
from dmpq.agents.programs import layer_of_decision
from dmpq.errors import InputError
from dmpq.objective import reward_terms
from dmpq.problem import Problem
from dmpq.solvers.local_search import descended

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK: Final = 8
"""Maps that are measured in one call."""
_DESCENTS: Final = 8
"""Times that the quadratic form is made linear anew on the way to its minimum."""
_STARTS: Final = 16
"""Best maps from which a minimum is looked for, until there is one."""
_EXCHANGES: Final = 64
"""Exchanges of two measured steps that are tried at a map."""
_USES: Final = 4
"""Pairs that a step is measured in, at most."""
_IN_DOUBT: Final = 64
"""Steps whose pairs may be measured."""


@dataclass(frozen=True, kw_only=True)
class CladoAgent:
    """Fits a quadratic form to measured steps and pairs of steps, and evaluates its minima.

    The paper measures every pair of every two formats; of 64 experts with 5 formats these are
    50,000. Here the form is centred on the knapsack's map, and what is measured are single steps
    from it (:mod:`dmpq.agents.neighbours`), those in doubt first, then pairs of these: steps of
    one layer first, and of equals those whose errors are largest and which are most in doubt.
    Pairs that were not measured are 0, those that were are shrunk to 0 as far as the evidence
    asks, and their matrix is made positive semidefinite, as in the paper
    (:mod:`dmpq.agents.loss_fit`). The authors' integer quadratic program is solved by a local
    search: the form is made linear at a map and the problem's own projection solved there, or
    single changes and exchanges are tried, as long as either lowers it. The minima are evaluated,
    each joins the measurements, and the form is fitted again. The next round measures steps from
    the best map so far.

    Attributes:
        rounds: Rounds, each of its share of the evaluations.
        singles: Share of a round for single steps.
        pairs: Share of a round for pairs of steps.
        batch: Minima that are evaluated before the form is fitted again.

    Raises:
        InputError: If the shares are none, or leave nothing for minima; or rounds or batch are
            below 1.
    """

    name: ClassVar[str] = "clado"
    signal: ClassVar[str] = "pairs of steps, measured"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 2307.05657"

    rounds: int = 2
    singles: float = 0.5
    pairs: float = 0.2
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("singles", "pairs"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it is a share: 0 or more, below 1."
                )
        if self.singles + self.pairs >= 1:
            raise InputError(
                f"singles is {self.singles} and pairs is {self.pairs}; some evaluations must be "
                "left for minima: a sum below 1."
            )
        for name in ("rounds", "batch"):
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
        """Return the best map measured. Nothing depends on the seed."""
        del seed
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        centre = problem.mckp()
        recorder.evaluate(centre[None])
        for rounds_left in range(self.rounds, 0, -1):
            self._round(problem, centre, recorder, recorder.left / rounds_left)
        return recorder.result()

    def _round(self, problem: Problem, centre: Ints, recorder: Recorder, budget: float) -> None:
        """Measure steps and pairs from the best map so far, then minima of the form.

        Args:
            problem: What is searched.
            centre: (D,), the form's centre, which was evaluated.
            recorder: Evaluates them.
            budget: Evaluations that the round may take.
        """
        whole, fit = recorder.left, _fitted(problem, centre, recorder)
        best = max(recorder.history, key=lambda one: one.reward).assignment
        recorder.hold(best)
        values = objective(problem, fit.marginal(best))
        steps = neighbours(problem, best, count=2 * problem.num_decisions, values=values)
        _measure(recorder, steps, least=whole - budget * self.singles)
        chosen = _pairs(problem, best, steps)
        _measure(recorder, chosen, least=whole - budget * (self.singles + self.pairs))
        while (few := int(recorder.left - whole + budget)) > 0:
            fit = _fitted(problem, centre, recorder)
            found = self._minima(problem, fit, recorder, most=few)
            if not len(found):
                break
            recorder.evaluate(found)

    def _minima(self, problem: Problem, fit: LossFit, recorder: Recorder, *, most: int) -> Ints:
        """Return maps of a low form that were not evaluated, the lowest first, (n, D)."""
        measured = sorted(recorder.history, key=lambda one: -one.reward)
        seen = {one.assignment.tobytes() for one in measured}
        found: list[Ints] = []
        for _ in range(min(self.batch, most)):
            # Around the best map all may have been seen, and around others not.
            starts = [*found[-1:], *(one.assignment for one in measured[:_STARTS])]
            tried = (minimum(problem, fit, start, seen) for start in starts)
            lowest = next((one for one in tried if one is not None), None)
            if lowest is None:
                break
            seen.add(lowest.tobytes())
            found.append(lowest)
        return np.array(found, np.int64).reshape(-1, problem.num_decisions)


def minimum(problem: Problem, fit: LossFit, start: Ints, seen: set[bytes]) -> Ints | None:
    """Return a map of least predicted objective among those not seen, (D,); ``None`` for none.

    A local search on the quadratic form. The damage is the form's; what the hardware costs, and
    whether the limits are met, is asked of the full cost model.

    Args:
        problem: Says what the objective and the limits are.
        fit: The form.
        start: (D,), a map within the limits.
        seen: Maps that do not count, as bytes.
    """

    def score(maps: Ints) -> Floats:
        terms = reward_terms(
            problem.weights, problem.baselines, fit.loss(maps), problem.costs(maps)
        )
        found: Floats = -sum(terms.values(), np.zeros(len(maps)))
        found[~problem.feasible(maps)] = np.inf
        found[[one.tobytes() in seen for one in maps]] = np.inf
        return found

    choice, at = start, float(score(start[None])[0])
    for _ in range(_DESCENTS):
        values = objective(problem, fit.marginal(choice))
        tried = np.concatenate(
            [
                problem.project_rewards(values)[None],
                descended(choice, values, problem.projection.groups, score)[None],
                _exchanges(problem, fit, choice, values),
            ]
        )
        scores = score(tried)
        if not scores.min() < at:
            break
        choice, at = tried[scores.argmin()], float(scores.min())
    return choice if np.isfinite(at) else None


def _exchanges(problem: Problem, fit: LossFit, choice: Ints, values: Floats) -> Ints:
    """Return maps that two measured steps make of a map, those of the lowest form first, (n, D).

    Values that add up do not see what two steps save together.

    Args:
        problem: Says what the limits that add up are.
        fit: The form.
        choice: (D,), the map.
        values: (D, B), the objective made linear there.
    """
    rows, formats = np.arange(len(choice)), values.shape[1]
    decisions, to = np.divmod(fit.cells, formats)
    if not len(fit.cells):
        return np.empty((0, len(choice)), np.int64)
    gain = (values - values[rows, choice][:, None]).ravel()[fit.cells]
    here = np.array([choice[d] == f for d, f in zip(decisions, to, strict=True)])
    # A decision that has left the centre no longer meets others where it was.
    left = np.zeros_like(fit.pairs)
    now = {int(decisions[i]): i for i in np.flatnonzero(here)}
    for i, decision in enumerate(decisions.tolist()):
        if decision in now:
            left[i] = fit.pairs[now[decision]]
    both = fit.pairs - left - left.T
    at = [now.get(decision, -1) for decision in decisions.tolist()]
    moved = np.array(at)
    inside = np.where((moved >= 0)[:, None] & (moved >= 0), fit.pairs[moved][:, moved], 0.0)
    weight = problem.weights.acc / problem.baselines.damage
    change = gain[:, None] + gain + weight * (both + inside)
    change[decisions[:, None] == decisions] = np.inf
    change[here] = np.inf
    change[:, here] = np.inf
    exact, limits = problem.linear_limits
    for taken, limit in zip(exact, limits, strict=True):
        more = (taken - taken[rows, choice][:, None]).ravel()[fit.cells]
        change[more[:, None] + more > limit - taken[rows, choice].sum()] = np.inf
    one, other = np.triu_indices(len(fit.cells), 1)
    order = np.argsort(change[one, other], kind="stable")[:_EXCHANGES]
    order = order[change[one[order], other[order]] < 0]
    maps = np.repeat(choice[None], len(order), axis=0)
    for cells in (one[order], other[order]):
        maps[np.arange(len(order)), decisions[cells]] = to[cells]
    return maps


def _fitted(problem: Problem, centre: Ints, recorder: Recorder) -> LossFit:
    """Return the form that all measurements so far speak for."""
    history = recorder.history
    maps = np.array([one.assignment for one in history])
    kl = np.array([one.kl for one in history])
    others = (maps != centre).any(1)
    own = kl[~others][0]
    # Errors of two formats of one weight are not in line: their squares add up in a step, and
    # a sensitivity is half of a square.
    rows, squares = np.arange(len(centre)), 2 * np.maximum(problem.sensitivity, 0.0)
    return fitted(
        centre,
        problem.sensitivity,
        maps[others],
        kl[others] - own,
        layers=layer_of_decision(problem),
        reach=np.sqrt(squares + squares[rows, centre][:, None]),
    )


def _measure(recorder: Recorder, maps: Ints, *, least: float) -> None:
    """Evaluate maps, in order, as long as so many evaluations are left."""
    done = 0
    while done < len(maps) and (fit := int(recorder.left - least)) > 0:
        chunk = maps[done : done + min(_CHUNK, fit)]
        recorder.evaluate(chunk)
        done += len(chunk)


def _pairs(problem: Problem, centre: Ints, steps: Ints) -> Ints:
    """Return maps of two steps each, within every limit, in the order to be measured, (n, D).

    Args:
        problem: Says what the limits are.
        centre: (D,), the map that the steps start from.
        steps: (K, D), maps of one step, or of one that another pays for, those in doubt first.
    """
    layers = layer_of_decision(problem)
    singles: dict[tuple[int, int], None] = {}
    for one in steps:
        for decision in np.flatnonzero(one != centre):
            singles[int(decision), int(one[decision])] = None
    doubt = [*singles][:_IN_DOUBT]
    damage = np.maximum(problem.sensitivity, 0.0)

    def error(step: tuple[int, int]) -> float:
        decision, fmt = step
        return float(np.sqrt(damage[decision, fmt] + damage[decision, centre[decision]]))

    def worth(pair: tuple[int, int]) -> tuple[bool, float]:
        one, other = (doubt[i] for i in pair)
        apart = bool(layers[one[0]] != layers[other[0]])
        return apart, -error(one) * error(other) / (2 + sum(pair) / len(doubt))

    candidates = [
        pair
        for pair in combinations(range(len(doubt)), 2)
        if doubt[pair[0]][0] != doubt[pair[1]][0]
    ]
    used: Counter[int] = Counter()
    maps = []
    for pair in sorted(candidates, key=worth):
        if max(used[i] for i in pair) >= _USES:
            continue
        moved = centre.copy()
        for i in pair:
            moved[doubt[i][0]] = doubt[i][1]
        if problem.feasible(moved[None])[0]:
            used.update(pair)
            maps.append(moved)
    return np.array(maps, np.int64).reshape(-1, len(centre))
