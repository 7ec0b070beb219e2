"""Agents by name, or by ``module:Class`` for a user's own, and what is known of each."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from importlib.abc import InspectLoader
from typing import Any, Final

from dmpq.agents.base import Agent
from dmpq.errors import InputError, did_you_mean, unknown

# Strings, so that listing agents imports none of them: some need torch.
_AGENTS: Final = {
    "uniform": "dmpq.agents.uniform:UniformAgent",
    "uniform-fractional": "dmpq.agents.uniform_fractional:UniformFractionalAgent",
    "random": "dmpq.agents.random_search:RandomAgent",
    "frequency": "dmpq.agents.frequency:FrequencyAgent",
    "frequency-layer": "dmpq.agents.usage:LayerFrequencyAgent",
    "inverse-frequency": "dmpq.agents.usage:InverseFrequencyAgent",
    "routing-weight": "dmpq.agents.usage:RoutingWeightAgent",
    "first-layers": "dmpq.agents.structure:FirstLayersAgent",
    "last-layers": "dmpq.agents.structure:LastLayersAgent",
    "first-last-layers": "dmpq.agents.structure:FirstLastLayersAgent",
    "frequency-first-layers": "dmpq.agents.structure:FrequencyFirstLayersAgent",
    "weight-norm": "dmpq.agents.weight_statistics:WeightNormAgent",
    "outlier-ratio": "dmpq.agents.weight_statistics:OutlierRatioAgent",
    "kurtosis": "dmpq.agents.weight_statistics:KurtosisAgent",
    "super-expert": "dmpq.agents.super_expert:SuperExpertAgent",
    "mopeq-layer": "dmpq.agents.mopeq:MopeqLayerAgent",
    "mopeq-model": "dmpq.agents.mopeq:MopeqModelAgent",
    "router-norm": "dmpq.agents.router_norm:RouterNormAgent",
    "router-norm-change": "dmpq.agents.router_norm:RouterNormChangeAgent",
    "router-norm-pruning": "dmpq.agents.router_norm:RouterNormPruningAgent",
    "moqa": "dmpq.agents.moqa:MoqaAgent",
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
    "recurrent-ppo": "dmpq.agents.recurrent_ppo:RecurrentPPOAgent",
    "a2c": "dmpq.agents.a2c:A2CAgent",
    "dqn": "dmpq.agents.dqn:DQNAgent",
    "evopress": "dmpq.agents.evopress:EvoPressAgent",
    "nsga2": "dmpq.agents.nsga2:NSGA2Agent",
    "bandit": "dmpq.agents.bandit:BanditAgent",
    "greedy-true": "dmpq.agents.greedy_true:GreedyTrueAgent",
    "clado": "dmpq.agents.clado:CladoAgent",
}


@dataclass(frozen=True)
class Facts:
    """What an agent's class says of itself, in class attributes of these names.

    None of them is needed: an agent of a user's own may do without.

    Attributes:
        name: What it is called.
        signal: What it goes by; without, the first line of its docstring.
        cost: Evaluations that it takes, ``"all"`` for as many as the search allows; or empty.
        source: The paper it follows; or empty.
    """

    name: str
    signal: str
    cost: str
    source: str


def names() -> list[str]:
    """Return the agents that come with dmpq."""
    return list(_AGENTS)


def facts() -> list[Facts]:
    """Return what the agents that come with dmpq say of themselves, in order.

    Read from their source, which imports none of them.
    """
    return [_facts(name, place) for name, place in _AGENTS.items()]


def _facts(name: str, place: str) -> Facts:
    module_name, _, class_name = place.partition(":")
    spec = importlib.util.find_spec(module_name)
    loader = None if spec is None else spec.loader
    source = loader.get_source(module_name) if isinstance(loader, InspectLoader) else None
    classes = [node for node in ast.parse(source or "").body if isinstance(node, ast.ClassDef)]
    kind = next((one for one in classes if one.name == class_name), None)
    if kind is None:
        return Facts(name, "", "", "")
    said = _strings(kind)
    summary = (ast.get_docstring(kind) or "").partition("\n")[0].replace("`", "")
    return Facts(name, said.get("signal", summary), said.get("cost", ""), said.get("source", ""))


def _strings(kind: ast.ClassDef) -> dict[str, str]:
    """Return the strings that a class sets as its attributes, by name."""
    return {
        node.target.id: node.value.value
        for node in kind.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def find(name: str) -> type[Any]:
    """Return an agent's class.

    Args:
        name: One of :func:`names`, or ``"module:Class"``.

    Raises:
        InputError: If there is none.
    """
    if ":" not in name and name not in _AGENTS:
        raise InputError(
            f"Unknown agent {name[:60]!r}{did_you_mean(name, _AGENTS)}; choose one that python -m "
            "dmpq.agents list shows, or give module:Class for your own."
        )
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
    return kind


def make(name: str, **options: Any) -> Agent:
    """Return an agent.

    Args:
        name: One of :func:`names`, or ``"module:Class"``.
        options: Passed on to the agent's class.

    Raises:
        InputError: If there is no such agent, or what was found is none.
    """
    kind = find(name)
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
