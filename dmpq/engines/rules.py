"""What engines and tools can hold: rules as data, each with its reason and where it was read.

``python -m dmpq.export --check ENGINE`` judges a bit map by them, and docs/engines.md is made
from them. A rule says what is allowed; :mod:`dmpq.engines.preflight` knows how each kind is
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from dmpq.errors import unknown

Kind = Literal[
    "architecture", "granularity", "widths", "group_sizes", "zero_points", "row_multiples"
]
UPCYCLED: Final = "dmpq_upcycled"
"""The model type of upcycled checkpoints that fit no published architecture."""
GRANULARITIES: Final = ("projection", "expert", "tensor", "layer", "model")
"""What shares one format, from fine to coarse.

``tensor`` is all gate and up matrices of a layer, or all its down matrices.
"""
ZERO_POINTS: Final = ("none", "integer", "float")
ANY_ZERO_POINT: Final = frozenset(ZERO_POINTS)


@dataclass(frozen=True)
class Rule:
    """One thing that an engine demands of a map.

    Attributes:
        kind: What it is about.
        allowed: A granularity; a set of widths, of group sizes (weights) or of kinds of
            zero-points; width → what the input width must be a multiple of; or, of
            architectures, which ones in words.
        because: Why, in one sentence without full stop.
        source: Where that was read.
    """

    kind: Kind
    allowed: str | frozenset[int] | frozenset[str] | Mapping[int, int]
    because: str
    source: str


@dataclass(frozen=True)
class Engine:
    """A reader of quantized models, or a tool that makes them.

    Attributes:
        name: What ``--check`` calls it.
        version: The version whose source was read, or that was run.
        read: When, ISO date.
        how: ``"run"`` where the rules were tried out here, ``"read"`` where only read.
        rules: What it demands; nothing else is checked.
        container: Whether it reads a uniform container (``--container``).
        stored: Width → bits per weight of its own formats, scales included, where they are not
            dmpq's.
    """

    name: str
    version: str
    read: str
    how: Literal["run", "read"]
    rules: tuple[Rule, ...]
    container: bool = False
    stored: Mapping[int, float] = field(default_factory=dict)

    def rule(self, kind: Kind) -> Rule | None:
        """Return the rule of a kind, if there is one."""
        return next((rule for rule in self.rules if rule.kind == kind), None)


def _widths(*bits: int, because: str, source: str) -> Rule:
    return Rule("widths", frozenset(bits), because, source)


def _groups(*sizes: int, because: str, source: str) -> Rule:
    return Rule("group_sizes", frozenset(sizes), because, source)


def _zeros(*kinds: str, because: str, source: str) -> Rule:
    return Rule("zero_points", frozenset(kinds), because, source)


_PRUNED: Final = "an expert cannot be left out (0 bits)"
_NO_PRUNING: Final = _widths(
    2, 3, 4, 8, 16, because=_PRUNED, source="no such option in its configuration"
)
_MARLIN_GROUPS: Final = _groups(
    32,
    64,
    128,
    because="Marlin's MoE kernels have these group sizes",
    source="vLLM marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES",
)
_CT_EXPERT_0: Final = Rule(
    "granularity",
    "layer",
    "the format of a layer is read off expert 0 alone, whose three matrices must agree",
    "vLLM compressed_tensors_moe.py at 0043d6b, get_moe_method",
)
_NO_UPCYCLED: Final = Rule(
    "architecture",
    f"all but {UPCYCLED}",
    "it is registered where dmpq.hf is imported, and nowhere in the engine's own process",
    "dmpq/upcycled.py; its config.json names no remote code",
)
_TOOL_ZEROS: Final = "the tool quantizes by itself, with zero-points or without"

ENGINES: Final[tuple[Engine, ...]] = (
    Engine(
        "dmpq",
        "0.1.0",
        "2026-11-30",
        "run",
        (),
    ),
    Engine(
        "gptqmodel",
        "7.7.0",
        "2026-11-30",
        "run",
        (
            _widths(
                2, 3, 4, 8, 16, because=_PRUNED, source="GPTQModel QuantizeConfig.bits, dynamic"
            ),
        ),
    ),
    Engine("auto-round", "0.16.1", "2026-11-30", "run", (_NO_PRUNING,)),
    Engine("torchao", "0.18.0", "2026-11-30", "run", (_NO_PRUNING,)),
    Engine(
        "compressed-tensors",
        "0.19.0, as llm-compressor 0.14.0.1 writes it",
        "2026-11-30",
        "run",
        (
            _NO_PRUNING,
            _zeros(
                "none",
                "integer",
                "float",
                because=_TOOL_ZEROS,
                source="compressed-tensors QuantizationArgs.symmetric",
            ),
        ),
        container=True,
    ),
    Engine(
        "transformers",
        "5.23.0 with compressed-tensors 0.20.0",
        "2026-11-30",
        "run",
        (
            Rule(
                "granularity",
                "model",
                "the first config group that names experts is taken for all experts of all layers",
                "transformers integrations/compressed_tensors.py, get_experts_scheme",
            ),
            _NO_PRUNING,
            _zeros(
                "none",
                because="zero-points of experts are not read",
                source="transformers integrations/compressed_tensors.py, DummyModule",
            ),
        ),
        container=True,
    ),
    Engine(
        "vllm",
        "main at 0043d6b, compressed-tensors",
        "2026-11-30",
        "read",
        (
            _NO_UPCYCLED,
            _CT_EXPERT_0,
            _widths(
                4,
                8,
                16,
                because="WNA16 experts have 4 or 8 bits in every version (2 to 8 in the newest)",
                source="vLLM compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP",
            ),
            _zeros(
                "none",
                because="quantized experts are symmetric",
                source="vLLM WNA16 MoE methods, by the project's notes of 2026-08",
            ),
            _MARLIN_GROUPS,
        ),
        container=True,
    ),
    Engine(
        "vllm-gptq",
        "main at 055e47c, GPTQ (Marlin)",
        "2026-11-30",
        "read",
        (
            _NO_UPCYCLED,
            Rule(
                "granularity",
                "layer",
                "`dynamic` is matched against the fused name of a layer's experts: one format",
                "vLLM auto_gptq.py at 055e47c, get_moe_quant_method",
            ),
            _widths(
                4,
                8,
                16,
                because="Marlin has experts of 4 and 8 bits",
                source="vLLM auto_gptq.py at 055e47c, TYPE_MAP",
            ),
            _zeros(
                "none",
                because="TYPE_MAP has symmetric formats only",
                source="vLLM auto_gptq.py at 055e47c, TYPE_MAP",
            ),
            _MARLIN_GROUPS,
        ),
    ),
    Engine(
        "sglang",
        "main at 02a5808, compressed-tensors",
        "2026-11-30",
        "read",
        (
            _NO_UPCYCLED,
            Rule(
                "granularity",
                "model",
                "the scheme of experts is that of the target `Linear`, one for the whole model",
                "SGLang compressed_tensors_wNa16_moe.py at 02a5808, target_scheme_map['Linear']",
            ),
            _widths(
                4,
                8,
                16,
                because="WNA16_SUPPORTED_BITS is 4 and 8",
                source="SGLang compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP",
            ),
            _zeros(
                "none",
                because="only symmetric quantization is supported for MoE",
                source="SGLang compressed_tensors_wNa16_moe.py at 02a5808, assert",
            ),
            _groups(
                32,
                64,
                128,
                because="Marlin's kernels have these group sizes",
                source="SGLang marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES",
            ),
        ),
        container=True,
    ),
    Engine(
        "tensorrt-llm",
        "as of pull request 15485",
        "2026-08-22",
        "read",
        (
            _NO_UPCYCLED,
            Rule(
                "granularity",
                "layer",
                "the experts of a layer have a single format",
                "TensorRT-LLM pull request 15485",
            ),
            _widths(
                4,
                16,
                because="integer weights in groups come as INT4 AWQ (W4A16)",
                source="Model-Optimizer config.py at 01f3554, table of formats",
            ),
            _zeros(
                "none",
                because="ModelOpt's weight quantizers, which it reads, are symmetric",
                source="Model-Optimizer config.py at 01f3554, QuantizerAttributeConfig",
            ),
            _groups(
                128, because="INT4 AWQ has blocks of 128", source="Model-Optimizer INT4_AWQ_CFG"
            ),
        ),
    ),
    Engine(
        "modelopt",
        "main at 01f3554",
        "2026-11-30",
        "read",
        (
            Rule(
                "granularity",
                "layer",
                "export writes one format for all experts of a layer",
                "Model-Optimizer pull request 1979",
            ),
            _NO_PRUNING,
            _zeros(
                "none",
                because="integer weight quantizers are symmetric",
                source="Model-Optimizer config.py at 01f3554, QuantizerAttributeConfig",
            ),
        ),
    ),
    Engine(
        "llama.cpp",
        "main at 311c2c9",
        "2026-11-30",
        "read",
        (
            _NO_UPCYCLED,
            Rule(
                "granularity",
                "tensor",
                "the experts of a layer are one tensor, of one type",
                "llama.cpp pull request 4927",
            ),
            _NO_PRUNING,
            Rule(
                "row_multiples",
                {2: 256, 3: 256, 4: 256, 8: 32},
                "a row is whole blocks, or llama-quantize takes another type without asking",
                "llama.cpp src/llama-quant.cpp, convert_incompatible_tensor",
            ),
        ),
        stored={2: 2.625, 3: 3.4375, 4: 4.5, 8: 8.5, 16: 16.0},
    ),
    Engine(
        "mlx",
        "mlx-lm main at 003da2e",
        "2026-11-30",
        "read",
        (
            _NO_UPCYCLED,
            Rule(
                "granularity",
                "tensor",
                "the experts of a layer are one `switch_mlp` tensor per matrix",
                "mlx-lm mlx_lm/models/mixtral.py, sanitize",
            ),
            _NO_PRUNING,
            _groups(
                32,
                64,
                128,
                because="affine quantization has these group sizes",
                source="MLX documentation of mlx.core.quantize",
            ),
        ),
    ),
)
"""Every engine and tool, dmpq first."""

NAMES: Final = tuple(engine.name for engine in ENGINES)


def engine_named(name: str) -> Engine:
    """Return an engine by name.

    Raises:
        InputError: If there is none of that name.
    """
    for engine in ENGINES:
        if engine.name == name:
            return engine
    raise unknown("engine", name, NAMES)


_INTRODUCTION: Final = """# What engines can load

