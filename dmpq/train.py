"""``python -m dmpq.train qat | codesign | finetune | upcycle``: train models with experts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.config import add_options, chosen
from dmpq.console import CommandParser, exit_code, plain_console, progress_bars, quiet_libraries
from dmpq.errors import InputError
from dmpq.run_folder import claim, only_run_in
from dmpq.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from dmpq.bitmap import BitMap
    from dmpq.training.config import QatConfig, TrainingConfig
    from dmpq.training.judging import Judgement
    from dmpq.training.qat import Trained
    from dmpq.training.workbench import Progress

_WRITTEN: Final = (
    *("model", "training", "summary.json", "bitmap.json", "quantized", "control"),
    *("round-1", "journal.jsonl"),
)
_EXAMPLES: Final = """examples:
  python -m dmpq.train qat runs/.../bitmap.json
  python -m dmpq.train codesign --avg-bits 2.5 --rounds 3
  python -m dmpq.train upcycle --model path/to/dense --experts 8 --top-k 2 --out moe
  python -m dmpq.train finetune --model moe --task classification --dataset data/ \\
      --new-head --precision bf16

Interrupt at any moment; the same command goes on from the last checkpoint, and ends at the
same weights to the bit.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    arguments = _parser().parse_args(argv)
    return exit_code(
        lambda: _COMMANDS[arguments.command](arguments),
        memory="give fewer --experts"
        if arguments.command == "upcycle"
        else "give a smaller --batch-size or --sequence-length",
        interrupted="Interrupted; the same command goes on from the last checkpoint.",
    )


def _parser() -> argparse.ArgumentParser:
    from dmpq.training.config import CodesignConfig, FinetuneConfig, QatConfig

    parser = CommandParser(
        prog="python -m dmpq.train",
        description="Train models with experts, and quantized ones.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    qat = commands.add_parser("qat", help="train under a bit map, or under random ones")
    qat.add_argument("bitmap", type=Path, nargs="?", help="a bit map written by dmpq.search")
    add_options(qat, QatConfig)
    codesign = commands.add_parser("codesign", help="search and train in turn")
    add_options(codesign, CodesignConfig, left_out=("maps", "ranges", "train", "control"))
    finetune = commands.add_parser("finetune", help="train in mixed precision")
    add_options(finetune, FinetuneConfig)
    upcycle = commands.add_parser("upcycle", help="make a dense model one with experts")
    upcycle.add_argument("--model", required=True, help="a dense checkpoint's folder, or a hub id")
    upcycle.add_argument("--revision", help="of a hub model")
    upcycle.add_argument("--experts", type=int, default=8, help="per layer (default: %(default)s)")
    upcycle.add_argument(
        "--top-k", type=int, default=2, help="that each token selects (default: %(default)s)"
    )
    upcycle.add_argument(
        "--layers", help="which, as in 1,3,5, counted from 0 (default: all with a dense FFN)"
    )
    upcycle.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="relative standard deviation of what each copy is changed by (default: %(default)s)",
    )
    upcycle.add_argument(
        "--capacity-factor", type=float, help="tokens per expert, times k/E (default: dropless)"
    )
    upcycle.add_argument("--seed", type=int, default=0, help="of routers and noise")
    upcycle.add_argument("--trust-remote-code", action="store_true")
    upcycle.add_argument("--out", required=True, help="folder, which must not exist")
    return parser


def _qat(arguments: argparse.Namespace) -> int:
    from dmpq.bitmap import BitMap
    from dmpq.training.config import QatConfig

    options = chosen(arguments, QatConfig)
    if (arguments.bitmap is None) != (options["maps"] == "random"):
        raise InputError(
            "A bit map is given, and --maps random draws others; leave one out."
            if arguments.bitmap is not None
            else "No bit map is given; give one that dmpq.search wrote, or --maps random."
        )
    bitmap = None
    if arguments.bitmap is not None:
        bitmap = BitMap.read(arguments.bitmap)
        options |= _of_the_map(options, bitmap)
    config = QatConfig(**options)
    content = {} if bitmap is None else bitmap.to_json()
    with _folder(config, "qat", bitmap=content) as (folder, console, show):
        return _trained_under(config, bitmap, folder, console, show)


def _of_the_map(options: Mapping[str, Any], bitmap: BitMap) -> dict[str, Any]:
    """Return the options that a map sets where the command leaves them at their defaults."""
    from dmpq.training.config import QatConfig

    default, text = QatConfig(), bitmap.text
    told = {
        "model": bitmap.model["id"],
        "revision": bitmap.model["revision"],
        "dataset": text["dataset"],
        "task": text.get("task"),
        "text_column": text.get("text_column"),
        "label_column": text.get("label_column"),
    }
    return {name: value for name, value in told.items() if options[name] == vars(default)[name]}


def _trained_under(
    config: QatConfig, bitmap: BitMap | None, folder: Path, console: Console, show: Progress
) -> int:
    from dmpq.training.qat import qat
    from dmpq.training.saved import BITMAP, MODEL, mapped, write_summary

    trained = qat(config, bitmap, folder, show)
    written = [f"{MODEL}/"]
    if bitmap is not None and trained.tensors is None:
        own = mapped(bitmap, folder / MODEL, show)
        own.write(folder / BITMAP)
        written.append(BITMAP)
    elif bitmap is not None:
        _pack(trained, bitmap, folder, show)
        written.append("quantized/")
    write_summary(
        folder,
        {
            "config": asdict(config),
            "data": trained.bench.source,
            "rows": {name: row.to_json() for name, row in trained.rows.items()},
        },
    )
    _say(console, trained.rows, folder, [*written, "summary.json"])
    return 0


