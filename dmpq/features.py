"""What a policy sees of a problem: feature rows and a context, float32 in [-1, 1].

Positive statistics are standardised on a log scale by the median and the interquartile range of
the profile at hand and squashed by tanh, so that a row says how an expert stands among its
fellows; no other model takes part, and a policy can move to another profile. Zeros (an expert that
calibration never hit) become -1, what is unknown becomes 0. Every transform is monotone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import Menu
from dmpq.hw_models import Workload
from dmpq.objective import Baselines, Constraints, Weights
from dmpq.profile import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NORMAL_IQR: Final = 1.349
"""Interquartile range of a standard normal distribution."""

_LEAST_SPREAD: Final = 0.1
"""Spreads below this (10% on a log scale) are not blown up."""


def rows(
    profile: Profile,
    *,
    sensitivity: Floats,
    weights: Ints,
    mean: Callable[[Floats], Floats],
    projections: bool,
) -> dict[str, Floats]:
    """Return each decision's features, name → (D,) in [-1, 1].

    Where decisions are layers, statistics are means over their experts; ``projection`` is -1 for
    gate+up, 1 for down, and 0 for both.

    Args:
        profile: The experts' statistics.
        sensitivity: KL when only this decision is in a format, (D, B).
        weights: Number of weights that each decision covers, (D,).
        mean: Takes experts' values, (N,), to their means over each decision, (D,).
        projections: Whether decisions are projections, gate+up and down in turn.
    """
    spec = profile.spec
    last = max(len(spec.moe_layers) - 1, 1)
    return {
        "frequency": log_standardised(mean(profile.frequency)),
        "routing_weight": log_standardised(mean(profile.routing_weight)),
        "contribution": log_standardised(mean(profile.contribution)),
        **{
            f"sensitivity_{name}": log_standardised(column)
            for name, column in zip(format_names(profile.menu), sensitivity.T, strict=True)
        },
        "output_error": log_standardised(mean(profile.output_error[:, profile.menu.narrowest])),
        "proxy": log_standardised(mean(profile.proxy[:, profile.menu.narrowest])),
        "weight_norm": log_standardised(mean(profile.weight_norm)),
        "kurtosis": standardised(mean(profile.kurtosis)),
        "outlier_ratio": log_standardised(mean(profile.outlier_ratio)),
        "max_row_variance": log_standardised(mean(profile.max_row_variance)),
        "router_norm": log_standardised(mean(profile.router_norm)),
        "router_norm_change": standardised(mean(profile.router_norm_change)),
        "depth": signed_share(mean(spec.layer_of_expert.astype(np.float64)), last),
        "size": log_standardised(weights.astype(np.float64)),
        "projection": (
            np.tile([-1.0, 1.0], spec.num_experts) if projections else np.zeros(len(weights))
        ),
    }


def format_names(menu: Menu) -> tuple[str, ...]:
    """Return what a policy calls formats: their widths, and whole keys where two share a width.

    A policy may so move to a model whose matrices ask for other groups.
    """
    widths = [str(fmt.bits) for fmt in menu.formats]
    return tuple(widths) if len(set(widths)) == len(widths) else menu.keys


def context(
    profile: Profile,
    *,
    sizes: Ints,
    ratios: Floats,
    baselines: Baselines,
    constraints: Constraints,
    weights: Weights,
    workload: Workload,
) -> NDArray[np.float32]:
    """Return the problem as a whole, float32 (C,) in [-1, 1].

    The bit budget between the narrowest and the widest map; limits on memory, latency and energy
    relative to the baselines (1 for none); the reward's weights; each format's damage, latency,
    memory and energy, relative to the largest of each; phase, batch and context.

    Args:
        profile: The experts' statistics.
        sizes: Stored bits of each decision in each format, (D, B).
        ratios: Each decision's share of damage, latency, memory and energy, (D, B, 4).
        baselines: What the reward's terms are relative to.
        constraints: Upper limits.
        weights: Of the reward's terms.
        workload: What a step is.
    """
    given = constraints.given()
    least, most = (float(e.sum()) for e in (sizes.min(1), sizes.max(1)))
    budget = given.get("avg_bits", math.inf) * profile.spec.expert_parameters
    room = min(max((budget - least) / (most - least), 0.0), 1.0) if most > least else 1.0
    prices = (profile.uniform_kl, *ratios[:, :, 1:].mean(0).T)
    shares = [signed_share(p.clip(0), float(p.max()) if p.max() > 0 else 1.0) for p in prices]
    values = [
        2 * room - 1,
        squashed(given.get("memory_bytes", math.inf) / baselines.memory_bytes),
        squashed(given.get("latency_s", math.inf) / baselines.latency_s),
        squashed(given.get("energy_j", math.inf) / baselines.energy_j),
        *map(squashed, weights.as_array().tolist()),
        *np.concatenate(shares).tolist(),
        1.0 if workload.phase == "prefill" else -1.0,
        math.tanh(math.log2(workload.batch) / 8),
        math.tanh(math.log2(workload.context) / 16),
    ]
    clipped: NDArray[np.float32] = np.clip(values, -1, 1).astype(np.float32)
    return clipped


def log_standardised(values: Floats) -> Floats:
    """Return values that are not negative as (-1, 1), zeros as -1; shape kept.

    Args:
        values: (D,), for example frequencies.
    """
    scaled = np.full(values.shape, -1.0)
    positive = values > 0
    scaled[positive] = standardised(np.log(values[positive]))
    return scaled


def standardised(values: Floats) -> Floats:
    """Return ``tanh(z / 2)`` of the robust z-score, NaN as 0; shape kept."""
    known = values[np.isfinite(values)]
    if not known.size:
        return np.zeros(values.shape)
    low, middle, high = np.percentile(known, [25, 50, 75])
    spread = max((high - low) / _NORMAL_IQR, _LEAST_SPREAD)
    squashed_scores: Floats = np.nan_to_num(np.tanh((values - middle) / spread / 2), nan=0.0)
    return squashed_scores


def signed_share(part: Floats, whole: float) -> Floats:
    """Return a share in [0, 1] as [-1, 1]; shares outside are clipped."""
    share: Floats = np.clip(2 * part / whole - 1, -1, 1)
    return share


def squashed(ratio: float) -> float:
    """Return a ratio that is not negative as [-1, 1]: 0 where it is 1, 1 where it is infinite."""
    return 1 - 2 / (ratio + 1)
