"""``python -m dmpq.hardware``: which devices there are, and where their figures come from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Final

from dmpq.console import CommandParser, exit_code, plain_console
from dmpq.hardware import explain, fit, measure, tables

AddParser = Callable[[Any], None]

_COMMANDS: Final[tuple[AddParser, ...]] = (
    tables.add_list_parser,
    tables.add_show_parser,
    explain.add_parser,
    fit.add_parser,
    measure.add_parser,
)
"""Each adds a subcommand: ``subparsers.add_parser(...)``, with ``set_defaults(run=f)``, where
``f(arguments, console)`` returns the exit code."""

_EXAMPLES: Final = """examples:
  python -m dmpq.hardware list
  python -m dmpq.hardware show a100/sglang
  python -m dmpq.hardware show my-device.json --json
  python -m dmpq.hardware explain bitmap.json --hw a100 h100
  python -m dmpq.hardware fit points.csv --device a100/sglang
  python -m dmpq.hardware measure --out this-machine.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 on bad input."""
    parser = CommandParser(
        prog="python -m dmpq.hardware",
        description="Devices that costs can be computed for, and where their figures come from.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    console = plain_console(stderr=getattr(arguments, "json", False))
    return exit_code(lambda: int(arguments.run(arguments, console)), memory="take a smaller model")


if __name__ == "__main__":
    sys.exit(main())
