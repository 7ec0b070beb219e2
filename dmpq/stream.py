"""``python -m dmpq.stream``: a bit map for a checkpoint that is larger than memory.

Experts are profiled by gradients without loading the model
(:mod:`dmpq.checkpoints.streamed_profile`), and the map is judged by what the profile predicts:
nothing is measured on held-out text.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmpq.config import TASK_OPTIONS, SearchConfig, add_options, from_arguments
from dmpq.console import (
    MOST_GIGABYTES,
    CommandParser,
    exit_code,
    plain_console,
    progress_bars,
    quiet_libraries,
)
from dmpq.errors import InputError
from dmpq.guard import make_agent, run_agent
from dmpq.provenance import bitmap_of
from dmpq.quantizer import Quantizer

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.profile import Profile
    from dmpq.session import Session

PROFILE: Final = "profile.safetensors"
BITMAP: Final = "bitmap.json"
PARTIAL: Final = "profile.partial"
_GIGABYTE: Final = 1e9
_EXAMPLES: Final = """examples:
  python -m dmpq.stream --model path/to/checkpoint --out big --max-memory 8
  python -m dmpq.stream --model path/to/checkpoint --out big --avg-bits 2.5   # the profile is kept
  python -m dmpq.apply big/bitmap.json --out big-3bit --max-memory 8
