"""``python -m dmpq.apply bitmap.json --out DIR``: the quantized checkpoint of a bit map."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmpq.config import SearchConfig
from dmpq.console import (
    MOST_GIGABYTES,
    CommandParser,
    exit_code,
    plain_console,
    progress_bars,
    quiet_libraries,
)
from dmpq.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dmpq.bitmap import BitMap
    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.checkpoints.quantized import QuantizedCheckpoint

_GIGABYTE: Final = 1e9
_LARGEST_SHARD: Final = 5_000_000_000
_EXAMPLES: Final = """examples:
  python -m dmpq.apply runs/.../bitmap.json --out olmoe-3bit
  python -m dmpq.apply bitmap.json --model path/to/checkpoint --out DIR --max-memory 2

The folder loads where dmpq is installed:

  import dmpq.hf
  model = transformers.AutoModelForCausalLM.from_pretrained("olmoe-3bit")

Experts are read, quantized and written one by one. Interrupt at any moment; the same command goes
on from there.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(
        lambda: _applied(arguments),
        memory="see --max-memory",
        interrupted="Interrupted; the same command goes on from here.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m dmpq.apply",
        description="Write the quantized checkpoint of a bit map.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bitmap", type=Path, help="a bit map written by dmpq.search")
    parser.add_argument("--out", type=Path, required=True, help="folder, which must not exist")
    parser.add_argument("--model", help="checkpoint (default: the one the map names)")
    parser.add_argument("--revision", help="of a hub model (default: the map's)")
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="refuse what would take more memory than this, beside that of the imports",
    )
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=_LARGEST_SHARD / _GIGABYTE,
        metavar="GB",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the source, a uniform 8-bit checkpoint (in a temporary folder) and the result "
        "in processes of their own, and print what each takes in memory",
    )
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the checkpoint run",
    )
    return parser