def _pack(trained: Trained, bitmap: BitMap, folder: Path, show: Progress) -> None:
    """Write the packed checkpoint with the ranges that were learned."""
    from dataclasses import replace

    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.checkpoints.quantized import QuantizedCheckpoint
    from dmpq.files import remove, replace_folder
    from dmpq.training.saved import MODEL, mapped

    own = mapped(bitmap, folder / MODEL, show)
    # What the map's quantizer would make of these weights is not what was trained.
    own = replace(own, metrics={**own.metrics, "measured": {}})
    made = QuantizedCheckpoint(own, Checkpoint(str(folder / MODEL)), given=trained.tensors)
    fresh = folder / ".quantized.new"
    remove(fresh)
    made.write(fresh, card=_CARD, progress=show)
    replace_folder(fresh, folder / "quantized")


_CARD: Final = """# Quantized checkpoint

Trained under `bitmap.json` with learned scales and zero-points (`python -m dmpq.train qat
--ranges learned`), which are stored with its codes. After `import dmpq.hf` it loads by
`AutoModelForCausalLM.from_pretrained`.
"""


def _codesign(arguments: argparse.Namespace) -> int:
    from dmpq.training.codesign import codesign
    from dmpq.training.config import CodesignConfig
    from dmpq.training.saved import BITMAP, MODEL, mapped, write_summary

    config = CodesignConfig(**chosen(arguments, CodesignConfig))
    with _folder(config, "codesign") as (folder, console, show):
        made = codesign(config, folder, show)
        last = made.rounds[-1]
        own = mapped(last.bitmap, made.folder / MODEL, show)
        own.write(made.folder / BITMAP)
        write_summary(
            folder,
            {
                "config": asdict(config),
                "stable": made.stable,
                "changed": made.changed,
                "last": made.folder.name,
                "rounds": [one.to_json() for one in made.rounds],
            },
        )
        rows = {
            f"round {one.number}, {name}": row
            for one in made.rounds
            for name, row in one.rows.items()
        }
        changes = [(one.number, one.changed) for one in made.rounds[1:]]
        if made.stable:
            changes.append((last.number + 1, made.changed))
        for number, changed in changes:
            console.print(f"  search {number}: {changed:.1%} of the experts' formats changed")
        kept = "the map stays" if made.stable else f"{config.rounds} rounds, the map still changes"
        console.print(f"  {kept}")
        written = [f"{made.folder.name}/{MODEL}/", f"{made.folder.name}/{BITMAP}", "summary.json"]
        _say(console, rows, folder, written)
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from dmpq.training.config import FinetuneConfig

    config = FinetuneConfig(**chosen(arguments, FinetuneConfig))
    with _folder(config, "finetune") as (folder, console, show):
        from dmpq.training.finetune import finetune
        from dmpq.training.saved import write_summary

        made = finetune(config, folder, show)
        write_summary(
            folder, {"config": asdict(config), "data": made.bench.source, **made.to_json()}
        )
        console.print(
            f"  {made.tokens / max(made.seconds, 1e-9):,.0f} tokens/s, "
            f"{made.active_parameters:,} of {made.parameters:,} parameters active, "
            f"{made.peak_bytes / 1e6:,.0f} MB at most, {made.skipped} steps skipped"
        )
        _say(console, made.rows, folder, ["model/", "summary.json"])
    return 0


def _upcycle(arguments: argparse.Namespace) -> int:
    from dmpq.training.upcycle_checkpoint import upcycle_checkpoint

    quiet_libraries()
    console = plain_console()
    layers = None
    if arguments.layers is not None:
        try:
            layers = tuple(int(one) for one in arguments.layers.split(","))
        except ValueError as error:
            raise InputError(
                f"--layers {arguments.layers!r} is no list of numbers; write 1,3,5."
            ) from error
    upcycle_checkpoint(
        arguments.model,
        Path(arguments.out),
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        experts=arguments.experts,
        top_k=arguments.top_k,
        layers=layers,
        noise=arguments.noise,
        capacity_factor=arguments.capacity_factor,
        seed=arguments.seed,
        say=console.print,
    )
    return 0


@contextmanager
def _folder(
    config: TrainingConfig, command: str, **more: Any
) -> Iterator[tuple[Path, Console, Progress]]:
    """Yield the run's folder, claimed and locked, and where to show what."""
    if config.out is not None and not config.out.strip():
        raise InputError("--out is empty; give a folder, or leave it out.")
    digest = config.digest(**more)
    name = f"{command}-{Path(config.model).name}-{digest}"
    folder = Path("runs") / name if config.out is None else Path(config.out)
    quiet_libraries()
    use_threads(config.threads)
    claim(folder, digest, asdict(config), written=_WRITTEN)
    console = plain_console()
    with only_run_in(folder), progress_bars(console) as show:
        yield folder, console, show


def _say(
    console: Console, rows: Mapping[str, Judgement], folder: Path, written: list[str]
) -> None:
    """Print what was measured."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    first = next(iter(rows.values()))
    table.add_column("held-out")
    metrics = [name for name in first.metrics if name != "accuracy"]
    for name in ("perplexity", "accuracy", *([] if first.kl is None else ["KL"]), *metrics):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        cells = [f"{row.perplexity:.4f}", f"{row.accuracy:.2%}"]
        cells += [] if row.kl is None else [f"{row.kl:.5f}"]
        table.add_row(name, *cells, *(f"{row.metrics[one]:.2f}" for one in metrics))
    console.print(table)
    console.print(f"  wrote {folder}/ {' '.join(written)}", soft_wrap=True)


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "qat": _qat,
    "codesign": _codesign,
    "finetune": _finetune,
    "upcycle": _upcycle,
}


if __name__ == "__main__":
    sys.exit(main())
