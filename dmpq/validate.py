"""``python -m dmpq.validate bitmap.json``: measure again what a bit map claims, and compare.

Bits, memory and held-out quality are replayed. Latency and energy also depend on the routing that
the search had profiled, which a bit map does not hold; they are not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.config import SearchConfig
from dmpq.console import CommandParser, exit_code, plain_console, quiet_libraries
from dmpq.errors import InputError

if TYPE_CHECKING:
    from dmpq.bitmap import BitMap
    from dmpq.session import Session

_RELATIVE_TOLERANCE: Final = 1e-3
"""Matrix products round differently on another machine."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 where every claim holds, 1 where one does not, 2 on bad input."""
    defaults = asdict(SearchConfig())
    parser = CommandParser(
        prog="python -m dmpq.validate",
        description="Measure again what a bit map claims, and compare.",
    )
    parser.add_argument("bitmap", type=Path, help="a bit map written by dmpq.search")
    parser.add_argument("--model", help="checkpoint (default: the one the map names)")
    parser.add_argument("--hw", help="device or device file (default: the one the map names)")
    parser.add_argument(
        "--tdp-w",
        type=float,
        metavar="W",
        help="with cuda: board power, watts, where the GPU's energy counter cannot be read",
    )
    parser.add_argument("--dataset", help="text (default: the map's own)")
    parser.add_argument("--heldout-tokens", type=int, help="default: as many as the map's own")
    parser.add_argument("--sequence-length", type=int, help="default: the map's own")
    parser.add_argument(
        "--harness",
        metavar="TASKS",
        help="also ask tasks of lm-evaluation-harness, as in hellaswag,arc_easy, under the map "
        "and at full precision",
    )
    parser.add_argument("--harness-limit", type=int, metavar="N", help="examples per such task")
    parser.add_argument("--device", default=defaults["device"])
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    return exit_code(lambda: _validated(arguments), memory="ask for fewer --heldout-tokens")


def _validated(arguments: argparse.Namespace) -> int:
    """Replay the map, and say which of its claims hold."""
    from dmpq.bitmap import BitMap

    bitmap = BitMap.read(arguments.bitmap)
    quiet_libraries()
    found = replay(bitmap, arguments)
    claimed = {**bitmap.metrics["predicted"], **bitmap.metrics["measured"]}
    console = plain_console()
    code = _compare(claimed, found, console)
    if arguments.harness is not None:
        _show_harness(bitmap, arguments, console)
    return code


def _show_harness(bitmap: BitMap, arguments: argparse.Namespace, console: Any) -> None:
    """Print what the harness's tasks score at full precision and under the map."""
    from dmpq.harness import harness_scores
    from dmpq.moe import LANGUAGE_MODELLING
    from dmpq.tasks.splits import TASKS

    session = _session(bitmap, arguments)
    task = session.config.task
    if task is not None and TASKS[task].head != LANGUAGE_MODELLING:
        raise InputError(
            f"--harness asks a language model, and {session.config.model} is one for "
            f"{session.config.task}; leave it out."
        )
    tasks = [name.strip() for name in arguments.harness.split(",") if name.strip()]
    tokenizer = session.tokenizer
    chosen = bitmap.to_assignment(session.moe.spec)
    limit = arguments.harness_limit
    full = harness_scores(session.bank, tokenizer, None, tasks, limit=limit)
    own = harness_scores(session.bank, tokenizer, chosen, tasks, limit=limit)
    for name, value in own.items():
        console.print(f"  {name:<32} {full[name]:.4f} at full precision, {value:.4f} by the map")


