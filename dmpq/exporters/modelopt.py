"""NVIDIA ModelOpt: ``quant_cfg``, an ordered list of wildcards on quantizers' names.

Later entries override earlier ones, and the first disables everything (Model-Optimizer
modelopt/torch/quantization/config.py at 01f3554). The experts of a layer are one module, whose
quantizers are numbered by expert (``down_proj_weight_quantizers.3``). Run by 0.47.0
(tests/test_export_tools.py).
"""

from __future__ import annotations

from typing import Any

from dmpq.exporters.base import Exporter
from dmpq.exporters.plan import Plan


def _configuration(plan: Plan) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in plan.layers:
        for groups in layer.by_format.values():
            for fmt, size in groups:
                if fmt.is_quantized:
                    name = f"{layer.names.path}.*weight_quantizer*"
                    cfg = {"num_bits": fmt.bits, "block_sizes": {"-1": size, "type": "static"}}
                    entries.append({"quantizer_name": name, "cfg": cfg, "enable": True})
    return {"quant_cfg": entries, "algorithm": "max"}


EXPORTER = Exporter(
    "modelopt",
    "JSON of mtq.quantize's config; give block_sizes the integer key -1 after reading it",
    _configuration,
)
