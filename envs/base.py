"""What all environments share: the problem, the true score of a finished map, state, rendering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, Unpack, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dmpq.envs import render
from dmpq.envs.generator import ProblemSettings, make_problem
from dmpq.envs.observation import NamedParts, Observation, ObservationMode, cost_summary
from dmpq.errors import InputError, unknown
from dmpq.problem import Problem, Scores

ActType = TypeVar("ActType")
Step = tuple[Observation, float, bool, bool, dict[str, Any]]

FAILURE_REWARD: Final = -100.0
"""R of a map whose loss is not finite; the narrowest uniform map's is about -1."""

_TOLERANCE: Final = 1e-9
"""Rewards this close count as equal when a map is compared with the knapsack's."""


class EnvOptions(ProblemSettings, total=False):
    """Arguments that every environment takes, beside those of its problem."""

    problem: Problem | None
    score: Callable[[NDArray[np.integer]], Scores] | None
    observation: ObservationMode
    render_mode: str | None


@dataclass(frozen=True)
class EnvState:
    """Where an episode stands: plain values, hashable, enough to go on from.

    Attributes:
        position: Decisions or steps taken.
        assignment: Menu index of each decision, -1 where undecided.
        totals: Running sums of the environment, floats.
    """

    position: int
    assignment: tuple[int, ...]
    totals: tuple[float, ...] = ()


class BitMapEnv(gym.Env[Observation, ActType], ABC):
    """Base of the environments; see the leaves for their contracts.

    Args:
        problem: A problem made in Python; without it, one is made from ``settings``.
        score: Replaces ``problem.evaluate``, for example by a recorder that counts evaluations:
            takes maps (K, D), returns their scores.
        observation: ``"flat"`` or ``"dict"``.
        render_mode: ``"ansi"``, ``"rgb_array"`` or ``None``.
        settings: See :func:`~dmpq.envs.generator.make_problem`; plain JSON values.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        *,
        problem: Problem | None = None,
        score: Callable[[NDArray[np.integer]], Scores] | None = None,
        observation: ObservationMode = "flat",
        render_mode: str | None = None,
        **settings: Unpack[ProblemSettings],
    ) -> None:
        if problem is not None and settings:
            raise InputError(
                f"A problem is given, so {', '.join(settings)} would be ignored; set them when "
                "the problem is made."
            )
        if observation not in get_args(ObservationMode):
            raise unknown("observation", observation, get_args(ObservationMode))
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render mode", render_mode, self.metadata["render_modes"])
        self.problem = make_problem(**settings) if problem is None else problem
        self.render_mode = render_mode
        self._score = self.problem.evaluate if score is None else score
        self._parts = NamedParts(self.problem) if observation == "dict" else None
        self._bit_capacity = _bit_capacity(self.problem)
        self._floor: float | None = None
        self._position = 0
        self._map = self._blank()

    def _blank(self) -> NDArray[np.int64]:
        return np.full(self.problem.num_decisions, render.UNDECIDED)

    def _evaluate(self, assignment: NDArray[np.int64]) -> tuple[Scores, float, dict[str, Any]]:
        """Return a finished map's scores, its reward, and what ``info`` says of it."""
        scores = self._score(assignment[None])
        reward = float(scores.reward[0])
        kl, nll = float(scores.kl[0]), float(scores.nll[0])
        terms = {name: float(term[0]) for name, term in scores.terms.items()}
        if not np.isfinite(reward):
            kl = nll = np.inf
            reward = FAILURE_REWARD
            terms = dict.fromkeys(terms, 0.0) | {"accuracy": reward}
        info = {
            "assignment": assignment.copy(),
            "objective": reward,
            "reward_terms": terms,
            "kl": kl,
            "nll": nll,
            "effective_bits": float(scores.effective_bits[0]),
            "latency_s": float(scores.cost.latency_s[0]),
            "memory_bytes": float(scores.cost.memory_bytes[0]),
            "energy_j": float(scores.cost.energy_j[0]),
            "feasible": bool(scores.feasible[0]),
        }
        return scores, reward, info

    def _is_success(self, reward: float, info: dict[str, Any]) -> bool:
        """Whether a map meets every limit and is no worse than the exact knapsack's."""
        if self._floor is None:
            self._floor = self._evaluate(self.problem.mckp())[1]
        good = FAILURE_REWARD < reward >= self._floor - _TOLERANCE
        return good and bool(info["feasible"])

    def _feasible(self, assignment: NDArray[np.integer]) -> bool:
        return bool(self.problem.feasible(assignment[None])[0])

    def _nearest(self, wanted: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the map closest to the wanted one that meets every limit.

        Distance is the sum over decisions of the stored bits by which the widths differ; the
        wanted map itself if it is within the limits.
        """
        if self._feasible(wanted):
            return wanted.astype(np.int64)
        sizes = self.problem.sizes.astype(np.float64)
        asked = np.take_along_axis(sizes, wanted[:, None], axis=1)
        return self.problem.project(np.abs(sizes - asked) / sizes.max())

    def _named(self, scores: Scores, **more: NDArray[np.float32]) -> Observation:
        """Return the observation by name of a finished map."""
        assert self._parts is not None
        costs = cost_summary(self.problem, scores, budget_left=self._budget_left())
        return self._parts.observe(self._map, costs, **more)

    def _budget_left(self) -> float:
        """Return the share of the bit budget that the finished map leaves, in [0, 1]."""
        used = self.problem.sizes[np.arange(len(self._map)), self._map].sum()
        return max(1 - float(used) / self._bit_capacity, 0.0)

    def state(self) -> EnvState:
        """Return where the episode stands; :meth:`set_state` goes back to it."""
        return EnvState(self._position, tuple(self._map.tolist()), self._totals())

    def set_state(self, state: EnvState) -> Observation:
        """Go to a state of this environment and return what is observed there.

        Raises:
            InputError: If the state is not one of this environment.
        """
        fits = (
            len(state.assignment) == self.problem.num_decisions
            and all(-1 <= index < len(self.problem.menu) for index in state.assignment)
            and len(state.totals) == len(self._totals())
            and 0 <= state.position <= self.horizon
        )
        if not fits:
            raise InputError(
                f"The state is of another environment: this one has {self.problem.num_decisions} "
                f"decisions among {len(self.problem.menu)} formats."
            )
        self._position = state.position
        self._map = np.array(state.assignment, dtype=np.int64)
        return self._restore(state.totals)

    @property
    @abstractmethod
    def horizon(self) -> int:
        """Steps in an episode."""

    @abstractmethod
    def _totals(self) -> tuple[float, ...]:
        """Return the running sums that a state keeps."""

    @abstractmethod
    def _restore(self, totals: tuple[float, ...]) -> Observation:
        """Take the running sums over and return the observation."""

    def render(self) -> Any:
        """Return the map so far: a table (``"ansi"``, str) or a heat map (``"rgb_array"``)."""
        if self.render_mode is None:
            gym.logger.warn("render() without a render_mode; pass one to gym.make.")
            return None
        if self.render_mode == "rgb_array":
            return render.heat_map(self.problem, self._map)
        decided = int((self._map >= 0).sum())
        title = f"{decided} of {len(self._map)} decisions, keys are bits"
        return render.table(self.problem, self._map, title)


def _bit_capacity(problem: Problem) -> float:
    """Return the bits that may be stored: the limit, or the widest map's where there is none."""
    widest = float(problem.sizes.max(1).sum())
    limit = problem.constraints.avg_bits
    return widest if limit is None else min(widest, limit * problem.num_weights)
