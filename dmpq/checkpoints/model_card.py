"""The README.md of a quantized checkpoint: what it is, how it loads, what it measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from dmpq.bitmap import PROJECTIONS, BitMap

_SHOWN: Final[Mapping[str, str]] = {
    "effective_bits": "bits per expert weight, scales and zero-points included",
    "heldout_kl": "KL to the full-precision model on held-out text",
    "heldout_perplexity": "perplexity there",
    "memory": "memory of the weights and the KV cache, computed",
    "latency": "time of a step, computed",
    "energy": "energy of a step, computed",
}


def model_card(bitmap: BitMap, *, sizes: Mapping[str, int]) -> str:
    """Return the card, as Markdown with the hub's metadata.

    Args:
        bitmap: The map that was applied.
        sizes: What is compared → bytes on disk.
    """
    model, search, hardware = bitmap.model, bitmap.search, bitmap.hardware
    symmetric = "symmetric" if bitmap.menu.symmetric else "asymmetric"
    lines = [
        "---",
        f"base_model: {model['id']}",
        "base_model_relation: quantized",
        "library_name: transformers",
        "tags: [dmpq, moe, mixed-precision, quantized]",
        "---",
        "",
        f"# {model['id']}, a bit-width for every expert",
        "",
        f"{model['architecture']} whose {bitmap.geometry.num_experts} experts are quantized each "
        f"to its own width ({bitmap.menu.quantizer.upper()}, {symmetric}); everything else is "
        "as it was.",
        "",
        "```python",
        "import dmpq.hf  # pip install dmpq",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        "| size on disk | MB |",
        "| --- | ---: |",
        *(f"| {name} | {size / 1e6:,.1f} |" for name, size in sizes.items()),
        "",
        "| measured when the map was made | |",
        "| --- | ---: |",
        *_metrics(bitmap),
        "",
        f"Costs are of {hardware['name']} ({hardware['stack']}), at the widths of "
        f"{hardware['cost_geometry']}; held-out text: {bitmap.text['heldout_tokens']:,} tokens of "
        f"{bitmap.text['dataset']}.",
        "",
        "| experts at | " + " | ".join(PROJECTIONS) + " |",
        "| --- |" + " ---: |" * len(PROJECTIONS),
        *_widths(bitmap),
        "",
        f"Found by `{search['agent']}` (seed {search['seed']}, {search['evaluations']} "
        f"evaluations); the whole map is `bitmap.json`. Quantized weights: "
        f"`{model['fingerprint']}`.",
    ]
    return "\n".join(lines) + "\n"


def _metrics(bitmap: BitMap) -> list[str]:
    found = {**bitmap.metrics["predicted"], **bitmap.metrics["measured"]}
    return [
        f"| {text} | {found[name]['value']:.6g} {found[name]['unit']} |"
        for name, text in _SHOWN.items()
        if name in found
    ]


def _widths(bitmap: BitMap) -> list[str]:
    counts = []
    for projection in PROJECTIONS:
        keys: Counter[str] = Counter()
        for given in bitmap.assignment.values():
            keys.update(given[projection] if isinstance(given, Mapping) else given)
        counts.append(keys)
    return [
        f"| `{key}` | " + " | ".join(str(count[key]) for count in counts) + " |"
        for key in bitmap.menu.keys
        if any(count[key] for count in counts)
    ]
