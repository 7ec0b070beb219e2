"""``python -m dmpq.export bitmap.json``: a bit map for other tools; would an engine load it?

``--to TOOL`` writes the configuration with which the tool makes such a model, or a checkpoint.
``--check ENGINE`` says which of the engine's rules the map breaks, and finds the nearest map that
breaks none.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.config import SearchConfig
from dmpq.console import (
    MOST_GIGABYTES,
    CommandParser,
    exit_code,
    plain_console,
    progress_bars,
    quiet_libraries,
)
from dmpq.engines.rules import NAMES, engine_named, rules_page
from dmpq.errors import InputError, unknown
from dmpq.files import replace_atomically

if TYPE_CHECKING:
    from dmpq.bitmap import BitMap
    from dmpq.engines.rules import Engine

DEQUANTIZED: Final = "dequantized"
_CONTAINER: Final = "compressed-tensors"
_GIGABYTE: Final = 1e9
_EXAMPLES: Final = """examples:
  python -m dmpq.export bitmap.json --to gptqmodel --out gptq.json
  python -m dmpq.export bitmap.json --to dequantized --out folder
  python -m dmpq.export bitmap.json --to compressed-tensors --container 4 --out folder
  python -m dmpq.export bitmap.json --check vllm --model reference --out nearest.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 where done or loadable, 1 where not loadable, 2 on bad input."""
    defaults = SearchConfig()
    parser = CommandParser(
        prog="python -m dmpq.export",
        description="Write a bit map for another tool, or check whether an engine loads it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bitmap", type=Path, nargs="?", help="a bit map of dmpq.search")
    parser.add_argument(
        "--to",
        metavar="TOOL",
        help="gptqmodel, auto-round, compressed-tensors, "
        "torchao, modelopt, llama.cpp, mlx or dequantized",
    )
    parser.add_argument("--check", metavar="ENGINE", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--rules", action="store_true", help="print what every engine demands")
    parser.add_argument("--out", type=Path, help="file or folder (default: standard output)")
    parser.add_argument(
        "--model",
        help="checkpoint: with --to that of the weights (default: the map's); with --check, "
        "measure on held-out text what the nearest map costs",
    )
    parser.add_argument(
        "--container",
        type=int,
        metavar="BITS",
        help="with --to compressed-tensors: write a checkpoint, every integer in this width",
    )
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="with a checkpoint: write it expert by expert, without loading the model, and refuse "
        "what takes more memory than this beside that of the imports",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="with --check: choose the nearest map by these sensitivities (profile.safetensors)",
    )
    parser.add_argument(
        "--avg-bits",
        type=float,
        metavar="BITS",
        help="with --check: limit of the nearest map (default: what the map has)",
    )
    parser.add_argument("--heldout-tokens", type=int, help="default: as many as the map's own")
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(lambda: _run(arguments), memory="see --max-memory")


def _run(arguments: argparse.Namespace) -> int:
    asked = [name for name in ("to", "check", "rules") if getattr(arguments, name)]
    if len(asked) != 1:
        raise InputError("Say what to do: give one of --to TOOL, --check ENGINE and --rules.")
    if arguments.rules:
        sys.stdout.write(rules_page())
        return 0
    if arguments.bitmap is None:
        raise InputError("No bit map is given; give the bitmap.json of a search.")
    _refuse_stray(arguments, asked[0])
    from dmpq.bitmap import BitMap

    engine = None if arguments.check is None else engine_named(arguments.check)
    bitmap = BitMap.read(arguments.bitmap)
    quiet_libraries()
    from dmpq.engines.preflight import refuse_compensators

    if arguments.to != DEQUANTIZED:
        refuse_compensators(bitmap.menu, arguments.to if engine is None else engine.name)
    return _export(bitmap, arguments) if engine is None else _check(engine, bitmap, arguments)


def _refuse_stray(arguments: argparse.Namespace, asked: str) -> None:
    """Refuse options that would have no effect, or a wrong one."""
    for name in ("profile", "avg_bits", "heldout_tokens"):
        if asked != "check" and getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has a meaning only with --check.")
    limit, writes = arguments.max_memory, arguments.to == DEQUANTIZED or arguments.container
    if limit is not None and not writes:
        raise InputError("--max-memory has a meaning only with a checkpoint (see --to).")
    if limit is not None and not 0 < limit <= MOST_GIGABYTES:
        raise InputError(
            f"--max-memory is {limit}; give a positive number of GB, {MOST_GIGABYTES:g} at most."
        )
    if arguments.container is not None and arguments.to != _CONTAINER:
        raise InputError("--container has a meaning only with --to compressed-tensors.")
    if arguments.out is not None and arguments.out.resolve() == arguments.bitmap.resolve():
        raise InputError(f"--out {arguments.out} is the bit map itself; give another file.")
    if arguments.avg_bits is not None and not 0 < arguments.avg_bits <= 16:
        raise InputError(f"--avg-bits {arguments.avg_bits} makes no sense; give up to 16.")


def _export(bitmap: BitMap, arguments: argparse.Namespace) -> int:
    from dmpq.exporters import EXPORTERS
    from dmpq.exporters.plan import Plan

    tool = arguments.to
    if tool not in (*EXPORTERS, DEQUANTIZED):
        raise unknown("tool", tool, (*EXPORTERS, DEQUANTIZED))
    if tool == DEQUANTIZED or arguments.container is not None:
        return _write_checkpoint(bitmap, arguments)
    if arguments.model is not None:
        raise InputError(
            f"--to {tool} writes a configuration, which needs no --model; leave it out."
        )
    engine = engine_named(tool)
    _refuse_broken(engine, bitmap)
    exporter = EXPORTERS[tool]
    text = exporter.text(Plan.of(bitmap))
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    replace_atomically(arguments.out, text.encode())
    console = plain_console()
    console.print(f"wrote {arguments.out}: {exporter.about}", soft_wrap=True)
    return 0


def _refuse_broken(engine: Engine, bitmap: BitMap) -> None:
    from dmpq.engines.preflight import broken_rules

    broken = broken_rules(engine, bitmap)
    if broken:
        raise InputError(
            f"{engine.name} cannot hold this bit map: {broken[0]}; make the nearest that it can "
            f"hold by --check {engine.name} --out FILE."
        )


def _write_checkpoint(bitmap: BitMap, arguments: argparse.Namespace) -> int:
    from dmpq.checks import prepare
    from dmpq.exporters.container import check_container, write_container
    from dmpq.exporters.dequantized import write_dequantized
    from dmpq.exporters.plan import Plan
    from dmpq.moe import load_model

    prepare(SearchConfig(threads=arguments.threads))
    if arguments.out is None:
        raise InputError("A checkpoint is a folder, not standard output; give --out FOLDER.")
    if arguments.container is not None:
        check_container(Plan.of(bitmap), arguments.container)
    source, revision = arguments.model or bitmap.model["id"], None
    if arguments.model is None:
        revision = bitmap.model["revision"]
    if arguments.max_memory is not None:
        _stream_checkpoint(bitmap, source, revision, arguments)
        return 0
    moe, tokenizer = load_model(source, revision=revision, device=arguments.device)
    if arguments.container is None:
        write_dequantized(bitmap, moe, tokenizer, arguments.out)
    else:
        write_container(bitmap, moe, tokenizer, arguments.out, bits=arguments.container)
    _say_written(arguments)
    return 0


def _stream_checkpoint(
    bitmap: BitMap, model: str, revision: str | None, arguments: argparse.Namespace
) -> None:
    """Write a checkpoint expert by expert, within a limit of memory."""
    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.exporters.container import ContainerPacking
    from dmpq.exporters.plan import Plan
    from dmpq.exporters.streamed import StreamedExport

    packing = None
    if arguments.container is not None:
        packing = ContainerPacking(Plan.of(bitmap), bits=arguments.container)
    source = Checkpoint(model, revision=revision)
    with progress_bars(plain_console()) as progress:
        made = StreamedExport(bitmap, source, packing, progress=progress)
        made.check_memory(arguments.max_memory * _GIGABYTE)
        made.write(arguments.out)
    _say_written(arguments)


def _say_written(arguments: argparse.Namespace) -> None:
    what = "bf16 weights, the experts' dequantized"
    if arguments.container is not None:
        what = f"every expert's integers in {arguments.container} bits"
    plain_console().print(f"wrote {arguments.out}/ ({what})", soft_wrap=True)


def _check(engine: Engine, bitmap: BitMap, arguments: argparse.Namespace) -> int:
    from dmpq.engines.preflight import Layout, NothingLoadable, broken_rules, nearest_loadable
    from dmpq.profile import Profile

    console = plain_console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    broken = broken_rules(engine, bitmap)
    verdict = "would not load" if broken else "would load"
    was = "tried out" if engine.how == "run" else "its source read, not run"
    say(f"{engine.name} ({engine.version}; {was}, {engine.read}) {verdict} this map")
    for rule in broken:
        say(f"  {rule.rule.kind.replace('_', ' ')}: {rule}")
    if broken:
        hint = _container_hint(engine, bitmap)
        if hint is not None:
            say(f"  {hint}")
    profile = None if arguments.profile is None else Profile.load(arguments.profile)
    try:
        nearest = nearest_loadable(engine, bitmap, profile=profile, avg_bits=arguments.avg_bits)
    except NothingLoadable as error:
        if arguments.out is not None or arguments.model is not None:
            raise
        say(f"  {error}")
        return 1
    layout = Layout.of(nearest)
    if broken:
        by = "the profile's sensitivities" if profile else "what the map's widths imply"
        own = f", {layout.bits(engine.stored):.3f} in its own formats" if engine.stored else ""
        say(
            f"  nearest loadable map, by {by}: {layout.bits():.3f} effective bits of "
            f"{Layout.of(bitmap).bits():.3f}{own}; {_formats(nearest)}"
        )
    if arguments.model is not None:
        _print_costs(bitmap, nearest, arguments, say)
    if arguments.out is not None:
        nearest.write(arguments.out)
        say(f"  wrote {arguments.out}")
    return int(bool(broken))


def _formats(bitmap: BitMap) -> str:
    """Return how many experts' matrices have which format, as ``40 at 2, 24 at 4 bits``."""
    import numpy as np

    from dmpq.engines.preflight import Layout

    layout = Layout.of(bitmap)
    counts = np.bincount(layout.pairs.ravel(), minlength=len(bitmap.menu)) / 2
    symmetric = "symmetric " if bitmap.menu.symmetric else ""
    listed = ", ".join(
        f"{count:g} at {key}" for key, count in zip(bitmap.menu.keys, counts, strict=True) if count
    )
    return f"experts: {listed} ({symmetric}{bitmap.menu.quantizer})"


