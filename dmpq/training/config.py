"""What trainings depend on: frozen dataclasses, from which the command lines are made."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from dmpq.checks import check_numbers
from dmpq.config import SearchConfig, check_choices, option
from dmpq.errors import InputError

PRECISIONS: Final = ("fp32", "bf16", "fp16")
RANGES: Final = ("recomputed", "learned")
HEADED_TASKS: Final = ("classification", "token-classification", "question-answering")
TRAINED: Final = ("all", "experts", "routers")
MAPS: Final = ("fixed", "random")
_NOT_RESULTS: Final = ("out", "threads", "save_every")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options that every training shares; a flag, a keyword and a field have one name."""

    model: str = option("reference", "'reference', a local checkpoint folder, or a hub id")
    revision: str | None = option(None, "revision of a hub model")
    dataset: str = option("embedded", "'embedded', a local file or folder, or a hub name")
    task: str | None = option(
        None, "what the model is trained for on --dataset (default: next tokens)", HEADED_TASKS
    )
    text_column: str | None = option(
        None, "with --task: column of the texts, or two with a comma (default: the usual names)"
    )
    label_column: str | None = option(
        None, "with --task: column of labels, tags or answers (default: the usual names)"
    )
    steps: int | None = option(None, "optimizer steps (default: as many as --epochs take)")
    epochs: float = option(1.0, "passes over the data, where --steps is not given")
    batch_size: int = option(32, "windows of text, or examples, per batch")
    accumulate: int = option(1, "batches per optimizer step")
    sequence_length: int | None = option(
        None, "tokens per window, or of an example at most (default: the model's, <= 2048)"
    )
    learning_rate: float = option(
        1e-3, "at its highest; 1e-3 suits small models, 1e-5 those of billions of weights"
    )
    warmup: float = option(0.05, "share of the steps in which the rate rises")
    decay: float = option(0.5, "share of the steps, the last ones, in which it falls to zero")
    weight_decay: float = option(0.01, "of matrices")
    clip_norm: float = option(1.0, "norm that gradients are scaled down to")
    precision: str = option(
        "fp32", "of matrix products; weights, optimizer and routers stay in fp32", PRECISIONS
    )
    balance: float = option(0.01, "weight of Switch's load-balancing loss")
    z: float = option(0.0, "weight of the router z-loss")
    save_every: int = option(200, "steps between two checkpoints; 0 for none")
    seed: int = option(0, "seed of the data's order, and of dropout")
    heldout_tokens: int = option(65536, "held-out tokens that are reported on; of a task all")
    device: str = option("cpu", "torch device")
    threads: int | None = option(None, "CPU threads (default: torch's choice)")
    trust_remote_code: bool = option(False, "let code that comes with a checkpoint run")
    out: str | None = option(None, "output folder (default: runs/ and a name of its own)")

    def __post_init__(self) -> None:
        check_choices(self)
        check_bounds(self, _BOUNDS)
        if self.task is None and (self.text_column or self.label_column):
            raise InputError(
                "--text-column and --label-column belong to a task, and none is asked for; give "
                "--task, or leave them out."
            )

    def digest(self, **more: Any) -> str:
        """Return a hash of all that results depend on.

        Args:
            more: What they depend on besides.
        """
        mine = {k: v for k, v in asdict(self).items() if k not in _NOT_RESULTS}
        text = json.dumps({"kind": type(self).__name__, **mine, **more}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Options of ``python -m dmpq.train finetune``."""

    from_scratch: bool = option(
        False, "begin with random weights: of --model only config.json and tokenizer are read"
    )
    new_head: bool = option(
        False, "with --task: a new head for the labels of the data, in place of the checkpoint's"
    )
    probe_every: int = option(
        0,
        "steps between two comparisons with fp32 on the same batch: gradient underflow, router "
        "logits, changed selections; 0 for none",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_head and self.task is None:
            raise InputError(
                "--new-head is for the labels of a task, and none is asked for; give --task, or "
                "leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class QatConfig(TrainingConfig):
    """Options of ``python -m dmpq.train qat``."""

    steps: int | None = option(300, "optimizer steps")
    balance: float = option(0.0, "weight of Switch's load-balancing loss")
    maps: str = option(
        "fixed",
        "the bit map at every step, or a random one each, so that one set of weights tolerates "
        "every map",
        MAPS,
    )
    bits: str = option("2,3,4,8,16", "with --maps random: formats to draw from")
    quantizer: str = option("hqq", "with --maps random: how weights are quantized, rtn or hqq")
    symmetric: bool = option(False, "with --maps random: symmetric codes")
    labels: float = option(0.0, "weight of the loss on the data's own labels")
    distillation: float = option(
        1.0, "weight of the KL to the full-precision model that training begins with"
    )
    routers: float = option(
        0.0, "weight of the error of router logits to that model's, on its highest experts"
    )
    train: str = option("all", "which weights are trained", TRAINED)
    ranges: str = option(
        "recomputed", "scales and zero-points: found anew from the weights, or learned", RANGES
    )
    refresh: int = option(4, "batches for which a recomputed range is kept")
    control: bool = option(
        False, "also train in full precision on the same data, and show what that gives"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, {"refresh": (1, 10**9)} | dict.fromkeys(_TERMS, (0, 1e6)))
        if self.save_every % self.refresh:
            raise InputError(
                f"--save-every {self.save_every} is no multiple of --refresh {self.refresh}, so "
                "that ranges kept at a checkpoint would be lost; make it one."
            )
        if not self.labels + self.distillation + self.routers > 0:
            raise InputError(
                "--labels, --distillation and --routers are all 0, so that nothing would be "
                "learned; give one of them a weight."
            )
        if self.maps == "random" and "0" in self.bits.replace(" ", "").split(","):
            raise InputError(
                f"--bits {self.bits} offers pruned experts (0), and --maps random draws among "
                "formats that store something; leave the 0 out."
            )
        if self.ranges == "learned" and self.maps == "random":
            raise InputError(
                "--ranges learned belong to one map, and --maps random draws many; give "
                "--ranges recomputed."
            )
        if self.train == "routers" and self.ranges == "learned":
            raise InputError(
                "--train routers leaves the experts' ranges as they are, and --ranges learned "
                "trains them; give --ranges recomputed, or --train experts."
            )


@dataclass(frozen=True, kw_only=True)
class CodesignConfig(QatConfig):
    """Options of ``python -m dmpq.train codesign``."""

    steps: int | None = option(150, "optimizer steps of each round")
    hw: str = option("a100", "device that maps are searched for, as in python -m dmpq.search")
    bits: str = option("2,3,4,8,16", "formats on offer")
    quantizer: str = option("hqq", "how weights are quantized, rtn or hqq")
    symmetric: bool = option(False, "symmetric codes, without zero-points")
    avg_bits: float = option(2.5, "limit on effective bits per expert weight")
    agent: str = option("mckp", "agent by name, with options, as in python -m dmpq.search")
    evaluations: int = option(64, "true evaluations that the agent may ask for in each round")
    profile_tokens: int = option(8192, "calibration tokens for the profile of each round")
    search_tokens: int = option(65536, "calibration tokens per evaluation")
    rounds: int = option(4, "rounds at most")
    stable: float = option(0.02, "share of experts that may still change in a map that stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = {"rounds": (1, 10**6), "stable": (0, 1), "evaluations": (1, 10**9)}
        check_bounds(self, bounds | dict.fromkeys(("profile_tokens", "search_tokens"), (1, 1e12)))
        check_numbers(self.search)

    @property
    def search(self) -> SearchConfig:
        """The search of each round, but for the model."""
        shared = {one.name for one in fields(SearchConfig)} & {one.name for one in fields(self)}
        given = {name: getattr(self, name) for name in shared - {"out", "threads"}}
        return SearchConfig(
            **{**given, "weights": "acc=1", "selection_tokens": self.search_tokens}
        )


_TERMS: Final = ("labels", "distillation", "routers", "balance", "z")
_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "steps": (1, 10**9),
    "epochs": (1e-6, 10**6),
    "batch_size": (1, 10**6),
    "accumulate": (1, 10**6),
    "sequence_length": (2, 10**9),
    "learning_rate": (1e-12, 1e3),
    "warmup": (0, 1),
    "decay": (0, 1),
    "weight_decay": (0, 1e3),
    "clip_norm": (1e-9, 1e9),
    "balance": (0, 1e6),
    "z": (0, 1e6),
    "save_every": (0, 10**9),
    "seed": (0, 2**32 - 1),
    "heldout_tokens": (1, 10**12),
    "threads": (1, 1024),
    "probe_every": (0, 10**9),
}


def check_bounds(config: Any, bounds: dict[str, tuple[float, float]]) -> None:
    """Refuse numbers of no sense.

    Args:
        config: A configuration.
        bounds: Field → least and most.

    Raises:
        InputError: With the flag, the value and what is allowed.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name, None)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            flag = "--" + name.replace("_", "-")
            allowed = " to ".join(
                f"{one:,.0f}" if float(one).is_integer() else f"{one:g}" for one in (least, most)
            )
            raise InputError(f"{flag} {value} makes no sense; give {allowed}.")
