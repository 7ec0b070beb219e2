"""Numbers of a configuration that make sense, and those that do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.objective import LIMIT_FLAGS, refuse_limit
from dmpq.threads import use_threads

_LEAST_AND_MOST: Final[Mapping[str, tuple[int, int]]] = {
    "evaluations": (1, 10**9),
    "seed": (0, 2**32 - 1),
    "batch": (1, 10**9),
    "context": (1, 10**9),
    "profile_tokens": (1, 10**12),
    "search_tokens": (1, 10**12),
    "selection_tokens": (1, 10**12),
    "further_tokens": (0, 10**12),
    "heldout_tokens": (1, 10**12),
    "sequence_length": (2, 10**9),
    "threads": (1, 1024),
    "measure_every": (1, 10**9),
}
"""Whole numbers of the configuration; numpy and the RL libraries take seeds of 32 bits."""


def prepare(config: SearchConfig) -> None:
    """Refuse numbers of no sense, and use as many threads as a configuration asks for.

    Raises:
        InputError: With the flag, the value and what is allowed.
    """
    check_numbers(config)
    use_threads(config.threads)


def check_numbers(config: SearchConfig) -> None:
    """Refuse numbers of no sense.

    Raises:
        InputError: With the flag, the value and what is allowed.
    """
    for name, (least, most) in _LEAST_AND_MOST.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value} makes no sense; give {least} to {most:,}.")
    if config.evaluations <= config.kept_evaluations:
        raise InputError(
            f"--evaluations {config.evaluations} leaves none for the agent; with --measure-every "
            "and a limit on latency or energy one is kept for a map within the corrected costs: "
            "give 2 or more."
        )
    for flag in LIMIT_FLAGS:
        limit = getattr(config, flag.removeprefix("--").replace("-", "_"))
        if limit is not None:
            refuse_limit(flag, limit)
    if not 0 <= config.bank_memory_gb < math.inf:
        raise InputError(
            f"--bank-memory-gb {config.bank_memory_gb} is no amount of memory; give 0 or more."
        )