def replay(bitmap: BitMap, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of a bit map, computed anew.

    Args:
        bitmap: The map.
        arguments: The command's options.

    Raises:
        InputError: If the map was made for other weights, or cannot be evaluated.
    """
    return _replayed(bitmap, _session(bitmap, arguments))


def _session(bitmap: BitMap, arguments: argparse.Namespace) -> Session:
    """Return the session that a map was made in, as far as the options leave it."""
    from dmpq.checks import prepare
    from dmpq.data import CalibrationText
    from dmpq.session import Session

    workload, text = bitmap.workload, dict(bitmap.text)
    text |= {
        name: value
        for name, value in vars(arguments).items()
        if name in text and value is not None
    }
    config = SearchConfig(
        hw=bitmap.hardware["name"] if arguments.hw is None else arguments.hw,
        model=bitmap.model["id"] if arguments.model is None else arguments.model,
        revision=bitmap.model["revision"],
        dataset=text["dataset"],
        bits=",".join(bitmap.menu.keys),
        quantizer=bitmap.menu.quantizer,
        symmetric=bitmap.menu.symmetric,
        cost_geometry=bitmap.hardware["cost_geometry"],
        phase=workload["phase"],
        batch=workload["batch"],
        context=workload["context"],
        heldout_tokens=text["heldout_tokens"],
        # Of a task it is the longest example's, and no example is cut.
        sequence_length=None if "task" in text else text["sequence_length"],
        task=text.get("task"),
        text_column=text.get("text_column"),
        label_column=text.get("label_column"),
        device=arguments.device,
        threads=arguments.threads,
        tdp_w=arguments.tdp_w,
    )
    prepare(config)
    told = bitmap.calibration
    session = Session(
        replace(config, profile_tokens=0, search_tokens=0, selection_tokens=0, further_tokens=0),
        calibration=None if told is None else CalibrationText.from_json(told),
    )
    _ = session.hardware, session.workload
    if session.moe.fingerprint != bitmap.model["fingerprint"]:
        raise InputError(
            f"The bit map was made for weights {bitmap.model['fingerprint'][:12]}..., "
            f"{config.model} has {session.moe.fingerprint[:12]}...; give the right --model."
        )
    return session


def _replayed(bitmap: BitMap, session: Session) -> dict[str, float]:
    import numpy as np

    config = session.config
    spec = session.moe.spec
    assignment = bitmap.to_assignment(spec)[None]
    evaluator = session.evaluator("heldout")
    heldout = evaluator.evaluate(assignment)
    quality = {"heldout_perplexity": float(heldout.perplexity[0])}
    if config.task is not None:
        from dmpq.tasks.evaluator import TaskEvaluator

        assert isinstance(evaluator, TaskEvaluator)
        (judged,) = evaluator.metrics(assignment)
        quality = {f"heldout_{name}": value for name, value in judged.items()}
    formats = assignment.reshape(spec.num_experts, -1)
    per_projection = spec.stored_bits(bitmap.menu)
    stored = np.take_along_axis(
        per_projection, np.broadcast_to(formats, (spec.num_experts, 2))[:, :, None], axis=2
    )
    cost = session.hardware.cost(
        session.cost_spec(spec), bitmap.menu, assignment, session.workload
    )
    return {
        "effective_bits": float(stored.sum()) / spec.expert_parameters,
        "memory": float(cost.memory_bytes[0]),
        "heldout_kl": float(heldout.kl[0]),
        **quality,
    }


def _compare(
    claimed: Mapping[str, Mapping[str, Any]], found: Mapping[str, float], console: Any
) -> int:
    """Print claims beside what was found; 1 where one differs."""
    wrong = 0
    for name, value in found.items():
        if name not in claimed:
            continue
        claim, unit = claimed[name]["value"], claimed[name]["unit"]
        same = math.isclose(claim, value, rel_tol=_RELATIVE_TOLERANCE, abs_tol=1e-9)
        wrong += not same
        console.print(f"  {'ok   ' if same else 'WRONG'} {name:<20} {claim:.6g} {unit}", end="")
        console.print("" if same else f", found {value:.6g}")
    skipped = ", ".join(sorted(claimed.keys() - found.keys()))
    if skipped:
        console.print(f"  not replayed: {skipped}, which depend on the routing that was profiled")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
