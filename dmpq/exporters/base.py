"""What every exporter is: a name that --to takes, and a function from a plan to a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dmpq.exporters.plan import Plan


@dataclass(frozen=True)
class Exporter:
    """One tool's configuration.

    Attributes:
        name: What ``--to`` calls it; the engine of that name has the rules of what it can hold.
        about: What is written and where it goes, in one sentence without full stop.
        configuration: The document: JSON values, or text for a shell.
    """

    name: str
    about: str
    configuration: Callable[[Plan], Any]

    def text(self, plan: Plan) -> str:
        """Return the document as it is written to a file, ending in a newline."""
        document = self.configuration(plan)
        return document if isinstance(document, str) else json.dumps(document, indent=2) + "\n"


def number_pattern(experts: Sequence[int]) -> str:
    """Return a regular expression for exactly these numbers, as ``(1|10)``."""
    return f"({'|'.join(map(str, experts))})"
