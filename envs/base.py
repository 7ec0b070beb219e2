"""What all environments share: the problem, the true score of a finished map, state, rendering."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, TypeVar, Unpack, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces
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

    An action outside the action space is refused, except that a box takes any finite numbers: the
    leaf says what becomes of those beyond its bounds. A step before the first reset, or after the
    end of an episode, is refused as Gymnasium does.

    Args:
        problem: A problem made in Python; without it, one is made from ``settings``.
        observation: ``"flat"`` or ``"dict"``.
        render_mode: ``"ansi"``, ``"rgb_array"`` or ``None``.
        settings: See :func:`~dmpq.envs.generator.make_problem`; plain JSON values.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        *,
        problem: Problem | None = None,
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
        self._parts = NamedParts(self.problem) if observation == "dict" else None
        self._bit_capacity = _bit_capacity(self.problem)
        self._floor: float | None = None
        self._started = False
        self._position = 0
        self._map = self._blank()

    def score(self, assignments: NDArray[np.integer]) -> Scores:
        """Return the true scores of finished maps, (K, D); override to count or to log them."""
        return self.problem.evaluate(assignments)

    def _blank(self) -> NDArray[np.int64]:
        return np.full(self.problem.num_decisions, render.UNDECIDED)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; nothing is random. For options see the class.

        Raises:
            InputError: If an option is not possible here.
        """
        super().reset(seed=seed)
        self._started = False
        self._position = 0
        self._map = self._blank()
        beginning = self._begin(options or {})
        self._started = True
        return beginning

    def step(self, action: ActType) -> Step:
        """Take one step; see the class.

        Raises:
            InputError: If the action is outside the action space.
            gymnasium.error.ResetNeeded: If no episode has begun, or it is over.
        """
        checked = self._checked(action)
        if not self._started:
            raise gym.error.ResetNeeded("No episode has begun: call reset() before step().")
        if self._position >= self.horizon:
            raise gym.error.ResetNeeded("The episode is over: call reset() before step().")
        return self._step(checked)

    def _checked(self, action: Any) -> NDArray[Any]:
        """Return the action as an array of the space's shape, or refuse it."""
        space: spaces.Space[Any] = self.action_space
        try:
            given = np.asarray(action)
        except (TypeError, ValueError):  # a ragged list
            given = np.asarray(None)
        wrong = action if given.dtype == object else given.tolist()
        subject = "The action"
        kinds = "biuf" if isinstance(space, spaces.Box) else "biu"
        if given.shape == space.shape and given.dtype.kind in kinds:
            possible = _possible(space, given)
            if possible.all():
                return given
            wrong = given[~possible][0].item()
            subject = "An entry of the action" if given.ndim else subject
        raise InputError(f"{subject} is {reprlib.repr(wrong)}; it must be {self._allowed}.")

    def _evaluate(self, assignment: NDArray[np.int64]) -> tuple[Scores, float, dict[str, Any]]:
        """Return a finished map's scores, its reward, and what ``info`` says of it."""
        scores = self.score(assignment[None])
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
        )
        if not fits:
            raise InputError(
                f"The state is of another environment: this one has {self.problem.num_decisions} "
                f"decisions among {len(self.problem.menu)} formats."
            )
        if not 0 <= state.position <= self.horizon:
            raise InputError(
                f"The state is at position {state.position}; an episode of this environment has "
                f"positions from 0 to {self.horizon}."
            )
        decided = self._decided(state.position)
        undecided = [index < 0 for index in state.assignment]
        if any(undecided[:decided]) or not all(undecided[decided:]):
            raise InputError(
                f"The state is at position {state.position}, where this environment has taken "
                f"the first {decided} decisions and no other; the assignment has not."
            )
        self._position = state.position
        self._map = np.array(state.assignment, dtype=np.int64)
        self._started = True
        return self._restore(state.totals)

    @property
    @abstractmethod
    def horizon(self) -> int:
        """Steps in an episode."""

    @property
    @abstractmethod
    def _allowed(self) -> str:
        """What an action must be, in words."""

    @abstractmethod
    def _begin(self, options: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Start an episode on a blank map."""

    @abstractmethod
    def _step(self, action: NDArray[Any]) -> Step:
        """Take one step; the action has the space's shape and lies in it."""

    @abstractmethod
    def _decided(self, position: int) -> int:
        """Return how many decisions, counted from the first, are taken at a position."""

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


def _possible(space: spaces.Space[Any], given: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which entries of an action are in the space, or finite where it is a box."""
    if isinstance(space, spaces.Box):
        return np.asarray(np.isfinite(given))
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    choices = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return np.asarray((given >= 0) & (given < choices))


def _bit_capacity(problem: Problem) -> float:
    """Return the bits that may be stored: the limit, or the widest map's where there is none."""
    widest = float(problem.sizes.max(1).sum())
    limit = problem.constraints.avg_bits
    return widest if limit is None else min(widest, limit * problem.num_weights)
