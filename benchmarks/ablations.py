"""The proposal's ablations, one command each: tables of at most 80 columns, verdicts, a picture.

    python benchmarks/ablations.py rl          # reinforcement learning against heuristics
    python benchmarks/ablations.py hardware    # analytical against measured hardware
    python benchmarks/ablations.py weights     # the reward's weights against the Pareto front
    python benchmarks/ablations.py static      # a found map against static widths, and others
    python benchmarks/ablations.py targets     # the proposal's three targets
    python benchmarks/ablations.py all         # all of them, and docs/ablations.md

Each reads what is kept in ``benchmarks/results`` and writes its Markdown and its picture into
``benchmarks/results/ablations``. ``--run`` measures anew first: ``weights`` in about 4 minutes on
a core, ``static`` in 12, ``targets`` in 4. ``rl`` and ``hardware`` are read from other benchmarks,
which take hours or other machines, and say which. QAT against PTQ is ``benchmarks/qat.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import ablation_hardware
import ablation_rl
import ablation_static
import ablation_targets
import ablation_weights
from ablation_pages import FOLDER, KEPT, Ablation

from dmpq.console import quiet_libraries
from dmpq.errors import InputError
from dmpq.files import replace_atomically

PARTS: Final[dict[str, ModuleType]] = {
    module.NAME: module
    for module in (
        ablation_rl,
        ablation_hardware,
        ablation_weights,
        ablation_static,
        ablation_targets,
    )
}
MEASURED: Final[dict[str, Callable[..., None]]] = {
    ablation_weights.NAME: ablation_weights.measure,
    ablation_static.NAME: ablation_static.measure,
    ablation_targets.NAME: ablation_targets.measure,
}
"""Those that ``--run`` measures."""
PAGE: Final = Path(__file__).parents[1] / "docs" / "ablations.md"
ALL: Final = "all"

_HEAD: Final = """\
# The proposal's ablations

Made by `python benchmarks/ablations.py all`; do not edit. Each section is what one command prints
from figures kept in [`benchmarks/results`](../benchmarks/results), its verdicts first. Models are
small: the bundled one has 1.57 M expert weights, so what is said here of accuracy holds for it,
and need not for a large one. QAT against PTQ is `benchmarks/qat.py`.

"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=(*PARTS, ALL), help="which ablation")
    parser.add_argument("--run", action="store_true", help="measure anew first")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of --run")
    parser.add_argument(
        "--results", type=Path, default=KEPT, help="folder of kept figures (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the written files (default: {FOLDER} in --results)"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the page that all writes (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        _asked(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _asked(arguments: argparse.Namespace) -> None:
    names = list(PARTS) if arguments.name == ALL else [arguments.name]
    results: Path = arguments.results
    if arguments.run:
        for name in names:
            if name in MEASURED:
                MEASURED[name](results, threads=arguments.threads, tell=print)
            elif arguments.name != ALL:
                raise InputError(
                    f"{name} measures nothing itself; run {PARTS[name].MADE_BY}, then this "
                    "without --run."
                )
    out = results / FOLDER if arguments.out is None else arguments.out
    found: list[Ablation] = []
    for name in names:
        one: Ablation = PARTS[name].ablation(results)
        one.write(out)
        found.append(one)
        print(one.plain(), end="\n\n")
    print(f"wrote {', '.join(f'{name}.md {name}.png' for name in names)} in {out}")
    if arguments.name == ALL:
        replace_atomically(arguments.page, page(found).encode())
        print(f"wrote {arguments.page}")


def page(found: list[Ablation]) -> str:
    """Return the page that shows all of them.

    Args:
        found: The ablations, in order.
    """
    pictures = "../benchmarks/results/ablations/"
    return _HEAD + "\n".join(one.markdown(pictures) for one in found)


if __name__ == "__main__":
    sys.exit(main())
