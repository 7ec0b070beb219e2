"""Measure the qualitative patterns of the literature on three small trained MoE models.

    python benchmarks/patterns.py            # measures, writes the figures and the page
    python benchmarks/patterns.py --check    # measures, and says what would change
    python benchmarks/patterns.py --read     # writes the page from the figures that are there

What is claimed, and what counts as reproduced, is in ``pattern_claims.py``; how it is measured in
``pattern_measures.py``. The figures are ``benchmarks/results/patterns.json``, the page is
``docs/patterns.md``. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch
from pattern_cases import Figures, Rows
from pattern_claims import CLAIMS
from pattern_measures import Settings, described, measure
from pattern_tables import page

from dmpq.console import quiet_libraries
from dmpq.embedded import differs_from_card
from dmpq.files import replace_atomically

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results" / "patterns.json"
PAGE: Final = ROOT / "docs" / "patterns.md"
RELATIVE: Final = 0.02
ABSOLUTE: Final = 1e-4
"""Numbers that differ by less than both together are the same: another CPU rounds otherwise."""
_SHOWN: Final = 20


def main(argv: list[str] | None = None) -> int:
    """Measure and write; with ``--check`` 1 where a number or a verdict has changed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="write nothing")
    only.add_argument("--read", action="store_true", help="measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.read:
        known = json.loads(RESULTS.read_text("utf-8"))
        replace_atomically(PAGE, page(known["settings"], known["figures"]).encode())
        return 0
    torch.set_num_threads(1)
    quiet_libraries()
    settings, started = Settings(), time.monotonic()

    def say(what: str) -> None:
        clock = time.monotonic() - started
        print(f"{clock:6.0f} s, {time.process_time():5.0f} of the CPU  {what}", flush=True)

    figures: Figures = {}
    for figures in measure(settings, say):
        if not arguments.check:
            _write(described(settings), figures)
    if arguments.check:
        return _check(described(settings), figures)
    print(f"wrote {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


def _write(settings: dict[str, Any], figures: Figures) -> None:
    content = {"settings": settings, "figures": figures}
    RESULTS.parent.mkdir(exist_ok=True)
    replace_atomically(RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    replace_atomically(PAGE, page(settings, figures).encode())


def _check(settings: dict[str, Any], figures: Figures) -> int:
    known = json.loads(RESULTS.read_text("utf-8"))
    found = list(changes(known, {"settings": settings, "figures": figures}))
    differing, of = differs_from_card()
    if found and differing:
        print(f"note: {differing} of {of} held-out modules are of another Python's library")
    print("\n".join(found[:_SHOWN]) or "no change")
    if len(found) > _SHOWN:
        print(f"and {len(found) - _SHOWN} more")
    return int(bool(found))


def changes(known: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """Return what differs between two files' contents, one line each: verdicts, then numbers."""
    if known["settings"] != found["settings"]:
        yield "the settings have changed: figures cannot be compared"
        return
    for claim in CLAIMS:
        before, after = (claim.verdict(f["figures"]) for f in (known, found))
        if before != after:
            yield f"{claim.key}: {_verdict(*before)} before, {_verdict(*after)} now"
    for table in sorted({*known["figures"], *found["figures"]}):
        pair: list[Rows] = [f["figures"].get(table, []) for f in (known, found)]
        if len(pair[0]) != len(pair[1]):
            yield f"{table}: {len(pair[0])} rows before, {len(pair[1])} now"
            continue
        for number, (old, new) in enumerate(zip(*pair, strict=True)):
            for name in sorted({*old, *new}):
                if not _same(old.get(name), new.get(name)):
                    yield f"{table} {number} {name}: {old.get(name)} before, {new.get(name)} now"


def _verdict(verdict: str, right: int, cases: int) -> str:
    return f"{verdict} ({right} of {cases})"


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(map(_same, old, new))
    if isinstance(old, int | float) and isinstance(new, int | float):
        return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(old == new)


if __name__ == "__main__":
    sys.exit(main())
