"""EvoPress: evolution by level switches, with offspring screened on little text.

Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025 (arXiv 2410.14649), by its code: ``evo_quant_search.py`` of IST-DASLab/EvoPress.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.steps import stepped
from dmpq.errors import InputError
from dmpq.problem import Problem

Ints = NDArray[np.int64]

_MOST_SWITCHES: Final = 3
"""Switches of a mutation: the lesser of two draws from 1 to this."""

_MOST_CHANGES: Final = 10
"""Decisions that one mutation may change, as in the original's mutation between sizes."""

_LEAST_SPENT: Final = 0.8
"""Share of the bits freed that a mutation must spend again, likewise."""

_TRIES: Final = 10
"""Mutations drawn per offspring wanted; few are possible near the ends of the menu."""

_FRUITLESS: Final = 5
"""Generations in a row without a new map after which the search ends."""


@dataclass(frozen=True, kw_only=True)
class EvoPressAgent:
    """Evolves one parent by (1 + lambda) selection in stages.

    A switch widens a decision by one format and narrows others of the same size, at random, until
    bits and memory are within the limits again: one where the menu's steps are equal, as in the
    original, several where they are not (4 to 8 bits against 4 to 3). Offspring beyond a limit on
    latency or energy are dropped; with such a limit, where a format that the map has not costs a
    launch, every other mutation exchanges the formats of two decisions instead. A generation's
    offspring are screened on small shares of the text, the survivors and the parent are evaluated
    on all of it, and the best is the next parent.
    A screened map counts as its share of an evaluation (:meth:`dmpq.agents.Recorder.screen`). What
    is left when a generation no longer fits goes to offspring that nothing has screened.

    As published, the search starts at a random map, the best of ``initial`` by screening: uniform
    at the narrowest format that exceeds a limit, and narrowed at random decisions until none does.
    Where no limit binds there is nothing to exchange, and the widest map is the only one.

    Where we differ: fitness is the problem's reward, which is the KL alone with ``--weights
    acc=1``; a stage reads the first share of the text, not a fresh random one; a switch never
    narrows what it widens. The original's 128 offspring, 16 and 4 survivors and 1/64, 1/8 and
    all of 131,072 tokens are a quarter of that here, at 1/16, 1/4 and all.

    Attributes:
        offspring: Mutated maps per generation.
        survivors: Maps left after each screening, falling.
        fidelities: Share of the text of each screening, rising.
        initial: Random maps among which the search chooses its start.
    """

    name: ClassVar[str] = "evopress"
    signal: ClassVar[str] = "measured KL, evolution"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 2410.14649"
    reads: ClassVar[str] = "nothing"

    offspring: int = 32
    survivors: tuple[int, ...] = (8, 2)
    fidelities: tuple[float, ...] = (1 / 16, 1 / 4)
    initial: int = 16

    def __post_init__(self) -> None:
        for name in ("offspring", "initial"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose 1 or more.")
        counts = (self.offspring, *self.survivors)
        if counts[-1] < 1 or any(later > earlier for earlier, later in pairwise(counts)):
            raise InputError(
                f"survivors is {self.survivors} of {self.offspring}; they must fall, to 1 or more."
            )
        shares = (*self.fidelities, 1.0)
        rising = all(earlier <= later for earlier, later in pairwise(shares))
        if len(self.fidelities) != len(self.survivors) or not rising or shares[0] <= 0:
            raise InputError(
                f"fidelities is {self.fidelities}; give one share of the text for each of the "
                f"{len(self.survivors)} screenings, above 0 and rising to at most 1."
            )

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map of the evolution; see :meth:`dmpq.agents.Agent.search`."""
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        rng = np.random.default_rng(seed)
        parent = self._start(problem, recorder, rng)
        fruitless = 0
        while recorder.remaining and fruitless < _FRUITLESS:
            before = recorder.remaining
            recorder.hold(parent)
            parent = self._generation(problem, recorder, parent, rng)
            fruitless = 0 if recorder.remaining < before else fruitless + 1
        return recorder.result()

    def _start(self, problem: Problem, recorder: Recorder, rng: np.random.Generator) -> Ints:
        fidelity = (*self.fidelities, 1.0)[0]
        affordable = int((recorder.remaining - 1) / fidelity) + 1
        count = min(self.initial, affordable)
        maps = np.stack([_random_map(problem, rng) for _ in range(count)])
        best = 0 if count == 1 else int(recorder.screen(maps, fidelity=fidelity).argmax())
        recorder.evaluate(maps[best][None])
        chosen: Ints = maps[best]
        return chosen

    def _generation(
        self, problem: Problem, recorder: Recorder, parent: Ints, rng: np.random.Generator
    ) -> Ints:
        """Return the best of the parent and its surviving offspring."""
        maps = _offspring(problem, parent, count=self.offspring, rng=rng)
        counts = (self.offspring, *self.survivors)
        screening = sum(n * share for n, share in zip(counts, self.fidelities, strict=False))
        if recorder.remaining >= screening + counts[-1]:
            for survive, fidelity in zip(self.survivors, self.fidelities, strict=True):
                if len(maps) > survive:
                    rewards = recorder.screen(maps, fidelity=fidelity)
                    maps = maps[np.argsort(-rewards, kind="stable")[:survive]]
        last = maps[: min(counts[-1], recorder.remaining)]
        # The parent comes last, as in the original: of equals, the offspring wins.
        finalists = np.concatenate([last, parent[None]])
        best: Ints = finalists[recorder.evaluate(finalists).reward.argmax()]
        return best


def _random_map(problem: Problem, rng: np.random.Generator) -> Ints:
    """Return a map that a narrowing of random decisions brings just within the limits, (D,)."""
    sizes = problem.sizes
    maps = sizes.argsort(1, kind="stable").T  # uniform, by size
    fitting = np.flatnonzero(problem.feasible(maps))
    if not fitting.size:  # the limits bind so that only mixtures meet them
        return problem.project(rng.random(sizes.shape))
    widest = int(fitting[-1])
    if widest == len(maps) - 1:
        largest: Ints = maps[widest]
        return largest
    order = rng.permutation(len(sizes))
    fewest, most = 0, len(order)
    while most - fewest > 1:  # so many decisions narrowed exceed a limit, so many do not
        middle = (fewest + most) // 2
        if problem.feasible(_narrowed(maps, widest, order[:middle])[None])[0]:
            most = middle
        else:
            fewest = middle
    return _narrowed(maps, widest, order[:most])


def _narrowed(maps: Ints, widest: int, decisions: Ints) -> Ints:
    narrowed: Ints = maps[widest + 1].copy()
    narrowed[decisions] = maps[widest, decisions]
    return narrowed


def _offspring(problem: Problem, parent: Ints, *, count: int, rng: np.random.Generator) -> Ints:
    """Return distinct mutations of a map within every limit, at most ``count``, (n, D)."""
    kinds = np.unique(problem.sizes, axis=0, return_inverse=True)[1].ravel()
    found: dict[bytes, Ints] = {}
    mutations = (_mutated, _exchanged) if problem.projection.priced else (_mutated,)
    for _ in range(_TRIES):
        drawn = [mutations[i % len(mutations)](problem, parent, kinds, rng) for i in range(count)]
        maps = np.array([one for one in drawn if one is not None], np.int64)
        if len(maps):
            maps = maps[(maps != parent).any(1) & problem.feasible(maps)]
            found |= {one.tobytes(): one for one in maps if one.tobytes() not in found}
        if len(found) >= count:
            break
    return np.array([*found.values()][:count], np.int64).reshape(-1, len(parent))


def _exchanged(
    problem: Problem, parent: Ints, kinds: Ints, rng: np.random.Generator
) -> Ints | None:
    """Return a map with the formats of some pairs exchanged, or ``None`` where all are alike."""
    del problem
    child = parent.copy()
    for _ in range(min(rng.integers(1, _MOST_SWITCHES + 1, size=2))):
        one = int(rng.integers(len(child)))
        others = np.flatnonzero((child != child[one]) & (kinds == kinds[one]))
        if not others.size:
            return None
        other = int(rng.choice(others))
        child[one], child[other] = child[other], child[one]
    return child


def _mutated(problem: Problem, parent: Ints, kinds: Ints, rng: np.random.Generator) -> Ints | None:
    """Return a map some switches away, or ``None`` where the draw leads to none."""
    child, sizes, rows = parent.copy(), problem.sizes, np.arange(len(parent))
    target = problem.effective_bits(parent[None])[0]
    taken, limits = problem.linear_limits

    def exceeds(tried: Ints) -> bool:
        """Whether it takes more than a limit that adds up; without one on bits, than the parent.

        What latency or energy rule out is dropped once it is finished.
        """
        if problem.limits.avg_bits is None and problem.effective_bits(tried[None])[0] > target:
            return True
        return bool((taken[:, rows, tried].sum(1) > limits).any())

    for _ in range(min(rng.integers(1, _MOST_SWITCHES + 1, size=2))):
        wider = stepped(sizes, child, 1)
        possible = np.flatnonzero(wider >= 0)
        if not possible.size:
            return None
        up = int(rng.choice(possible))
        child[up] = wider[up]
        while exceeds(child):
            narrower = stepped(sizes, child, -1)
            possible = np.flatnonzero((narrower >= 0) & (kinds == kinds[up]) & (rows != up))
            if not possible.size or (child != parent).sum() > _MOST_CHANGES:
                return None
            down = int(rng.choice(possible))
            child[down] = narrower[down]
    change = (sizes[rows, child] - sizes[rows, parent]).astype(np.float64)
    spent, freed = change[change > 0].sum(), -change[change < 0].sum()
    return child if spent >= _LEAST_SPENT * freed else None
