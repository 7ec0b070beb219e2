"""Agents: everything that searches for a bit map, behind one interface.

Importing this package imports no learning library; an agent's module is imported when it is made.
"""

from dmpq.agents.base import Agent, Candidate, OutOfEvaluations, Recorder, SearchResult
from dmpq.agents.registry import Facts, facts, find, make, names

__all__ = [
    "Agent",
    "Candidate",
    "Facts",
    "OutOfEvaluations",
    "Recorder",
    "SearchResult",
    "facts",
    "find",
    "make",
    "names",
]
