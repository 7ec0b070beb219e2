"""``dmpq/ExpertBitsJoint-v0``: the whole vector of widths at once, projected onto the limits."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.envs.base import EnvOptions
from dmpq.envs.one_step import OneStepEnv


class ExpertBitsJointEnv(OneStepEnv[NDArray[np.int64]]):
    """Ask for a width for every expert; what does not fit is moved as little as possible.

    ## Description

    The raw problem: a vector of menu indices. A vector within every limit is taken as it is.
    Any other is projected: the exact knapsack finds, among the maps within the limits, the one
    that moves the fewest stored bits, summed over decisions (exactly so for limits on bits and
    memory; time and energy do not add up, and are met by prices). What counts, and what
    `info["assignment"]` reports, is the projected map.

    ## Action Space

    `MultiDiscrete([B] * D)`: an index into the menu per decision, narrowest format first.

    ## Observation Space

    `observation="flat"`: `Box(-1, 1, (D * F + C,), float32)`, the same in every step.

    | Part    | Size  | Min | Max | Meaning                                                    |
    | ------- | ----- | --- | --- | ---------------------------------------------------------- |
    | rows    | D * F | -1  | 1   | `problem.features`, decision by decision                   |
    | context | C     | -1  | 1   | `problem.context`: limits, hardware prices, workload       |

    :func:`dmpq.envs.rows` gives the (D, F) view. `observation="dict"`: the parts of
    :class:`dmpq.envs.NamedParts`.

    ## Rewards

    `R = w_acc * dAcc - w_lat * L/L0 - w_mem * M/M0 - w_eng * E/E0` of the projected map
    (:mod:`dmpq.objective`), with the terms in `info["reward_terms"]`. R is -100 where the
    loss is not finite.

    ## Starting State

    Nothing is decided. Nothing is random: every episode is the same problem.

    ## Episode End

    Termination: after one step. Truncation: never. `info["moved"]` counts the decisions that the
    projection changed; `info["is_success"]` says whether the map is within every limit and no
    worse than the exact knapsack's.

    ## Arguments

    | Name          | Default       | Meaning                                                   |
    | ------------- | ------------- | --------------------------------------------------------- |
    | `observation` | `"flat"`      | or `"dict"`                                               |
    | `evaluator`   | `"surrogate"` | or `"model"`, which evaluates the reference model         |
    | `render_mode` | `None`        | `"ansi"` or `"rgb_array"`                                 |
    | others        |               | see :func:`dmpq.envs.make_problem`; or `problem=`         |

    ## Version History

    * v0: first release.
    """

    def __init__(self, **options: Unpack[EnvOptions]) -> None:
        super().__init__(**options)
        problem = self.problem
        self.action_space = spaces.MultiDiscrete([len(problem.menu)] * problem.num_decisions)

    @property
    def _allowed(self) -> str:
        problem = self.problem
        return f"{problem.num_decisions} menu indices, each from 0 to {len(problem.menu) - 1}"

    def _decide(self, action: NDArray[Any]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        wanted = action.astype(np.int64)
        nearest = self._nearest(wanted)
        return nearest, {"moved": int((nearest != wanted).sum())}