def _container_hint(engine: Engine, bitmap: BitMap) -> str | None:
    """Return how the engine would read the map unchanged, at the price of a wider width."""
    from dmpq.exporters.container import WIDEST, check_container, needed_bits
    from dmpq.exporters.plan import Plan

    if not engine.container:
        return None
    plan = Plan.of(bitmap)
    rule = engine.rule("widths")
    try:
        widths = range(needed_bits(plan), WIDEST + 1)
        held = next((w for w in widths if rule is None or w in rule.allowed), None)
        if held is None:
            return None
        check_container(plan, held)
    except InputError:
        return None
    return (
        f"unchanged it would load in a uniform container: --to compressed-tensors --container "
        f"{held} (every expert takes {held} bits)"
    )


def _print_costs(bitmap: BitMap, nearest: BitMap, arguments: argparse.Namespace, say: Any) -> None:
    """Measure both maps on the same held-out text, and print what the nearest costs."""
    from dmpq.validate import replay

    options = argparse.Namespace(
        hw=None,
        model=arguments.model,
        dataset=None,
        heldout_tokens=arguments.heldout_tokens,
        sequence_length=None,
        device=arguments.device,
        threads=arguments.threads,
        tdp_w=None,
    )
    before = replay(bitmap, options)
    after = before if nearest is bitmap else replay(nearest, options)
    for name, unit in (("heldout_kl", "nats/token"), ("heldout_perplexity", "per token")):
        text = f"{before[name]:.6g}"
        if nearest is not bitmap:
            more = after[name] / before[name] - 1 if before[name] else 0.0
            text += f" -> {after[name]:.6g} ({more:+.1%})"
        say(f"  {name.replace('_', ' ')}: {text} {unit}")


if __name__ == "__main__":
    sys.exit(main())
