"""``python -m dmpq.agents list``: the agents there are, what they go by, cost and source."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from dmpq.agents.registry import facts

_EXAMPLES = """examples:
  python -m dmpq.agents list
  python -m dmpq.agents list --json
  python -m dmpq.search --agent mopeq-layer
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 on bad input."""
    from dmpq.console import CommandParser

    parser = CommandParser(
        prog="python -m dmpq.agents",
        description="Agents that a search can use, by name.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = subparsers.add_parser("list", help="names, signals, costs and sources")
    listing.add_argument("--json", action="store_true", help="the same, for programs")
    if parser.parse_args(argv).json:
        sys.stdout.write(json.dumps([asdict(one) for one in facts()], indent=2) + "\n")
    else:
        _print_table()
    return 0


def _print_table() -> None:
    from rich import box
    from rich.table import Table

    from dmpq.console import plain_console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("agent", no_wrap=True)
    table.add_column("signal", ratio=1)
    table.add_column("evals", no_wrap=True)
    table.add_column("source", ratio=1)
    for one in facts():
        table.add_row(one.name, one.signal or "-", one.cost or "-", one.source or "-")
    console = plain_console()
    console.print(table)
    console.print("evals: maps that are measured; all: as many as --evaluations allows.")
    console.print("Any other agent is given as module:Class; see dmpq.agents.Agent.")


if __name__ == "__main__":
    sys.exit(main())
