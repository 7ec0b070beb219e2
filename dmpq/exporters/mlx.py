"""MLX-LM: the ``quantization`` of config.json, with an entry per layer and matrix.

Experts are one ``switch_mlp`` module per matrix, where the checkpoint on disk has its experts
(mlx-lm mlx_lm/models/mixtral.py, ``sanitize``; utils.py, ``class_predicate``). Run by mlx-lm
0.32.2 on OLMoE and Mixtral (tests/test_export_tools.py).
"""

from __future__ import annotations

from typing import Any

from dmpq.errors import InputError
from dmpq.exporters.base import Exporter
from dmpq.exporters.plan import Plan


def _configuration(plan: Plan) -> dict[str, Any]:
    bits, group = plan.commonest
    entries: dict[str, Any] = {}
    for layer in plan.layers:
        if layer.names.fused:
            raise InputError(
                f"{plan.bitmap.model['architecture']} keeps the experts of a layer in one tensor "
                "on disk, and mlx-lm's names for those were not read; use --to dequantized."
            )
        block = layer.names.disk_parent.removesuffix(".experts")
        for parts, groups in layer.by_format.items():
            ((fmt, size),) = groups
            entry = {"group_size": size, "bits": fmt.bits} if fmt.is_quantized else False
            for part in parts:
                entries[f"{block}.switch_mlp.{part}_proj"] = entry
    return {"quantization": {"group_size": group, "bits": bits, **entries}}


EXPORTER = Exporter(
    "mlx",
    "JSON to merge into config.json: mlx_lm's quantization with an entry per layer's matrix",
    _configuration,
)
