"""The two layouts in which this project's measured points were published, and their words.

``moe_points.csv`` (MoE layers and whole models) and ``kernel_speedups.csv`` (matrix products) name
devices, models and precisions in their sources' words. Where a source does not say how long its
prompts were, :data:`PROMPT_TOKENS` is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from dmpq.errors import InputError
from dmpq.hw_models.points import (
    PRECISIONS,
    Kind,
    Outside,
    Point,
    Precision,
    matrix_shape,
    number,
)

PROMPT_TOKENS: Final = 512
"""Assumed length of a prompt whose source states none; the context adds half the mean output."""

_POINT_COLUMNS: Final = (
    "id",
    "kind",
    "model",
    "hardware",
    "n_dev",
    "precision",
    "batch_or_tokens",
    "context_tokens",
    "metric",
    "value",
    "power_w",
    "J_per_token",
    "source",
)
_SPEEDUP_COLUMNS: Final = (
    "kernel",
    "weight_bits",
    "group",
    "shape",
    "gpu",
    "M",
    "speedup_vs_fp16",
)
_KINDS: Final[Mapping[str, Kind]] = {
    "moe_layer_kernel": "moe_layer",
    "e2e_decode": "decode",
    "e2e_decode_dense": "decode",
    "e2e_prefill": "prefill",
}
_MILLISECONDS: Final = ("ms", "median_ITL_ms")
_RATE: Final = "tokens_per_s"
_DEVICES: Final = {
    "H100 SXM 80GB": "h100",
    "H100 SXM": "h100",
    "H100": "h100",
    "A100 SXM 80GB": "a100",
    "A100 80GB (330 W cap)": "a100",
    "A100": "a100",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
    "RTX 3060": "rtx3060",
    "Apple M2 Max 38-core GPU 96GB": "m2-max",
}
_MODELS: Final = {
    "Mixtral-8x7B": "mixtral-8x7b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen3-Coder-30B-A3B": "qwen3-30b-a3b",
    "gpt-oss-20b": "gpt-oss-20b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "Qwen3-32B": "qwen3-32b",
}
_PRECISIONS: Final = {
    **PRECISIONS,
    "bfloat16": PRECISIONS["bf16"],
    "int4_wo": PRECISIONS["int4"],
    "int8 weight-only": PRECISIONS["int8"],
    "MXFP4": PRECISIONS["mxfp4"],
}
_STACKS: Final = (
    (r"/moe/(\w+) ", r"\1"),
    (r"; vLLM", "vllm"),
    (r"gpt-fast", "gpt-fast"),
    (r"llama\.cpp|geerlingguy/ai-benchmarks", "llama.cpp"),
)
_KERNELS: Final = {
    "gemlite": "gemlite",
    "marlin(vLLM)": "marlin",
    "torchao tinygemm": "torchao",
    "torchao int8 weight-only": "torchao",
}
_WHOLE_SYSTEM: Final = "whole-system power"


def _point(row: Mapping[str, Any], _: str) -> Point | Outside:
    """Return the point of a row of ``moe_points.csv``."""
    text = {column: str(row[column]).strip() for column in _POINT_COLUMNS}
    name = f"row {text['id']}"
    what = f"{text['model']}, {text['hardware']}, {text['precision']}"
    kind = _KINDS.get(text["kind"])
    if kind is None:
        raise InputError(f"kind is {text['kind'][:40]!r}; it must be one of {', '.join(_KINDS)}")
    if text["metric"] not in (*_MILLISECONDS, _RATE):
        raise InputError(
            f"metric is {text['metric'][:40]!r}; it must be one of "
            f"{', '.join((*_MILLISECONDS, _RATE))}"
        )
    value, batch = number(row, "value"), max(1, round(number(row, "batch_or_tokens")))
    model = re.sub(r" MoE layer| \(dense anchor\)", "", text["model"])
    stored = _PRECISIONS.get(re.sub(r" \([\d.]+ GiB\)", "", text["precision"]))
    stack = next((m.expand(to) for at, to in _STACKS if (m := re.search(at, text["source"]))), "")
    for reason, wrong in (
        ("no device file for this part", text["hardware"] not in _DEVICES),
        ("no geometry of this model", model not in _MODELS),
        ("a width that no menu has", stored is None),
        ("more than one device", text["n_dev"] != "1"),
        ("the source names no kernel stack", not stack),
    ):
        if wrong:
            return Outside(name, what, reason)
    assert stored is not None
    if kind == "prefill":  # its batch column holds the tokens of one prompt
        context, sequences = batch, 1
    elif kind == "decode":
        context, sequences = _context(text["context_tokens"]), batch
    else:
        context, sequences = 0, batch
    tokens = context * sequences if kind == "prefill" else sequences
    measured = text["power_w"] and _WHOLE_SYSTEM not in text["source"]
    return Point(
        name=name,
        kind=kind,
        device=_DEVICES[text["hardware"]],
        stack=stack,
        model=_MODELS[model],
        precision=stored,
        batch=sequences,
        context=context,
        value=tokens / value if text["metric"] == _RATE else value / 1e3,
        power_w=number(row, "power_w") if measured else None,
        source=text["source"],
    )


def _context(words: str) -> int:
    """Return the mean tokens in the cache while a source's answers are written."""
    output = re.fullmatch(r"avg_output=(\d+)", words)
    if output:
        return PROMPT_TOKENS + int(output[1]) // 2
    generated = re.fullmatch(r"tg(\d*)", words)
    if generated:  # llama-bench, from an empty cache; 128 tokens unless it says otherwise
        return int(generated[1] or 128) // 2
    if words == "~5 prompt":  # gpt-fast, which then writes 200 tokens
        return 105
    raise InputError(
        f"context_tokens is {words[:40]!r}; it must be 'avg_output=N', 'tgN' or '~5 prompt'"
    )


def _speedup(row: Mapping[str, Any], name: str) -> Point | Outside:
    """Return the point of a row of ``kernel_speedups.csv``."""
    text = {column: str(row[column]).strip() for column in _SPEEDUP_COLUMNS}
    what = f"{text['kernel']} {text['weight_bits']} bits, {text['shape']}, {text['gpu']}"
    value, rows = number(row, "speedup_vs_fp16"), int(number(row, "M", whole=True))
    bits = int(number(row, "weight_bits", whole=True))
    _ = matrix_shape(text["shape"])
    for reason, wrong in (
        ("no device file for this part", text["gpu"] not in _DEVICES),
        ("a kernel that no stack has", text["kernel"] not in _KERNELS),
        ("a width that no menu has", bits not in (2, 3, 4, 8)),
    ):
        if wrong:
            return Outside(name, what, reason)
    whole_rows = text["group"] == "per-channel"
    group = None if whole_rows else int(number(row, "group", whole=True))
    stored = Precision(f"{bits}g1048576", symmetric=True) if whole_rows else _grouped(bits, group)
    return Point(
        name=name,
        kind="speedup",
        device=_DEVICES[text["gpu"]],
        stack=_KERNELS[text["kernel"]],
        model=text["shape"],
        precision=stored,
        batch=rows,
        context=0,
        value=value,
        source="published chart",
    )


def _grouped(bits: int, group: int | None) -> Precision:
    return Precision(str(bits) if group == 128 else f"{bits}g{group}")


LAYOUTS: Final[Mapping[tuple[str, ...], Callable[[Mapping[str, Any], str], Point | Outside]]] = {
    _POINT_COLUMNS: _point,
    _SPEEDUP_COLUMNS: _speedup,
}
