"""``dmpq/ExpertBits-v0``: one decision per step, with an exact budget mask."""

from __future__ import annotations

from typing import Any, Final, Literal, Unpack, get_args

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.envs.base import BitMapEnv, EnvOptions, Step
from dmpq.envs.observation import Observation, box, squash
from dmpq.errors import unknown
from dmpq.formats import FULL_WIDTH

RewardMode = Literal["dense", "terminal"]

_TERMS: Final = ("accuracy", "latency", "memory", "energy")
_SCALARS: Final = 8


class ExpertBitsEnv(BitMapEnv[np.int64]):
    """Give the experts their bit-widths one after the other, within exact budgets.

    ## Description

    The decisions (experts; projections or layers under other serving granularities) are visited
    layer by layer. What a format costs in bits and memory is known exactly, and so is the least
    that the decisions to come need, so that `action_masks()` never leads into a dead end. The
    time of a step does not depend on the number of experts.

    ## Action Space

    `Discrete(B)`: an index into the menu, narrowest format first. A masked action is replaced by
    the nearest allowed format below it, or the narrowest allowed one; `info["invalid_action"]`
    says so.

    ## Observation Space

    `observation="flat"`: `Box(-1, 1, (3 * F + C + 8,), float32)`, of the same size for any model.

    | Part       | Size | Min | Max | Meaning                                                  |
    | ---------- | ---- | --- | --- | -------------------------------------------------------- |
    | row        | F    | -1  | 1   | `problem.features` of the decision to take               |
    | to come    | F    | -1  | 1   | mean row of the decisions not taken, this one included   |
    | taken      | F    | -1  | 1   | mean row of the decisions taken                          |
    | context    | C    | -1  | 1   | `problem.context`: limits, hardware prices, workload     |
    | costs      | 4    | 0   | 1   | loss, latency, memory, energy of the decisions taken, by |
    |            |      |     |     | the linear model: x / (1 + x), x relative to the base    |
    | budget     | 1    | 0   | 1   | share of the bit budget that is left                     |
    | affordable | 1    | 0   | 1   | bits left per weight to come / 16                        |
    | mean bits  | 1    | 0   | 1   | stored bits per weight of the decisions taken / 32       |
    | progress   | 1    | 0   | 1   | share of the decisions taken                             |

    Rows are zero where there is nothing to describe. `observation="dict"`: the parts of
    :class:`dmpq.envs.NamedParts`, and `row` and `progress`; its cost grows with the number of
    experts.

    ## Rewards

    `reward="dense"`: the linear surrogate of R that the decision adds, negative. The last step
    adds the difference between the evaluator's R and the sum of the surrogates, so that the
    return is the R of the map (:mod:`dmpq.objective`). `reward="terminal"`: R at the end, zero
    before; the same return. `info["reward_terms"]` adds up to the reward; on the last step
    `info["objective"]` is R. R is -100 where the loss is not finite.

    ## Starting State

    Nothing is decided. Nothing is random: every episode is the same problem.

    ## Episode End

    Termination: when all D decisions are taken. Truncation: never. Latency and energy do not add
    up, so they are not masked: a finished map that exceeds such a limit is projected as in
    `dmpq/ExpertBitsJoint-v0`, and `info["moved"]` counts the decisions that changed.
    `info["is_success"]` says whether the map is within every limit and no worse than the exact
    knapsack's.

    ## Arguments

    | Name          | Default       | Meaning                                                   |
    | ------------- | ------------- | --------------------------------------------------------- |
    | `reward`      | `"dense"`     | or `"terminal"`                                           |
    | `observation` | `"flat"`      | or `"dict"`                                               |
    | `evaluator`   | `"surrogate"` | or `"model"`, which evaluates the reference model         |
    | `render_mode` | `None`        | `"ansi"` or `"rgb_array"`                                 |
    | others        |               | see :func:`dmpq.envs.make_problem`; or `problem=`         |

    ## Version History

    * v0: first release.
    """

    def __init__(self, *, reward: RewardMode = "dense", **options: Unpack[EnvOptions]) -> None:
        super().__init__(**options)
        if reward not in get_args(RewardMode):
            raise unknown("reward", reward, get_args(RewardMode))
        self._dense = reward == "dense"
        problem = self.problem
        self._fixed = _fixed_parts(problem.features, problem.context)
        self._ratios = problem.linear_ratios
        self._signs = -problem.weights.as_array()
        self._sizes, self._capacity = problem.linear_limits
        self._cheapest = problem.sizes.argmin(1)
        least = self._sizes[:, np.arange(len(self._cheapest)), self._cheapest]
        # What the decisions after each one need at least.
        self._reserve = least[:, ::-1].cumsum(1)[:, ::-1] - least
        self._weights_taken = np.append(0, problem.decision_weights.cumsum())
        self._restart()
        self.action_space = spaces.Discrete(len(problem.menu))
        space: spaces.Space[Any] = (
            box(self._fixed.shape[1] + _SCALARS)
            if self._parts is None
            else self._parts.space(row=problem.features.shape[1], progress=1)
        )
        self.observation_space = space

    @property
    def horizon(self) -> int:
        """Steps in an episode: one per decision."""
        return len(self._map)

    @property
    def _allowed(self) -> str:
        return f"a menu index from 0 to {len(self.problem.menu) - 1}"

    def _restart(self) -> None:
        self._used = np.zeros(len(self._capacity), dtype=np.int64)
        self._bits = 0
        self._sums = np.zeros(len(self._signs))

    def _begin(self, options: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        del options  # none are known
        self._restart()
        return self._observe(), {}

    def _step(self, action: NDArray[Any]) -> Step:
        at = self._position
        asked = int(action)
        allowed = np.flatnonzero(self.action_masks())
        below = allowed[allowed <= asked]
        chosen = int(below[-1] if below.size else allowed[0])
        ratios = self._ratios[at, chosen]
        before = self._sums
        self._map[at] = chosen
        self._position += 1
        self._used = self._used + self._sizes[:, at, chosen]
        self._bits += int(self.problem.sizes[at, chosen])
        self._sums = before + ratios
        info: dict[str, Any] = {}
        done = self._position == self.horizon
        terms = self._signs * (ratios if self._dense else np.zeros_like(ratios))
        if done:
            info = self._finish()
            earned = self._signs * before if self._dense else np.zeros_like(before)
            terms = np.array([info["reward_terms"][name] for name in _TERMS]) - earned
        info["reward_terms"] = dict(zip(_TERMS, terms.tolist(), strict=True))
        info["invalid_action"] = chosen != asked
        return self._observe(), float(terms.sum()), done, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which formats leave enough of every exact budget for what is to come, (B,)."""
        at = self._position
        if at == self.horizon:
            return np.ones(len(self.problem.menu), dtype=np.bool_)
        least = self._used + self._reserve[:, at]
        fits: NDArray[np.bool_] = self._sizes[:, at] + least[:, None] <= self._capacity[:, None]
        mask: NDArray[np.bool_] = np.logical_and.reduce(fits, axis=0)
        # The cheapest format always fits, but where group sizes rank differently at the geometry
        # that memory is computed for; the projection of the finished map sees to that.
        mask[self._cheapest[at]] = True
        return mask

    def _finish(self) -> dict[str, Any]:
        """Project and score the finished map."""
        asked = self._map
        self._map = self._nearest(asked)
        _, reward, info = self._evaluate(self._map)
        info["moved"] = int((self._map != asked).sum())
        info["is_success"] = self._is_success(reward, info)
        return info

    def _observe(self) -> Observation:
        at, count = self._position, self.horizon
        costs = [squash(ratio) for ratio in self._sums.tolist()]
        left = max(1 - self._bits / self._bit_capacity, 0.0)
        if self._parts is not None:
            return self._parts.observe(
                self._map,
                np.array([*costs, left], dtype=np.float32),
                row=self._fixed[at, : self.problem.features.shape[1]].copy(),
                progress=np.array([at / count], dtype=np.float32),
            )
        taken = int(self._weights_taken[at])
        to_come = int(self._weights_taken[-1]) - taken
        affordable = left * self._bit_capacity / to_come if to_come else 0.0
        mean_bits = self._bits / taken if taken else 0.0
        observation = np.empty(self._fixed.shape[1] + _SCALARS, dtype=np.float32)
        observation[:-_SCALARS] = self._fixed[at]
        observation[-_SCALARS:] = (
            *costs,
            left,
            min(affordable / FULL_WIDTH, 1.0),
            min(mean_bits / (2 * FULL_WIDTH), 1.0),
            at / count,
        )
        return observation

    def _decided(self, position: int) -> int:
        return position

    def _totals(self) -> tuple[float, ...]:
        return (*self._used.tolist(), self._bits, *self._sums.tolist())

    def _restore(self, totals: tuple[float, ...]) -> Observation:
        limits = len(self._capacity)
        self._used = np.array(totals[:limits], dtype=np.int64)
        self._bits = int(totals[limits])
        self._sums = np.array(totals[limits + 1 :], dtype=np.float64)
        return self._observe()


def _fixed_parts(
    features: NDArray[np.float32], context: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what is observed at each position whatever was decided, (D + 1, 3 * F + C).

    The order of the decisions is fixed, so that the pooled rows can be known in advance and a
    step need not touch them.
    """
    decisions, width = features.shape
    nothing = np.zeros((1, width))
    sums = np.vstack([nothing, features.cumsum(0, dtype=np.float64)])
    taken = np.arange(decisions + 1)[:, None]
    mean_taken = sums / np.maximum(taken, 1)
    mean_to_come = (sums[-1] - sums) / np.maximum(decisions - taken, 1)
    # Rounding of the sums must not leave the box.
    pooled = np.clip(np.hstack([mean_to_come, mean_taken]), -1, 1)
    rows = np.vstack([features, nothing])
    repeated = np.tile(context, (decisions + 1, 1))
    return np.hstack([rows, pooled, repeated]).astype(np.float32)
