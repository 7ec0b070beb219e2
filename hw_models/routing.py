"""How many experts a batch wakes, and how many tokens each then gets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.hw_models.base import Floats
from dmpq.spec import ModelSpec

_ROUNDING: float = 1e-9


def inclusion_probabilities(spec: ModelSpec, inclusion: NDArray[np.floating] | None) -> Floats:
    """Return the probability that a token selects each expert, shape (N,).

    Args:
        spec: Geometry of the model.
        inclusion: (N,), measured probabilities; ``None`` for ``top_k / E``.

    Raises:
        InputError: If the shape is wrong or a value is no probability.
    """
    if inclusion is None:
        shares = np.array([layer.top_k / layer.num_experts for layer in spec.moe_layers])
        uniform: Floats = shares[spec.layer_of_expert]
        return uniform
    given = np.asarray(inclusion, dtype=np.float64)
    if given.shape != (spec.num_experts,):
        raise InputError(
            f"The routing probabilities have shape {given.shape}, but the model has "
            f"{spec.num_experts} experts; give one per expert."
        )
    if not ((given >= 0) & (given <= 1)).all():
        raise InputError("The routing probabilities leave the range 0 to 1; give probabilities.")
    return given


def active_probability(inclusion: Floats, tokens: int, *, balanced: bool = False) -> Floats:
    """Return the probability that at least one of ``tokens`` selects each expert, shape (N,).

    ``q = 1 - (1 - p)^T``, exact for independent tokens; the sum over a layer is its expected
    number of distinct experts, on which the traffic of decoding depends (OEA, arXiv 2511.02237).
    ``balanced`` tokens, as kernel benchmarks draw them, avoid each other: ``q = min(1, T p)``.
    """
    if balanced:
        apart: Floats = np.minimum(1.0, tokens * inclusion)
        return apart
    with np.errstate(divide="ignore"):
        active: Floats = -np.expm1(tokens * np.log1p(-inclusion))
    return active


def padded_rows(
    inclusion: Floats, tokens: int, tile_rows: int, *, balanced: bool = False
) -> Floats:
    """Return the expected rows computed for each expert, shape (N,).

    An active expert's ``T p / q`` tokens are padded to whole tiles, as grouped GEMM kernels do
    (vLLM's ``moe_align_block_size``).
    """
    active = active_probability(inclusion, tokens, balanced=balanced)
    rows = np.divide(tokens * inclusion, active, out=np.zeros_like(active), where=active > 0)
    padded: Floats = active * tile_rows * np.ceil(rows / tile_rows - _ROUNDING)
    return padded
