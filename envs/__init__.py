"""Gymnasium environments in which an agent gives every expert a bit-width."""

from typing import Final

import gymnasium as gym

from dmpq.envs.adjust import ExpertBitsAdjustEnv
from dmpq.envs.base import FAILURE_REWARD, EnvState
from dmpq.envs.generator import make_problem
from dmpq.envs.importance import ExpertBitsImportanceEnv
from dmpq.envs.joint import ExpertBitsJointEnv
from dmpq.envs.observation import NamedParts, rows
from dmpq.envs.sequential import ExpertBitsEnv

__all__ = [
    "ENVIRONMENTS",
    "FAILURE_REWARD",
    "EnvState",
    "ExpertBitsAdjustEnv",
    "ExpertBitsEnv",
    "ExpertBitsImportanceEnv",
    "ExpertBitsJointEnv",
    "NamedParts",
    "make_problem",
    "register",
    "rows",
]

ENVIRONMENTS: Final = {
    "dmpq/ExpertBits-v0": "dmpq.envs:ExpertBitsEnv",  # one decision per step
    "dmpq/ExpertBitsImportance-v0": "dmpq.envs:ExpertBitsImportanceEnv",  # log-importances
    "dmpq/ExpertBitsAdjust-v0": "dmpq.envs:ExpertBitsAdjustEnv",  # one move per step
    "dmpq/ExpertBitsJoint-v0": "dmpq.envs:ExpertBitsJointEnv",  # the whole vector
}
"""Ids and entry points of the registered environments."""


def register() -> None:
    """Register the environments with Gymnasium, as ``import dmpq`` does.

    Calling it again changes nothing.
    """
    for name, entry_point in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(name, entry_point=entry_point)