Made by `python -m dmpq.export --rules`; do not edit.

`python -m dmpq.export bitmap.json --check ENGINE` judges a bit map by these rules, and finds the
nearest map that breaks none. *Run* means that the rules were tried out with the tool, *read* that
its source was read. What a table does not say is not checked.
""".splitlines()


def rules_page() -> str:
    """Return docs/engines.md: every engine, and every rule with its source."""
    lines = [*_INTRODUCTION, "", "| engine | version | when | how | uniform container |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for engine in ENGINES:
        container = "yes" if engine.container else ""
        lines.append(
            f"| {engine.name} | {engine.version} | {engine.read} | {engine.how} | {container} |"
        )
    for engine in ENGINES:
        lines += ["", f"## {engine.name}", ""]
        if not engine.rules:
            lines.append("Loads every map.")
            continue
        lines += ["| rule | allowed | because | source |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {rule.kind.replace('_', ' ')} | {_allowed_text(rule)} | {rule.because} | "
            f"{rule.source} |"
            for rule in engine.rules
        ]
        if engine.stored:
            sizes = ", ".join(f"{bits}: {size:g}" for bits, size in engine.stored.items())
            lines += ["", f"Bits per weight of its own formats, by width: {sizes}."]
    return "\n".join(lines) + "\n"


def _allowed_text(rule: Rule) -> str:
    if isinstance(rule.allowed, str) and rule.kind == "architecture":
        return rule.allowed
    if isinstance(rule.allowed, str):
        return f"one format per {rule.allowed}"
    if isinstance(rule.allowed, Mapping):
        return ", ".join(f"{bits} bits: {multiple}" for bits, multiple in rule.allowed.items())
    return ", ".join(map(str, sorted(rule.allowed, key=str if _is_text(rule) else int)))


def _is_text(rule: Rule) -> bool:
    return rule.kind == "zero_points"
