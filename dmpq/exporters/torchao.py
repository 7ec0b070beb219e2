"""torchao: an ``FqnToConfig`` for a model whose experts are ``nn.Linear`` modules.

Patterns are matched in full (``re.fullmatch``), in order. Transformers keeps experts in 3-D
parameters, which integer weights in groups do not support (torchao 0.18): un-fuse them first.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

from dmpq.exporters.base import Exporter, number_pattern
from dmpq.exporters.plan import Plan, leaves_of


def _configuration(plan: Plan) -> dict[str, Any]:
    import torch
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup

    mapping = MappingType.SYMMETRIC if plan.symmetric else MappingType.ASYMMETRIC
    configs: OrderedDict[str, Any] = OrderedDict()
    for layer in plan.layers:
        path = re.escape(layer.names.path)
        for parts, groups in layer.by_format.items():
            leaves = "|".join(leaves_of(layer.names.modules[0], parts))
            for (fmt, size), experts in groups.items():
                if fmt.is_quantized:
                    dtype = vars(torch)[f"int{fmt.bits}"]
                    config = IntxWeightOnlyConfig(dtype, PerGroup(size), mapping)
                    configs[f"re:{path}\\.{number_pattern(experts)}\\.({leaves})"] = config
    document: dict[str, Any] = config_to_dict(FqnToConfig(configs))
    return document


EXPORTER = Exporter(
    "torchao",
    "JSON of torchao.core.config.config_to_dict: quantize_(model, config_from_dict(...), "
    "filter_fn=None) on a model with un-fused experts",
    _configuration,
)
