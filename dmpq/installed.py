"""The MoE families of the installed transformers, told from its source: no model is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

ADAPTED: Final = {
    "dbrx": "three matrices of all experts' rows",
    "llama4": "inputs scaled by the router",
    "nllb_moe": "encoder-decoder, a module per expert",
    "switch_transformers": "encoder-decoder, a module per expert",
}
"""Families outside the experts interface that have an adapter, and what it makes up for."""

REFUSED: Final = {
    "diffusion_gemma": "it fills blocks of text in several passes and predicts no next token",
    "doge": "its experts are rows of embeddings, with no matrices to quantize in groups",
    "jetmoe": "its attention is a mixture of experts too, by layers that no other weights can be "
    "given to",
    "longcat_flash": "its router also selects experts that have no weights and copy their input",
    "step3p7": "its experts run by code of their own, which no other weights can be given to",
    "vitpose_backbone": "it finds joints in pictures and reads no text",
}
"""Families with experts that are refused, and why."""

OUTSIDE: Final = "it keeps its experts outside transformers' experts interface"
_DECORATED: Final = re.compile(r"@use_experts_implementation(?:\(([^)]*)\))?\s+class (\w+)")
_CLASS: Final = re.compile(r"^class ", re.MULTILINE)
_EXPERTS: Final = re.compile(
    r"^class \w*(?:Experts|MoE|Moe|SparseMLP|MoeBlock)\w*\(", re.MULTILINE
)
_FLAGS: Final = {
    "is_transposed=True": "transposed",
    "is_concatenated=False": "interleaved",
    "has_bias=True": "biases",
    "has_gate=False": "ungated",
    "has_post_expert_norm=True": "post-norm",
}


@dataclass(frozen=True)
class Family:
    """One model folder of transformers that has experts.

    Attributes:
        name: Of the folder; model types of its configs may have endings such as ``_text``.
        interface: Whether its experts use transformers' experts interface.
        traits: What is not as in most families, such as ``"transposed"``; or the adapter's work.
        refused: Why none of its models are taken; empty where they are.
    """

    name: str
    interface: bool
    traits: tuple[str, ...]
    refused: str = ""

    @property
    def support(self) -> str:
        """How the family is supported, in a word or two."""
        if self.refused:
            return "refused"
        return "interface" if self.interface else "own adapter"

    @property
    def description(self) -> str:
        """What the support rests on, or why there is none."""
        return self.refused or ", ".join(self.traits or ("standard",))


def folder() -> Path:
    """Return the folder of the installed transformers' models."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


def families(root: Path | None = None) -> tuple[Family, ...]:
    """Return the families with experts, by name.

    Args:
        root: Folder with one folder per family; that of the installed transformers by default.
    """
    places = sorted(path for path in (root or folder()).iterdir() if path.is_dir())
    return tuple(family for place in places if (family := _read(place)) is not None)


def _read(place: Path) -> Family | None:
    name = place.name
    source = "".join(path.read_text("utf-8") for path in sorted(place.glob("modeling_*.py")))
    decorated = _DECORATED.findall(source)
    if not decorated:
        if not _EXPERTS.search(source):
            return None
        if name in ADAPTED:
            return Family(name, False, (ADAPTED[name], *_parts(place)))
        return Family(name, False, (), REFUSED.get(name, OUTSIDE))
    traits = [_FLAGS[flag] for flag in _FLAGS if any(flag in flags for flags, _ in decorated)]
    bodies = [_CLASS.split(source.partition(f"class {cls}(")[2])[0] for _, cls in decorated]
    if any("def _apply_gate" in body for body in bodies) and "interleaved" not in traits:
        traits.append("custom gate")
    return Family(name, True, (*traits, *_parts(place)), REFUSED.get(name, ""))


def _parts(place: Path) -> list[str]:
    """Return what a family reads beside text."""
    config = "".join(path.read_text("utf-8") for path in place.glob("configuration_*.py"))
    kinds = {"vision_config": "vision-language", "audio_config": "audio"}
    return [kind for key, kind in kinds.items() if f"{key}:" in config]
