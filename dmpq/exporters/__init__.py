"""One file per tool: a bit map as the configuration that the tool takes."""

from __future__ import annotations

from typing import Final

from dmpq.exporters import (
    auto_round,
    compressed_tensors,
    gptqmodel,
    llama_cpp,
    mlx,
    modelopt,
    torchao,
)
from dmpq.exporters.base import Exporter

EXPORTERS: Final[dict[str, Exporter]] = {
    module.EXPORTER.name: module.EXPORTER
    for module in (
        gptqmodel,
        auto_round,
        compressed_tensors,
        torchao,
        modelopt,
        llama_cpp,
        mlx,
    )
}

__all__ = ["EXPORTERS", "Exporter"]