def _applied(arguments: argparse.Namespace) -> int:
    from dmpq.bitmap import BitMap

    bitmap = BitMap.read(arguments.bitmap)
    for name, value in (
        ("--max-memory", arguments.max_memory),
        ("--max-shard-size", arguments.max_shard_size),
    ):
        if value is not None and not 0 < value <= MOST_GIGABYTES:
            raise InputError(
                f"{name} is {value}; give a positive number of GB, {MOST_GIGABYTES:g} at most."
            )
    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists already; remove it, or give another --out.")
    quiet_libraries()
    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.checks import prepare

    prepare(SearchConfig(threads=arguments.threads))
    revision = bitmap.model["revision"] if arguments.revision is None else arguments.revision
    source = Checkpoint(
        bitmap.model["id"] if arguments.model is None else arguments.model,
        revision=revision if arguments.model is None else arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    apply(
        bitmap,
        source,
        arguments.out,
        largest_shard=int(arguments.max_shard_size * _GIGABYTE),
        max_memory=None if arguments.max_memory is None else arguments.max_memory * _GIGABYTE,
        measure=arguments.measure,
    )
    return 0


def apply(
    bitmap: BitMap,
    source: Checkpoint,
    folder: Path,
    *,
    largest_shard: int = _LARGEST_SHARD,
    max_memory: float | None = None,
    measure: bool = False,
) -> None:
    """Write a map's checkpoint, and print what it takes beside bf16 and uniform 8 bits.

    Args:
        bitmap: The map.
        source: The checkpoint that it was made for.
        folder: Where to.
        largest_shard: Bytes of a file, at most.
        max_memory: Bytes beside the imports; ``None`` for no limit.
        measure: Whether to load all three, and print the memory that each takes.

    Raises:
        InputError: If the map is of other weights, or a limit cannot be kept.
    """
    from dmpq.checkpoints.model_card import model_card
    from dmpq.checkpoints.quantized import QuantizedCheckpoint

    console = plain_console()
    calibrated = bitmap.menu.method.calibrated
    if calibrated and max_memory is not None:
        raise InputError(
            f"The map's quantizer {bitmap.menu.quantizer!r} is calibrated by a forward of the "
            "loaded model, which --max-memory does not bound; leave it out."
        )
    factors = calibration_factors(bitmap, source) if calibrated else None
    made = QuantizedCheckpoint(bitmap, source, largest_shard, factors)
    uniform = QuantizedCheckpoint(uniform8(bitmap), source, largest_shard, factors)
    if max_memory is not None:
        made.check_memory(max_memory)
    spec, search = source.moe.spec, bitmap.search
    console.print(
        f"  model     {source.name} ({spec.model_type}, {spec.num_experts} experts in "
        f"{len(spec.moe_layers)} layers)\n"
        f"  map       of {search['agent']}, {bitmap.menu.quantizer}, "
        f"{'symmetric' if bitmap.menu.symmetric else 'asymmetric'}"
    )
    if source.unused:
        console.print(
            f"  note      {len(source.unused)} tensors that the model does not load are left out, "
            f"among them {source.unused[0]}"
        )
    sizes = {
        "bf16": bf16_bytes(source),
        "uniform 8 bits": uniform.num_bytes,
        "this map": made.num_bytes,
    }
    with progress_bars(console) as progress:
        made.write(folder, card=model_card(bitmap, sizes=sizes), progress=progress)
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    resident = _measured(source, uniform, folder) if measure else {}
    console.print()
    console.print(_table(sizes, resident))
    console.print(
        f"\nwrote {folder}: {on_disk:,} bytes of weights, predicted {made.num_bytes:,}",
        soft_wrap=True,
    )


def calibration_factors(
    bitmap: BitMap, source: Checkpoint
) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Calibrate a map's quantizer again, by the text that the map names.

    Args:
        bitmap: Of a calibrated quantizer.
        source: The checkpoint; the model is loaded to read the text, or to write it first.

    Returns:
        What :attr:`dmpq.checkpoints.quantized.QuantizedCheckpoint.factors` takes.

    Raises:
        InputError: If the text is another by now, or cannot be read.
    """
    from dmpq.calibration import Calibration, calibrating_windows
    from dmpq.data import CalibrationText
    from dmpq.moe import load_model

    told = bitmap.calibration
    assert told is not None  # a valid map of a calibrated quantizer has it
    text = CalibrationText.from_json(told)
    moe, tokenizer = load_model(
        source.name,
        revision=source.moe.revision,
        trust_remote_code=source.trust_remote_code,
    )
    windows = calibrating_windows(text, moe, tokenizer, bitmap.menu.method)
    return Calibration(moe, windows, bitmap.menu.method).factors


def uniform8(bitmap: BitMap) -> BitMap:
    """Return the map of the same model that gives every expert 8 bits."""
    from dmpq.formats import Format, Menu

    menu = Menu((Format(8),), bitmap.menu.quantizer, bitmap.menu.symmetric)
    layers = bitmap.geometry.moe_layers
    return replace(
        bitmap, menu=menu, assignment={one.path: ["8"] * one.num_experts for one in layers}
    )


def bf16_bytes(source: Checkpoint) -> int:
    """Return the bytes of a checkpoint's weights at 16 bits each, other types as they are."""
    from math import prod

    others = sum(
        2 * prod(info.shape) if info.dtype.is_floating_point else info.num_bytes
        for info in source.other_tensors.values()
    )
    return others + 2 * source.moe.spec.expert_parameters


def _measured(source: Checkpoint, uniform: QuantizedCheckpoint, folder: Path) -> dict[str, int]:
    """Return what each takes in memory once loaded, bytes."""
    from dmpq.checkpoints.memory_probe import resident_bytes

    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as scratch:
        uniform.write(Path(scratch) / "uniform8", card="", check=False)
        return {
            "bf16": resident_bytes(source.folder),
            "uniform 8 bits": resident_bytes(Path(scratch) / "uniform8"),
            "this map": resident_bytes(folder),
        }


def _table(sizes: dict[str, int], resident: dict[str, int]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("weights")
    for name in ("on disk, MB", "of bf16", *(("in memory, MB",) if resident else ())):
        table.add_column(name, justify="right")
    for name, size in sizes.items():
        cells = [f"{size / 1e6:,.2f}", f"{size / sizes['bf16']:.1%}"]
        table.add_row(name, *cells, *([f"{resident[name] / 1e6:,.1f}"] if resident else []))
    return table


if __name__ == "__main__":
    sys.exit(main())
