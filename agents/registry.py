"""Agents by name, or by ``module:Class`` for a user's own."""

from __future__ import annotations

import importlib
from typing import Any, Final

from dmpq.agents.base import Agent
from dmpq.errors import InputError, unknown

# Strings, so that listing agents imports none of them: two need torch.
_AGENTS: Final = {
    "uniform": "dmpq.agents.uniform:UniformAgent",
    "random": "dmpq.agents.random_search:RandomAgent",
    "frequency": "dmpq.agents.frequency:FrequencyAgent",
    "greedy": "dmpq.agents.greedy:GreedyAgent",
    "mckp": "dmpq.agents.mckp:MckpAgent",
    "pmq-paper": "dmpq.agents.pmq:PmqPaperAgent",
    "pmq-code": "dmpq.agents.pmq:PmqCodeAgent",
    "gemq": "dmpq.agents.gemq:GemqAgent",
    "mxmoe": "dmpq.agents.mxmoe:MxMoEAgent",
    "error-layer": "dmpq.agents.output_error:ErrorLayerAgent",
    "error-model": "dmpq.agents.output_error:ErrorModelAgent",
    "hessian-layer": "dmpq.agents.hessian:HessianLayerAgent",
    "hessian-model": "dmpq.agents.hessian:HessianModelAgent",
    "fisher": "dmpq.agents.fisher:FisherAgent",
    "ppo": "dmpq.agents.ppo:PPOAgent",
    "maskable-ppo": "dmpq.agents.maskable_ppo:MaskablePPOAgent",
}


def names() -> list[str]:
    """Return the agents that come with dmpq."""
    return list(_AGENTS)


def make(name: str, **options: Any) -> Agent:
    """Return an agent.

    Args:
        name: One of :func:`names`, or ``"module:Class"``.
        options: Passed on to the agent's class.

    Raises:
        InputError: If there is no such agent, or what was found is none.
    """
    if ":" not in name and name not in _AGENTS:
        raise unknown("agent", name, _AGENTS, "Or give module:Class for your own.")
    module_name, _, class_name = _AGENTS.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise InputError(
            f"The agent {name!r} cannot be imported ({error}); write module:Class, with the "
            "module on the Python path."
        ) from error
    kind = vars(module).get(class_name)
    if not isinstance(kind, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise unknown(f"class in the module {module_name!r}:", class_name, classes)
    try:
        agent = kind(**options)
    except TypeError as error:
        raise InputError(f"The agent {name!r} cannot be made ({error}).") from error
    if not isinstance(agent, Agent):
        raise InputError(
            f"{name!r} is no agent: it needs a name and a method search(problem, *, evaluations, "
            "seed, on_candidate); see dmpq.agents.Agent."
        )
    return agent
