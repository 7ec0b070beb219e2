"""llama.cpp: a ``llama-quantize`` command with one ``--tensor-type`` per tensor of experts.

Names are searched for by regular expression in lower case (llama.cpp src/llama-quant.cpp); the
experts of a layer are one tensor each for gate, up and down (``blk.N.ffn_gate_exps.weight``).
Types hold their own scales: ``q4_k`` has 4.5 bits per weight. Names and types are those of the
package gguf 0.19.0 (tests/test_export_gguf.py); the command itself was read, not run.
"""

from __future__ import annotations

import re
import shlex
from typing import Final

from dmpq.errors import InputError
from dmpq.exporters.base import Exporter
from dmpq.exporters.names import DOWN, GATE, UP
from dmpq.exporters.plan import LayerPlan, Plan

_TYPES: Final = {2: "q2_k", 3: "q3_k", 4: "q4_k", 8: "q8_0", 16: "bf16"}
_TENSORS: Final = {GATE: "gate", UP: "up", DOWN: "down"}
_OTHERS: Final = "Q8_0"
"""Type of every other tensor: overrides are only read where the default is quantized."""


def _command(plan: Plan) -> str:
    lines = ["llama-quantize \\"]
    for layer in plan.layers:
        number = _layer_number(layer)
        for parts, groups in layer.by_format.items():
            ((fmt, _),) = groups
            tensors = "|".join(_TENSORS[part] for part in parts)
            pattern = f"^blk\\.{number}\\.ffn_({tensors})_exps\\.weight$={_TYPES[fmt.bits]}"
            lines.append(f"  --tensor-type {shlex.quote(pattern)} \\")
    lines.append(f"  model-f16.gguf model-mixed.gguf {_OTHERS}")
    return "\n".join(lines) + "\n"


def _layer_number(layer: LayerPlan) -> int:
    found = re.findall(r"(?<=\.)\d+(?=\.)", f".{layer.names.path}.")
    if len(found) != 1:
        raise InputError(
            f"{layer.names.path} holds {len(found)} numbers, and llama.cpp knows layers by one; "
            "--to llama.cpp takes models with one container of experts per layer."
        )
    return int(found[0])


EXPORTER = Exporter(
    "llama.cpp",
    "a llama-quantize command; put your own GGUF files in the last line, where other tensors get "
    "Q8_0",
    _command,
)
