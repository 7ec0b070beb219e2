"""``python -m dmpq.agents``: the agents there are, and the options of one of them."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict

from dmpq.agents.registry import facts

_EXAMPLES = """examples:
  python -m dmpq.agents list
  python -m dmpq.agents list --json
  python -m dmpq.agents show ppo
  python -m dmpq.search --agent mopeq-layer
  python -m dmpq.search --agent ppo,samples=8,epochs=5
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 on bad input."""
    from dmpq.console import CommandParser, exit_code

    parser = CommandParser(
        prog="python -m dmpq.agents",
        description="Agents that a search can use, by name.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = subparsers.add_parser("list", help="names, signals, costs and sources")
    listing.add_argument("--json", action="store_true", help="the same, for programs")
    showing = subparsers.add_parser("show", help="the options of an agent")
    showing.add_argument("agent", metavar="NAME", help="agent by name, or module:Class")
    arguments = parser.parse_args(argv)
    if "agent" in arguments:
        return exit_code(lambda: _show(arguments.agent), memory="end other programs")
    if arguments.json:
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


def _show(name: str) -> int:
    """Print an agent's options; returns the exit code."""
    import inspect

    from dmpq.agents.options import options_of
    from dmpq.agents.registry import find
    from dmpq.console import plain_console

    kind, console = find(name), plain_console()
    summary = inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]
    console.print(f"{name}: {summary}" if summary else name)
    options = options_of(kind).values()
    if not options:
        console.print("It has no options.")
    for one in options:
        given = "must be given" if one.default is None else f"default: {one.default or 'empty'}"
        console.print(f"\n  {one.name}  ({one.kind}; {given})", soft_wrap=True)
        for line in textwrap.wrap(one.text, 74):
            console.print(f"    {line}")
    if options:
        first = next(iter(options))
        value = first.default or "VALUE"
        console.print(f"\nFor example: --agent {name},{first.name}={value}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
