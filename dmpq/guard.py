"""The border to an agent's code, which may be a user's: its name, its errors, its result."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dmpq.errors import InputError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from dmpq.agents import Agent, SearchResult
    from dmpq.agents.base import OnCandidate
    from dmpq.problem import Problem

BASELINES: Final = ("frequency", "mckp")
UNIFORM: Final = {"bf16": "16", "uniform8": "8", "uniform4": "4", "uniform3": "3"}
_STARTS: Final = "ppo"
"""The agent that may begin with a policy."""
_RESERVED: Final = frozenset({*UNIFORM, *BASELINES})


def make_agent(text: str, *, policy: str | None = None) -> Agent:
    """Return an agent that a table can show beside the others.

    Args:
        text: One of dmpq's, or ``module:Class``; with options, ``NAME,option=value,...``.
        policy: Folder of a policy that it goes on from; ``None`` for none.

    Raises:
        InputError: If there is no such agent, or it cannot be made, or takes another's name; or if
            it has no such option, or an option no such value; or if there is no such policy, or
            the agent takes none.
    """
    from dmpq import agents
    from dmpq.agents.options import read_options, split
    from dmpq.agents.policy import Policy

    name, given = split(text)
    if policy is not None and name != _STARTS:
        raise InputError(f"--policy is where {_STARTS} goes on from; {name[:60]!r} takes none.")
    start = {} if policy is None else {"start": Policy.load(policy)}
    try:
        options = read_options(agents.find(name), name, given) if given else {}
        agent = agents.make(name, **options, **start)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise InputError(f"The agent {name!r} cannot be made ({_shown(error)}).") from error
    shown: object = agent.name
    if not isinstance(shown, str) or not shown.strip() or not shown.isprintable():
        raise InputError(f"The agent {name!r} has the name {shown!r}; give it printable text.")
    if ":" in name and shown in _RESERVED:
        raise InputError(
            f"The agent {name!r} calls itself {shown!r}, a name that the table gives to another "
            "row; give it a name of its own."
        )
    return agent


def label_of(agent: Agent, text: str) -> str:
    """Return what a table calls an agent: its name, with the options it was given.

    Args:
        agent: As :func:`make_agent` made it.
        text: What it was made of.
    """
    from dmpq.agents.options import label, read_options, split

    name, given = split(text)
    return label(agent.name, read_options(type(agent), name, given))


def run_agent(
    agent: Agent,
    name: str,
    problem: Problem,
    *,
    evaluations: int,
    seed: int,
    on_candidate: OnCandidate,
    trace: Path,
) -> SearchResult:
    """Let an agent search, and check what it returns.

    Args:
        agent: The agent.
        name: What the user calls it.
        problem: What to search.
        evaluations: Number of distinct maps that may be evaluated.
        seed: The agent's.
        on_candidate: Called with every map evaluated.
        trace: Where the traceback goes if the agent raises.

    Raises:
        InputError: If the agent raises, or returns what no agent may.
    """
    try:
        result = agent.search(
            problem, evaluations=evaluations, seed=seed, on_candidate=on_candidate
        )
    except (InputError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        if is_out_of_memory(error):
            raise
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        raise InputError(
            f"The agent {name!r} failed ({_shown(error)}); its traceback is in {trace}."
        ) from error
    return _checked(result, name, problem)


def _checked(result: object, name: str, problem: Problem) -> SearchResult:
    """Return what an agent has returned, and refuse what an agent may not return.

    Raises:
        InputError: With what was wrong.
    """
    from dmpq.agents import SearchResult
    from dmpq.agents.policy import Policy

    wrong = None
    if not isinstance(result, SearchResult):
        raise InputError(
            f"The agent {name!r} returned a {type(result).__name__}; it must be a SearchResult, "
            "as Recorder.result() gives."
        )
    policy: object = result.policy
    if not _is_map(result.assignment, problem):
        wrong = (
            f"no map; it must be {problem.num_decisions} integers from 0 to "
            f"{len(problem.menu) - 1}"
        )
    elif not problem.feasible(result.assignment[None])[0]:
        wrong = "a map outside the limits; let it propose maps by problem.propose()"
    elif not result.history:
        wrong = "no history; let it evaluate at least one map, by a Recorder"
    elif not isinstance(policy, Policy | None):
        wrong = f"a {type(policy).__name__} as policy; it must be a dmpq Policy or None"
    if wrong is not None:
        raise InputError(f"The agent {name!r} returned {wrong}.")
    return result


def _is_map(assignment: object, problem: Problem) -> bool:
    return (
        isinstance(assignment, np.ndarray)
        and np.issubdtype(assignment.dtype, np.integer)
        and assignment.shape == (problem.num_decisions,)
        and bool(((assignment >= 0) & (assignment < len(problem.menu))).all())
    )


def _shown(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    text, kind = first_line(error), type(error).__name__
    return kind if text == kind else f"{kind}: {text}"
