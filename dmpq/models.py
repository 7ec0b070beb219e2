"""``python -m dmpq.models``: which MoE families are supported, and how one keeps its experts."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.console import CommandParser, exit_code, plain_console, quiet_libraries
from dmpq.errors import InputError, first_line, unknown
from dmpq.installed import families

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.experts import Experts

_EXAMPLES: Final = """examples:
  python -m dmpq.models list
  python -m dmpq.models show mixtral
  python -m dmpq.models show path/to/checkpoint
"""
_NUMBER: Final = re.compile(r"\.(\d+)\.")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 on bad input."""
    parser = CommandParser(
        prog="python -m dmpq.models",
        description="The MoE families of the installed transformers, and how each is supported. "
        "All but the refused ones can be searched, and packed by python -m dmpq.apply; so can "
        "dense models that sparse upcycling gave experts (dmpq_upcycled), shown by their folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="every family with experts, and its support")
    listing.add_argument("--json", action="store_true", help="print JSON, one object a family")
    listing.set_defaults(run=_list)
    showing = commands.add_parser("show", help="the experts of one family or checkpoint")
    showing.add_argument("model", help="a family, a model type, or the folder of a checkpoint")
    showing.set_defaults(run=_show)
    arguments = parser.parse_args(argv)
    console = plain_console()
    return exit_code(lambda: int(arguments.run(arguments, console)), memory="take a smaller model")


def _list(arguments: Any, console: Console) -> int:
    from importlib.metadata import version

    from rich.table import Table

    found = families()
    if arguments.json:
        rows = [asdict(f) | {"support": f.support, "description": f.description} for f in found]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    table = Table("family", "support", "how its experts are kept, or why not", box=None)
    for family in found:
        table.add_row(family.name, family.support, family.description)
    console.print(table)
    kinds = ("interface", "own adapter", "refused")
    counts = ", ".join(f"{sum(f.support == kind for f in found)} {kind}" for kind in kinds)
    console.print(f"transformers {version('transformers')}: {len(found)} families ({counts})")
    return 0


def _show(arguments: Any, console: Console) -> int:
    quiet_libraries()
    import torch

    from dmpq.families import auto_class, find_containers, no_experts, refusal

    name = arguments.model
    config, weights = _config(name)
    refused = refusal(config.model_type, name)
    if refused is not None:
        raise refused
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except Exception as error:  # many a config's own defaults fit no model
        raise InputError(
            f"No model can be built from the {'config' if weights else 'default config'} of "
            f"{name} ({first_line(error)}); give the folder of a checkpoint."
        ) from error
    containers = find_containers(model)
    if not containers:
        raise no_experts(model, name)
    console.print(f"family       {config.model_type} ({type(model).__name__})")
    console.print(f"sizes of     {'the checkpoint' if weights else 'the default config'}")
    for pattern, alike in _alike(containers).items():
        first = alike[0]
        console.print(f"\ncontainers   {len(alike)} x {pattern}")
        console.print(f"layers       {_ranges(alike)}")
        sides = ("gate+up" if first.module.has_gate else "up", first.gate_up), ("down", first.down)
        for side, weight in sides:
            console.print(f"{side:<12} {_shape(weight)} (experts, out, in)")
        router = "told by no single matrix" if first.router is None else _shape(first.router)
        console.print(f"router       {router}")
        for (side, _), source in zip(sides, first.sources[0], strict=True):
            rows = " + ".join(parameter for parameter, _, _ in source.rows)
            console.print(f"expert 0     {side} in {rows}")
        for line in _disk_names(config.model_type, first.path):
            console.print(f"on disk      {line}")
    kind = auto_class(config).__name__
    packed = f"by python -m dmpq.apply; {kind} loads it after import dmpq.hf"
    console.print(f"\npacked       {packed}", soft_wrap=True)
    return 0


def _config(name: str) -> tuple[Any, bool]:
    """Return the config of a folder or of a model type, and whether it is a folder's."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING,
        model_type_to_module_name,
    )

    if Path(name).is_dir():
        try:
            # Not left out: transformers would ask whether to run the folder's code.
            options = {"local_files_only": True, "trust_remote_code": False}
            return AutoConfig.from_pretrained(name, **options), True
        except (OSError, ValueError) as error:
            raise InputError(
                f"The folder {name} holds no config that can be read ({first_line(error)}); "
                "give the folder of a checkpoint."
            ) from error
    known = {family.name for family in families()}
    kinds = [k for k in CONFIG_MAPPING if model_type_to_module_name(k) in known]
    found = next((k for k in kinds if name in (k, model_type_to_module_name(k))), None)
    if found is None:
        raise unknown("family", name, known, "or give the folder of a checkpoint")
    return CONFIG_MAPPING[found](), False


def _alike(containers: tuple[Experts, ...]) -> dict[str, list[Experts]]:
    """Group containers whose paths differ in the layer's number alone."""
    groups: dict[str, list[Experts]] = {}
    for experts in containers:
        groups.setdefault(_NUMBER.sub(".N.", experts.path, count=1), []).append(experts)
    return groups


def _shape(weight: Any) -> str:
    return " x ".join(f"{size:,}" for size in weight.shape)


def _ranges(alike: list[Experts]) -> str:
    """Return the numbers of the layers, runs of them shortened: ``"0, 2-5"``."""
    numbers = [int(match[1]) for e in alike if (match := _NUMBER.search(e.path))]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _disk_names(model_type: str, path: str) -> list[str]:
    """Return how a checkpoint names what stands at a path, where not as the model does."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    places = [f"{path}.{matrix}" for matrix in ("gate_up_proj", "up_proj", "down_proj")]
    lines = []
    for rule in get_checkpoint_conversion_mapping(model_type) or ():
        sources = " + ".join(rule.source_patterns)
        for pattern in rule.target_patterns:
            target = pattern.strip("^$").replace("\\", "")
            whole = any(place.endswith(target) for place in places)
            if whole or ("." in target and target in f"{path}."):
                lines.append(f"{sources} for {target}")
    return lines or ["named as in the model"]


if __name__ == "__main__":
    sys.exit(main())
