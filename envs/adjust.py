"""``dmpq/ExpertBitsAdjust-v0``: pick an expert and move it one format up or down."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.envs.base import BitMapEnv, EnvOptions, Step
from dmpq.envs.observation import Observation, box, cost_summary
from dmpq.errors import InputError


class ExpertBitsAdjustEnv(BitMapEnv[np.int64]):
    """Improve a map by single moves.

    ## Description

    The episode starts from a map within every limit. Each step moves one decision, or one group
    of decisions of similar sensitivity, to the next wider or narrower format of the menu.

    ## Action Space

    `Discrete(2 * G)` with G groups; each decision is a group of its own unless `groups` is set.
    Action `2 * g` moves group `g` down, `2 * g + 1` up; members at the end of the menu stay.
    `action_masks()` marks the moves that change the map and keep it within every limit. Any other
    move leaves the map as it is, and `info["invalid_action"]` says so.

    ## Observation Space

    `observation="flat"`: `Box(-1, 1, (D * F + C + D + 6,), float32)`.

    | Part       | Size  | Min | Max | Meaning                                                 |
    | ---------- | ----- | --- | --- | ------------------------------------------------------- |
    | rows       | D * F | -1  | 1   | `problem.features`, decision by decision                |
    | context    | C     | -1  | 1   | `problem.context`: limits, hardware prices, workload    |
    | bits       | D     | 0   | 1   | current nominal width / 16                              |
    | costs      | 4     | 0   | 1   | loss, latency, memory, energy: x / (1 + x), x over base |
    | budget     | 1     | 0   | 1   | share of the bit budget that is left                    |
    | steps left | 1     | 0   | 1   | share of the episode that is left                       |

    :func:`dmpq.envs.rows` gives the (D, F) view. `observation="dict"`: the parts of
    :class:`dmpq.envs.NamedParts`, and `steps_left`.

    ## Rewards

    The change of `R` (:mod:`dmpq.objective`) that the move brings, so that the return is what the
    final map gains over the start. `info["reward_terms"]` holds the change of each term,
    `info["objective"]` R itself. R is -100 where the loss is not finite.

    ## Starting State

    The exact knapsack's map, or `reset(options={"assignment": [...]})`, a map within the limits.
    Nothing is random.

    ## Episode End

    Termination: never. Truncation: after 2 * G steps. `info["is_success"]`, on the last step,
    says whether the map is no worse than the exact knapsack's.

    ## Arguments

    | Name          | Default       | Meaning                                                   |
    | ------------- | ------------- | --------------------------------------------------------- |
    | `groups`      | `None`        | groups of equal size, by sensitivity at the first format  |
    | `observation` | `"flat"`      | or `"dict"`                                               |
    | `evaluator`   | `"surrogate"` | or `"model"`, which evaluates the reference model         |
    | `render_mode` | `None`        | `"ansi"` or `"rgb_array"`                                 |
    | others        |               | see :func:`dmpq.envs.make_problem`; or `problem=`         |

    ## Version History

    * v0: first release.
    """

    def __init__(self, *, groups: int | None = None, **options: Unpack[EnvOptions]) -> None:
        super().__init__(**options)
        problem = self.problem
        decisions = problem.num_decisions
        if groups is not None and not 1 <= groups <= decisions:
            raise InputError(f"groups is {groups}; choose from 1 to {decisions} (decisions).")
        order = (
            np.arange(decisions)
            if groups is None
            else np.argsort(problem.sensitivity[:, problem.menu.narrowest], kind="stable")
        )
        self._groups = np.array_split(order, groups or decisions)
        self._fixed = np.concatenate([problem.features.ravel(), problem.context], dtype=np.float32)
        self._map = problem.mckp()
        self.action_space = spaces.Discrete(2 * len(self._groups))
        space: spaces.Space[Any] = (
            box(self._fixed.size + decisions + 6)
            if self._parts is None
            else self._parts.space(steps_left=1)
        )
        self.observation_space = space

    @property
    def horizon(self) -> int:
        """Steps in an episode: two per group."""
        return 2 * len(self._groups)

    @property
    def _allowed(self) -> str:
        return f"an integer from 0 to {2 * len(self._groups) - 1}: 2 * group, + 1 to move it up"

    def _begin(self, options: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        self._map = self._start(options.get("assignment"))
        return self._arrive()

    def _start(self, asked: Any) -> NDArray[np.int64]:
        if asked is None:
            return self.problem.mckp()
        start = np.asarray(asked, dtype=np.int64)
        formats = len(self.problem.menu)
        if start.shape != self._map.shape or not ((start >= 0) & (start < formats)).all():
            raise InputError(
                f"options['assignment'] must be {len(self._map)} menu indices from 0 to "
                f"{formats - 1}."
            )
        if not self._feasible(start):
            raise InputError(
                "options['assignment'] exceeds a limit; start from a map within the limits."
            )
        return start

    def _step(self, action: NDArray[Any]) -> Step:
        moved = self._moved(int(action))
        valid = bool((moved != self._map).any()) and self._feasible(moved)
        before, terms = self._objective, self._terms
        self._position += 1
        if valid:
            self._map = moved
        observation, info = self._arrive()
        info["invalid_action"] = not valid
        info["reward_terms"] = {k: v - terms[k] for k, v in self._terms.items()}
        done = self._position >= self.horizon
        if done:
            info["is_success"] = self._is_success(self._objective, info)
        return observation, self._objective - before, False, done, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which moves change the map and keep it within every limit, (2 * G,)."""
        moved = np.stack([self._moved(action) for action in range(self.horizon)])
        mask: NDArray[np.bool_] = (moved != self._map).any(1) & self.problem.feasible(moved)
        return mask

    def _moved(self, action: int) -> NDArray[np.int64]:
        group, up = divmod(action, 2)
        moved = self._map.copy()
        step = 1 if up else -1
        members = self._groups[group]
        moved[members] = np.clip(moved[members] + step, 0, len(self.problem.menu) - 1)
        return moved

    def _arrive(self) -> tuple[Observation, dict[str, Any]]:
        """Score the current map; return what is observed and what ``info`` says."""
        scores, self._objective, info = self._evaluate(self._map)
        self._terms = dict(info["reward_terms"])
        left = np.array([1 - self._position / self.horizon], dtype=np.float32)
        if self._parts is not None:
            return self._named(scores, steps_left=left), info
        costs = cost_summary(self.problem, scores, budget_left=self._budget_left())
        widths = self.problem.menu.bits[self._map] / 16
        return np.concatenate([self._fixed, widths, costs, left], dtype=np.float32), info

    def _decided(self, position: int) -> int:
        del position
        return self.problem.num_decisions

    def _totals(self) -> tuple[float, ...]:
        return ()

    def _restore(self, totals: tuple[float, ...]) -> Observation:
        del totals
        return self._arrive()[0]
