"""``dmpq/ExpertBitsImportance-v0``: one log-importance per expert, projected by the knapsack."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dmpq.envs.base import EnvOptions
from dmpq.envs.one_step import OneStepEnv
from dmpq.errors import InputError


class ExpertBitsImportanceEnv(OneStepEnv[NDArray[np.float32]]):
    """Scale every expert's sensitivity, and let the exact knapsack spend the budget.

    ## Description

    One number per decision scales that decision's row of measured sensitivities; the exact
    multiple-choice knapsack then finds the best map under every limit. Every action is feasible,
    and the zero action *is* the knapsack's solution on the measured sensitivities: what an agent
    can add are the interactions that the sensitivities do not know.

    ## Action Space

    `Box(-1, 1, (D,), float32)`. Action `a` stands for the log-importance `log_scale * a`; a
    decision's sensitivity is multiplied by `exp(log_scale * a)`. Finite values outside are
    clipped: a Gaussian policy draws them, and not every learner clips them itself.

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

    Termination: after one step. Truncation: never. `info["is_success"]` says whether the map is
    within every limit and no worse than the knapsack's own.

    ## Arguments

    | Name          | Default       | Meaning                                                   |
    | ------------- | ------------- | --------------------------------------------------------- |
    | `log_scale`   | `3.0`         | log-importance of an action of 1                          |
    | `observation` | `"flat"`      | or `"dict"`                                               |
    | `evaluator`   | `"surrogate"` | or `"model"`, which evaluates the reference model         |
    | `render_mode` | `None`        | `"ansi"` or `"rgb_array"`                                 |
    | others        |               | see :func:`dmpq.envs.make_problem`; or `problem=`         |

    ## Version History

    * v0: first release.
    """

    def __init__(self, *, log_scale: float = 3.0, **options: Unpack[EnvOptions]) -> None:
        super().__init__(**options)
        if not 0 < log_scale < np.inf:
            raise InputError(f"log_scale is {log_scale}; it must be positive, for example 3.")
        self.log_scale = log_scale
        self.action_space = spaces.Box(-1.0, 1.0, (self.problem.num_decisions,), np.float32)

    @property
    def _allowed(self) -> str:
        return (
            f"{self.problem.num_decisions} finite numbers, one per decision, which count as -1 or "
            "1 where they lie beyond"
        )

    def _decide(self, action: NDArray[Any]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        values = np.clip(action.astype(np.float64), -1, 1)
        return self.problem.propose(self.log_scale * values), {}
