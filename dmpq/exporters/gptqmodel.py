"""GPTQModel: ``QuantizeConfig``, whose ``dynamic`` overrides modules by regular expression.

Patterns are matched from the start (``pcre.match``) against un-fused module names; ``-:`` skips,
and negative patterns are tried first (GPTQModel 7.7.0, quantization/config.py,
``dynamic_get``). Before full names it is asked by names within a layer
(``mlp.experts.3.up_proj``; models/base.py, ``filter_not_quantize_module``), and what is skipped
there is skipped in every layer. Where a layer has one format, its pattern also matches the fused
name by which vLLM asks (``...experts``, vLLM auto_gptq.py).
"""

from __future__ import annotations

import re
from typing import Any

from dmpq.exporters.base import Exporter, number_pattern
from dmpq.exporters.plan import LayerPlan, Plan, leaves_of


def _configuration(plan: Plan) -> dict[str, Any]:
    bits, group = plan.commonest
    paths = [layer.names.path for layer in plan.layers]
    inside = dict.fromkeys(re.split(r"\.\d+\.", path)[-1] for path in paths)
    containers = "|".join(map(re.escape, dict.fromkeys([*paths, *inside])))
    dynamic: dict[str, dict[str, Any]] = {f"-:^(?!({containers})(\\.|$))": {}}
    positive: dict[str, dict[str, Any]] = {}
    for layer in plan.layers:
        for parts, groups in layer.by_format.items():
            alone = len(groups) == 1 and parts == layer.parts
            for (fmt, size), experts in groups.items():
                pattern = _pattern(layer, parts, experts, fused=alone)
                if fmt.is_full:
                    dynamic[f"-:{pattern}"] = {}
                elif (fmt.bits, size) != (bits, group):
                    positive[f"+:{pattern}"] = {"bits": fmt.bits, "group_size": size}
    return {
        "bits": bits,
        "group_size": group,
        "sym": plan.symmetric,
        "desc_act": False,
        "dynamic": {**dynamic, **positive},
    }


def _pattern(layer: LayerPlan, parts: tuple[str, ...], experts: list[int], *, fused: bool) -> str:
    path = re.escape(layer.names.path)
    if fused:
        return f"^{path}(\\..*)?$"
    leaves = "|".join(leaves_of(layer.names.modules[0], parts))
    return f"^{path}\\.{number_pattern(experts)}\\.({leaves})$"


EXPORTER = Exporter(
    "gptqmodel",
    "JSON of QuantizeConfig's arguments: QuantizeConfig(**json.load(file)); modules outside the "
    "experts are skipped",
    _configuration,
)
