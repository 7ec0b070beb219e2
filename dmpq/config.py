"""What a search depends on: one frozen dataclass, from which the command line is made."""

from __future__ import annotations

import argparse
import hashlib
import json
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, get_args, get_type_hints

from dmpq.errors import InputError, unknown
from dmpq.quantizer import Quantizer

_DEFAULT_AVG_BITS: Final = 3.0


def option(default: Any, help_text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field that is also a flag of a command.

    Args:
        default: Of both.
        help_text: Of the flag.
        choices: The values allowed; ``None`` for any.
    """
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class SearchConfig:
    """Options of ``python -m dmpq.search``; a flag, a keyword and a field have one name.

    Limits are upper limits in the units of their names; where none is given, ``avg_bits`` is 3.
    """

    hw: str = option(
        "a100", "device, DEVICE/STACK, host or cuda (this machine, measured), or a file (.json)"
    )
    model: str = option("reference", "'reference', a local checkpoint folder, or a hub id")
    revision: str | None = option(None, "revision of a hub model")
    dataset: str = option("embedded", "'embedded', a local file or folder, or a hub name")
    bits: str = option(
        "2,3,4,8,16", "formats on offer, as in 2,3,4,8,16 or 2g32,4; 0 prunes experts"
    )
    group_sizes: str | None = option(
        None, "weights per scale, as in 32,64,128: each width is offered with every one"
    )
    quantizer: str = option(
        "hqq",
        "how weights are quantized: rtn, hqq or gptq; with a low-rank compensator, as in hqq+lr8; "
        "gptq with options, as in gptq,tokens=4096,affinity,balanced; gptq,ebss for text that the "
        "model writes",
    )
    symmetric: bool = option(False, "symmetric codes, without zero-points")
    serve: str = option(
        "expert", "what shares one format when served", ("expert", "projection", "layer")
    )
    avg_bits: float | None = option(
        None, "limit on effective bits per expert weight (3 where no limit is given)"
    )
    memory_gb: float | None = option(None, "limit on memory, GB of 1e9 bytes")
    latency_ms: float | None = option(None, "limit on the time of a step, milliseconds")
    energy_j: float | None = option(None, "limit on the energy of a step, joules")
    weights: str = option("acc=1,lat=0.1,mem=0.1,eng=0.1", "weights of the reward's terms")
    agent: str = option(
        "ppo",
        "agent by name, or module:Class for your own; with options, as in ppo,samples=8 (python "
        "-m dmpq.agents show ppo lists them)",
    )
    policy: str | None = option(
        None, "policy, a folder, that ppo goes on from; with --evaluations 1 its own map"
    )
    evaluations: int = option(64, "true evaluations that the agent may ask for")
    seed: int = option(0, "seed of the calibration draw and of the agent")
    phase: str = option("decode", "workload: what a step is", ("decode", "prefill"))
    batch: int = option(1, "workload: sequences per step")
    context: int = option(2048, "workload: tokens of context per sequence")
    cost_geometry: str | None = option(
        None,
        "model at whose widths costs are computed, a name or config.json; 'own' for the model's "
        "own (default: olmoe-1b-7b for the reference model, else own)",
    )
    profile: str | None = option(None, "search on a saved profile, made by an earlier run")
    signal: str = option(
        "sensitivity",
        "what tells experts apart: every variant evaluated, or gradients of one pass over it all; "
        "with --task, 'task' evaluates maps by the task's metric in place of the KL",
        ("sensitivity", "gradient", "task"),
    )
    profile_tokens: int = option(8192, "calibration tokens for the profile")
    search_tokens: int = option(65536, "calibration tokens per evaluation")
    selection_tokens: int = option(65536, "fresh calibration tokens for the final choice")
    further_tokens: int = option(
        524288,
        "more calibration tokens, or what there is: ppo reads them where an evaluation has 8192 "
        "or fewer",
    )
    heldout_tokens: int = option(65536, "held-out tokens for the report")
    sequence_length: int | None = option(None, "tokens per window (default: the model's, <= 2048)")
    bank_memory_gb: float = option(8.0, "keep variants dequantized up to this much memory")
    device: str = option("cpu", "torch device that evaluates bit maps")
    threads: int | None = option(None, "CPU threads (default: torch's choice)")
    trust_remote_code: bool = option(False, "let code that comes with a checkpoint run")
    measure_every: int | None = option(
        None, "with host or cuda: measure every K-th new map as a whole, and correct the costs"
    )
    tdp_w: float | None = option(
        None, "with cuda: board power, watts, where the GPU's energy counter cannot be read"
    )
    engine: str | None = option(
        None, "add a row: the nearest map that this engine loads (see python -m dmpq.export)"
    )
    explain: bool = option(False, "show where the time, bytes and energy of the agent's map go")
    task: str | None = option(
        None,
        "what the model is for, and is judged by on --dataset (default: next tokens)",
        (
            "classification",
            "token-classification",
            "question-answering",
            "translation",
            "multiple-choice",
        ),
    )
    text_column: str | None = option(
        None, "with --task: column of the texts, or two with a comma (default: the usual names)"
    )
    label_column: str | None = option(
        None, "with --task: column of labels, answers or targets (default: the usual names)"
    )
    out: str | None = option(None, "output folder (default: runs/ and a name of its own)")

    def __post_init__(self) -> None:
        check_choices(self)
        Quantizer.parse(self.quantizer)
        self._check_task()

    def _check_task(self) -> None:
        """Refuse options of tasks where there is none."""
        given = {"text_column": self.text_column, "label_column": self.label_column}
        lone = [_flag(name) for name, value in given.items() if value is not None]
        if self.signal == "task":
            lone.append("--signal task")
        if self.task is None and lone:
            raise InputError(
                f"{lone[0]} belongs to a task, and none is asked for; give --task, or leave it "
                "out."
            )

    @property
    def profile_signal(self) -> str:
        """What the profile's sensitivities are from: a task's metric is too coarse for them."""
        return "sensitivity" if self.signal == "task" else self.signal

    @property
    def effective_avg_bits(self) -> float | None:
        """The limit on effective bits: as given, or 3 where no other limit is."""
        others = (self.memory_gb, self.latency_ms, self.energy_j)
        if self.avg_bits is None and all(limit is None for limit in others):
            return _DEFAULT_AVG_BITS
        return self.avg_bits

    @property
    def geometry(self) -> str:
        """The cost geometry: as given, or the default for the model."""
        default = "olmoe-1b-7b" if self.model == "reference" else "own"
        return default if self.cost_geometry is None else self.cost_geometry

    @property
    def kept_evaluations(self) -> int:
        """Evaluations that the agent does not get: 1 where measured maps change what is limited.

        A correction may put every map so far beyond a limit; this one then brings one within it.
        """
        limited = self.latency_ms is not None or self.energy_j is not None
        return int(limited and self.measure_every is not None)

    def digest(self) -> str:
        """Return a hash of the whole configuration but for where it runs and writes."""
        chosen = {
            k: v
            for k, v in asdict(self).items()
            if k not in _NOT_RESULTS and not (k in _LATER and v is None)
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


TASK_OPTIONS: Final = ("task", "text_column", "label_column")
_LATER: Final = TASK_OPTIONS
"""Options newer than the first runs, which keep their names where these are not used."""
_NOT_RESULTS: Final = ("out", "threads", "bank_memory_gb", "explain", "engine")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_choices(config: Any) -> None:
    """Refuse a value that an option of a configuration does not offer.

    Raises:
        InputError: With the flag, the value and what is allowed.
    """
    for one in fields(config):
        choices, value = one.metadata["choices"], getattr(config, one.name)
        optional = one.default is None and value is None
        if choices is not None and value not in choices and not optional:
            raise unknown(_flag(one.name), value, choices)


def add_options(
    parser: argparse.ArgumentParser, kind: type = SearchConfig, *, left_out: Sequence[str] = ()
) -> None:
    """Add one flag per field of a configuration, with its default and its help.

    Args:
        parser: Where to.
        kind: The configuration, a dataclass of :func:`option` fields.
        left_out: Fields that keep their defaults.
    """
    hints = get_type_hints(kind)
    for one in fields(kind):
        if one.name in left_out:
            continue
        flag = _flag(one.name)
        text, choices = one.metadata["help"], one.metadata["choices"]
        if hints[one.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        name = one.name.rpartition("_")[2]
        shown = "" if one.default is None else " (default: %(default)s)"
        parser.add_argument(
            flag,
            type=_parser_of(hints[one.name]),
            default=one.default,
            metavar=f"{{{','.join(choices)}}}" if choices else name.upper(),
            help=text + shown,
        )


def _parser_of(hint: Any) -> Any:
    """Return the type that reads a flag: the annotation without its ``None``."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def from_arguments(arguments: argparse.Namespace) -> SearchConfig:
    """Return the configuration that the parsed flags describe."""
    return SearchConfig(**chosen(arguments, SearchConfig))


def chosen(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return what parsed flags say of the fields of a configuration."""
    given = vars(arguments)
    return {one.name: given[one.name] for one in fields(kind) if one.name in given}
