"""AutoRound: ``layer_config`` with one entry per matrix, by its full name.

A key that is no module's exact name would be searched for anywhere (AutoRound 0.16.1), so that
``experts.1`` also means ``experts.10``: names are full, and never patterns.
"""

from __future__ import annotations

from typing import Any

from dmpq.exporters.base import Exporter
from dmpq.exporters.plan import Plan
from dmpq.formats import FULL_WIDTH


def _configuration(plan: Plan) -> dict[str, Any]:
    layer_config: dict[str, dict[str, Any]] = {}
    for layer in plan.layers:
        for expert, matrices in enumerate(layer.names.modules):
            for part in layer.parts:
                fmt = layer.format_of(expert, part)
                entry: dict[str, Any] = {"bits": fmt.bits}
                if fmt.is_quantized:
                    size = layer.group_of(expert, part)
                    entry |= {"group_size": size, "sym": plan.symmetric}
                layer_config[matrices[part]] = entry
    return {
        "bits": FULL_WIDTH,
        "group_size": plan.commonest[1],
        "sym": plan.symmetric,
        "layer_config": layer_config,
    }


EXPORTER = Exporter(
    "auto-round",
    "JSON of AutoRound's arguments: AutoRound(model, tokenizer, **json.load(file)); its default "
    "there is 16 bits, so that modules outside the experts stay as they are",
    _configuration,
)
