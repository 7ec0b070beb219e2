"""compressed-tensors: ``config_groups``, one per format, with anchored targets.

Targets that begin with ``re:`` are matched from the start (``re.match``), so that each ends in
``$``. Where names on disk differ from those of modules (Mixtral), both are targets: llm-compressor
asks by module, readers of the checkpoint by its names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from dmpq.exporters.base import Exporter, number_pattern
from dmpq.exporters.plan import LayerPlan, Plan, leaves_of

Key = tuple[int, int]


def weights(bits: int, group: int, *, symmetric: bool) -> dict[str, Any]:
    """Return the arguments of integer weights in groups."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    }


def quantization_config(groups: dict[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a packed checkpoint from its config groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def _configuration(plan: Plan) -> dict[str, Any]:
    targets: dict[Key, list[str]] = defaultdict(list)
    for layer in plan.layers:
        for parts, groups in layer.by_format.items():
            for (fmt, size), experts in groups.items():
                if fmt.is_quantized:
                    targets[fmt.bits, size] += _targets(layer, parts, experts)
    return quantization_config(
        {
            f"group_{index}": {
                "targets": found,
                "weights": weights(bits, size, symmetric=plan.symmetric),
                "format": "pack-quantized",
            }
            for index, ((bits, size), found) in enumerate(sorted(targets.items()))
        }
    )


def _targets(layer: LayerPlan, parts: tuple[str, ...], experts: list[int]) -> list[str]:
    def target(parent: str, leaves: list[str]) -> str:
        numbers = number_pattern(experts)
        return f"re:^{re.escape(parent)}\\.{numbers}\\.({'|'.join(leaves)})$"

    names = layer.names
    found = [target(names.path, leaves_of(names.modules[0], parts))]
    if not names.fused:
        on_disk = target(names.disk_parent, leaves_of(names.disk[0], parts))
        found += [on_disk] if on_disk not in found else []
    return found


EXPORTER = Exporter(
    "compressed-tensors",
    "JSON of a quantization_config; its config_groups are also those of llm-compressor's "
    "QuantizationModifier",
    _configuration,
)