"""
_LEFT_OUT: Final = (
    *TASK_OPTIONS,
    *("profile", "signal", "search_tokens", "selection_tokens", "further_tokens"),
    *("bank_memory_gb", "device", "measure_every", "tdp_w", "explain"),
    *("engine", "policy"),
)
_OWN_DEFAULTS: Final = {
    "agent": "mckp",
    "evaluations": 1,
    "weights": "acc=1",
    "out": "runs/stream",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(
        lambda: _streamed(arguments),
        memory="see --max-memory, or ask for a shorter --sequence-length",
        interrupted="Interrupted; the same command goes on from here.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m dmpq.stream",
        description="Find a bit map for a checkpoint that is larger than memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, left_out=_LEFT_OUT)
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="keep batches small enough for this much memory beside that of the imports, and "
        "refuse what takes more",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="for what the layers saw until the profile is done: 12 bytes per token, layer and "
        "hidden value; an interrupted run goes on with it (default: the --out folder)",
    )
    parser.set_defaults(**_OWN_DEFAULTS)
    return parser


def _streamed(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    config = replace(from_arguments(arguments), signal="gradient")
    limit = arguments.max_memory
    if limit is not None and not 0 < limit <= MOST_GIGABYTES:
        raise InputError(
            f"--max-memory is {limit}; give a positive number of GB, {MOST_GIGABYTES:g} at most."
        )
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise InputError(f"There is no folder {arguments.scratch}; make it, or leave it out.")
    stream(
        config,
        plain_console(),
        max_memory=None if limit is None else limit * _GIGABYTE,
        scratch=arguments.scratch,
    )
    return 0


def stream(
    config: SearchConfig,
    console: Console,
    *,
    max_memory: float | None = None,
    scratch: Path | None = None,
) -> None:
    """Profile a checkpoint without loading it, search on the profile, and write both.

    Args:
        config: What to search; its ``out`` is the folder.
        console: Where progress and the result are shown.
        max_memory: Bytes beside the imports; ``None`` for no limit.
        scratch: Folder for what the layers saw until the profile is done; ``config.out`` where
            ``None``. The same call goes on with what an interrupted one has left there.

    Raises:
        InputError: If the configuration asks for what cannot be, or takes more memory.
    """
    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.checks import prepare
    from dmpq.profile import empty_profile
    from dmpq.session import Session

    prepare(config)
    if Quantizer.parse(config.quantizer).calibrated:
        raise InputError(
            f"--quantizer {config.quantizer} needs calibration text that a loaded model reads, "
            "and here none is loaded; give rtn or hqq."
        )
    agent = make_agent(config.agent)
    if not config.out:
        raise InputError("There is no folder to write to; give --out.")
    folder = Path(config.out)
    source = Checkpoint(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bars(console) as progress:
        own = replace(config, search_tokens=0, selection_tokens=0, further_tokens=0)
        session = Session(own, progress=progress)
        session.take(source.moe, source.tokenizer())
        tokens = session.workload.tokens
        session.problem(empty_profile(source.moe.spec, session.menu, tokens=tokens))  # or refuse
        profile = _profile(
            session, source, folder, partial_folder(folder, scratch), max_memory, console
        )
        source.moe.__dict__["fingerprint"] = profile.fingerprint  # a cached property
        problem = session.problem(profile)
        result = run_agent(
            agent,
            config.agent,
            problem,
            evaluations=config.evaluations,
            seed=config.seed,
            on_candidate=lambda _candidate: None,
            trace=folder / "agent_error.txt",
        )
        bitmap_of(
            session,
            problem,
            result.assignment,
            evaluations=result.evaluations,
            tokens=profile.cost_tokens,
        ).write(folder / BITMAP)
    chosen = result.assignment[None]
    console.print(
        f"\n{config.agent}: {problem.effective_bits(chosen)[0]:.2f} bits per expert weight, KL "
        f"{float(result.scores.kl[0]):.5f} by the profile (uniform "
        f"{problem.menu.keys[problem.menu.narrowest]}: "
        f"{float(profile.uniform_kl[problem.menu.narrowest]):.5f})\n"
        "Nothing was measured on held-out text: the model was not loaded.\n"
        f"wrote {folder}/ {PROFILE} {BITMAP}",
        soft_wrap=True,
    )


def partial_folder(folder: Path, scratch: Path | None) -> Path:
    """Return where an unfinished profile of an output folder is kept.

    Args:
        folder: The output folder.
        scratch: Where the user wants it, which other output folders may share.
    """
    if scratch is None:
        return folder / PARTIAL
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
    return scratch / f"{PARTIAL}-{name}"


def _profile(
    session: Session,
    source: Checkpoint,
    folder: Path,
    partial: Path,
    max_memory: float | None,
    console: Console,
) -> Profile:
    """Return the folder's profile where it is of this search, else measure and keep one."""
    import numpy as np

    from dmpq.checkpoints.streamed_profile import batch_tokens, scratch_bytes, streamed_profile
    from dmpq.files import locked
    from dmpq.profile import Profile

    path, splits, progress = folder / PROFILE, session.splits, session.progress
    if path.exists():
        kept = Profile.load(path)
        if (kept.menu, kept.drawn) == (session.menu, splits.drawn):
            found = source.fingerprint(lambda i, n: progress("reading the weights", i, n))
            if kept.fingerprint == found:
                if partial.exists():  # of a run that was killed between its last two steps
                    with locked(partial, folder):
                        shutil.rmtree(partial)
                return kept
    windows = splits.profile
    assert isinstance(windows, np.ndarray)  # a session of no task draws windows
    lot = batch_tokens(source, windows.shape[1], max_memory)
    if partial.is_symlink():  # whatever is in the other folder would be removed
        raise InputError(
            f"{partial} is a link to another folder, which would be cleared; remove it, and name "
            "a folder on another disk by --scratch."
        )
    partial.mkdir(exist_ok=True)
    with locked(partial, folder):
        console.print(
            f"keeps {scratch_bytes(source, windows, lot) / 1e6:,.1f} MB in {partial} until the "
            "profile is done",
            soft_wrap=True,
        )
        profile = streamed_profile(
            source,
            session.menu,
            windows,
            text=splits.source,
            drawn=splits.drawn,
            lot=lot,
            kept=partial,
            progress=progress,
        )
        profile.save(path)
        shutil.rmtree(partial)
    return profile


if __name__ == "__main__":
    sys.exit(main())
