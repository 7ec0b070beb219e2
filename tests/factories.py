"""Synthetic profiles and problems: no model, no file, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dmpq.bitmap import BitMap, assignment_from
from dmpq.formats import Menu
from dmpq.hw_models import load_hardware
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile
from dmpq.spec import ModelSpec, MoELayer

FULL_NLL = 2.5


def make_spec(*, layers: int = 2, experts: int = 8, hidden: int = 256) -> ModelSpec:
    """Return a small OLMoE-like geometry."""
    return ModelSpec(
        name="synthetic",
        model_type="olmoe",
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        vocab_size=512,
        tie_word_embeddings=False,
        dense_intermediate_size=0,
        moe_layers=tuple(
            MoELayer(f"model.layers.{i}.mlp.experts", experts, min(2, experts), hidden, hidden)
            for i in range(layers)
        ),
    )


def make_profile(
    *,
    layers: int = 2,
    experts: int = 8,
    seed: int = 0,
    bits: str = "2,3,4,8,16",
    unhit: int = 0,
    projections: bool = True,
) -> Profile:
    """Return a profile whose damage falls by about 4 per bit and differs widely among experts.

    Args:
        layers: MoE layers.
        experts: Experts per layer.
        seed: Seed of everything random.
        bits: Menu.
        unhit: Number of experts, the last ones, that calibration never hit.
        projections: Whether projections have sensitivities of their own.
    """
    rng = np.random.default_rng(seed)
    spec, menu = make_spec(layers=layers, experts=experts), Menu.parse(bits)
    count, tokens = spec.num_experts, 4096
    frequency = np.concatenate(
        [rng.dirichlet(np.full(experts, 2.0)) * min(2, experts) for _ in range(layers)]
    ).clip(1e-3, 1.0)
    hit = np.arange(count) < count - unhit
    frequency = frequency * hit
    curve = np.where(menu.bits == 16, 0.0, 4.0 ** (2.0 - menu.bits))
    jitter = np.exp(rng.normal(0, 0.15, (count, 2, len(menu))))
    scale = np.exp(rng.normal(-6, 1.2, (count, 1, 1))) * hit[:, None, None]
    both = scale * jitter * curve * np.array([0.6, 0.4])[:, None]
    single = both.sum(1)

    def positive() -> np.ndarray:
        return np.exp(rng.normal(0, 0.5, count))

    return Profile(
        spec=spec,
        menu=menu,
        tokens=tokens,
        text="synthetic",
        fingerprint="0" * 64,
        full_nll=FULL_NLL,
        cost_tokens=float(tokens * 3),
        hits=np.round(frequency * tokens).astype(np.int64),
        frequency=frequency,
        routing_weight=frequency * 0.4,
        contribution=positive() * hit,
        sensitivity=single,
        projection_sensitivity=both if projections else None,
        output_error=single * 10,
        proxy=single * positive()[:, None],
        weight_norm=positive(),
        kurtosis=rng.normal(0, 1, count),
        outlier_ratio=positive() * 5,
        max_row_variance=positive(),
        router_norm=positive(),
        router_norm_change=np.full(count, np.nan),
        uniform_kl=single.sum(0) * 1.2,
    )


def make_problem(
    *,
    layers: int = 2,
    experts: int = 8,
    seed: int = 0,
    bits: str = "2,3,4,8,16",
    unhit: int = 0,
    projections: bool = True,
    hw: str = "a100",
    avg_bits: float | None = 3.0,
    memory_bytes: float | None = None,
    latency_s: float | None = None,
    energy_j: float | None = None,
    weights: str = "acc=1,lat=0.1,mem=0.1,eng=0.1",
    **options: Any,
) -> Problem:
    """Return a problem on a synthetic profile; ``options`` are those of :class:`Problem`."""
    profile = make_profile(
        layers=layers,
        experts=experts,
        seed=seed,
        bits=bits,
        unhit=unhit,
        projections=projections,
    )
    return Problem(
        profile=profile,
        hardware=load_hardware(hw),
        weights=Weights.parse(weights),
        constraints=Constraints(
            avg_bits=avg_bits, memory_bytes=memory_bytes, latency_s=latency_s, energy_j=energy_j
        ),
        **{"cost_spec": profile.spec, **options},
    )


def write_bitmap(folder: Path) -> Path:
    """Write a bit map of a synthetic problem, and its profile beside it; returns the bit map."""
    problem = make_problem()
    chosen = problem.mckp()
    cost = problem.costs(chosen[None])
    file = folder / "bitmap.json"
    BitMap(
        model={"id": "x", "revision": None, "architecture": "X", "fingerprint": "0" * 64},
        geometry=problem.spec,
        menu=problem.menu,
        assignment=assignment_from(problem.spec, problem.menu, chosen),
        objective={"weights": {"acc": 1.0}, "signal": "kl"},
        constraints={"avg_bits": 3.0},
        hardware={
            "name": "a100",
            "stack": "sglang",
            "calibrated": False,
            "source": "x",
            "cost_geometry": "own",
        },
        workload={"phase": "decode", "batch": 2, "context": 128},
        text={"dataset": "x", "sequence_length": 2, "heldout_tokens": 1},
        serve="expert",
        metrics={
            "predicted": {"latency": {"value": float(cost.latency_s[0]), "unit": "s"}},
            "measured": {},
        },
        search={"agent": "x", "seed": 0, "evaluations": 1, "tokens": 0.0},
        versions={"dmpq": "0"},
        git_revision=None,
    ).write(file)
    problem.profile.save(folder / "profile.safetensors")
    return file
