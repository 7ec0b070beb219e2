"""Bit maps of tiny models and of bare geometries, for the tests of exporters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from factories import make_spec

from dmpq.bitmap import BitMap, assignment_from
from dmpq.formats import Menu
from dmpq.spec import ModelSpec


def spec_of(model_type: str, path: str, *, gated: bool = True, experts: int = 12) -> ModelSpec:
    """Return a geometry whose containers are at ``path``, with ``{}`` for the layer."""
    spec = make_spec(layers=2, experts=experts)
    layers = tuple(
        replace(layer, path=path.format(number), gated=gated)
        for number, layer in enumerate(spec.moe_layers)
    )
    return replace(spec, model_type=model_type, moe_layers=layers)


def bitmap_of(
    spec: ModelSpec,
    menu: Menu,
    *,
    architecture: str,
    fingerprint: str = "0" * 64,
    pairs: Any = None,
    seed: int = 0,
) -> BitMap:
    """Return a map; random where ``pairs`` (N, 2), menu indices, are not given."""
    if pairs is None:
        chosen = np.random.default_rng(seed).integers(0, len(menu), spec.num_experts)
        pairs = np.stack([chosen, chosen], 1)
    pairs = np.asarray(pairs)
    split = bool((pairs[:, 0] != pairs[:, 1]).any())
    return BitMap(
        model={
            "id": "x",
            "revision": None,
            "architecture": architecture,
            "fingerprint": fingerprint,
        },
        geometry=spec,
        menu=menu,
        assignment=assignment_from(spec, menu, pairs.ravel() if split else pairs[:, 0]),
        objective={"weights": {"acc": 1.0}, "signal": "kl"},
        constraints={"avg_bits": 3.0},
        hardware={
            "name": "a100",
            "stack": "sglang",
            "calibrated": False,
            "source": "x",
            "cost_geometry": "own",
        },
        workload={"phase": "decode", "batch": 1, "context": 16},
        text={"dataset": "x", "sequence_length": 2, "heldout_tokens": 1},
        serve="projection" if split else "expert",
        metrics={"predicted": {}, "measured": {}},
        search={"agent": "x", "seed": 0, "evaluations": 1, "tokens": 0.0},
    )


def widths_of(bitmap: BitMap) -> dict[str, int]:
    """Return un-fused module → bits, as the map means it."""
    found: dict[str, int] = {}
    for layer in bitmap.geometry.moe_layers:
        keys = bitmap.assignment[layer.path]
        for expert in range(layer.num_experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                if leaf == "gate_proj" and not layer.gated:
                    continue
                side = "down" if leaf == "down_proj" else "gate_up"
                own = keys[side] if isinstance(keys, dict) else keys
                found[f"{layer.path}.{expert}.{leaf}"] = int(own[expert].partition("g")[0])
    return found
