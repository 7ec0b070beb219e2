"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense model becomes one of experts.

The feed-forward blocks of some layers become E copies of themselves beside a fresh router; all
other weights stay. The weights of a token's experts sum to 1, so that the new model computes what
the dense one did, until training or noise tells the copies apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from dmpq.dense_families import FeedForward, feed_forward
from dmpq.errors import InputError
from dmpq.experts import Experts, interface_containers
from dmpq.families import routers_of
from dmpq.upcycled import HEADS, UpcycledConfig

_NOT_CARRIED: Final = {"architectures", "transformers_version", "dtype"}
_MOST_NOISE: Final = 1e3


def upcycle(
    model: PreTrainedModel,
    *,
    experts: int,
    top_k: int,
    layers: Sequence[int] | None = None,
    noise: float = 0.0,
    capacity_factor: float | None = None,
    seed: int = 0,
    router_std: float = 0.02,
) -> PreTrainedModel:
    """Return a Mixture-of-Experts model that starts from a dense one, which is left as it is.

    It is of an existing architecture where one fits exactly (Mixtral for Llama and Mistral without
    biases, Qwen3-MoE for Qwen3), else of :mod:`dmpq.upcycled`; ``save_pretrained`` writes either,
    and the Auto classes load it where ``dmpq.hf`` is imported. Heads carry over.

    Args:
        model: A dense encoder or decoder of a family in :data:`dmpq.dense_families.FAMILIES`.
        experts: Experts in each converted layer, E; 2 at least.
        top_k: Experts that each token selects. With 1 the task's loss does not train the router.
        layers: Indices of the layers to convert; ``None`` for all.
        noise: Standard deviation of the Gaussian noise that each expert's matrices get, relative
            to that of the matrix: without it the copies differ by what the router sends them only.
        capacity_factor: In training, an expert takes at most ``ceil(factor * tokens * k / E)``
            selections, and the rest pass by the residual; ``None`` to drop nothing.
        seed: Of the routers and the noise.
        router_std: Standard deviation of the routers' weights.

    Returns:
        The new model, on the same device, in the same dtype and mode.

    Raises:
        InputError: If an option is out of range, the model has experts already, or its family or
            head is not known.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; give a number from 0 to {2**32 - 1}.")
    where = _checked(model, experts=experts, top_k=top_k, noise=noise, router_std=router_std)
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise InputError(
            f"capacity_factor is {capacity_factor}; give a positive number, such as 1.25, or None "
            "to drop no token."
        )
    blocks: Any = model.base_model.get_submodule(where.layers)
    chosen = _chosen(layers, len(blocks))
    config = None
    if capacity_factor is None:
        config = _existing(model, experts=experts, top_k=top_k, layers=chosen, count=len(blocks))
    if config is None:
        config = _registered(model, where, blocks[chosen[0]])
        config.moe_layers, config.capacity_factor = list(chosen), capacity_factor
        config.num_experts, config.num_experts_per_tok = experts, top_k
    sparse: PreTrainedModel = _built(model, config).train(model.training)
    _carry_over(model, sparse)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers_of(sparse).values():
            assert router is not None  # both kinds of model keep it in the usual place
            router.copy_(torch.randn(router.shape, generator=generator) * router_std)
        for container, index in zip(interface_containers(sparse), chosen, strict=True):
            _fill(sparse, container, where, blocks[index], noise, generator)
    return sparse


def _checked(
    model: PreTrainedModel, *, experts: int, top_k: int, noise: float, router_std: float
) -> FeedForward:
    """Return where the model keeps its feed-forward blocks; refuse what cannot be upcycled."""
    family = model.config.model_type
    if routers_of(model):
        raise InputError(
            f"The model of family {family!r} is a Mixture-of-Experts model already; upcycle a "
            "dense one."
        )
    where = feed_forward(family)
    if experts < 2:
        raise InputError(f"experts is {experts}; give 2 or more, or train the dense model.")
    if not 1 <= top_k <= experts:
        raise InputError(
            f"top_k is {top_k}, of {experts} experts; give a number from 1 to {experts}."
        )
    for name, value in (("noise", noise), ("router_std", router_std)):
        if not 0 <= value <= _MOST_NOISE:
            raise InputError(f"{name} is {value}; give a number from 0 to {_MOST_NOISE:g}.")
    return where


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return the layers to convert, in order."""
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    strange = [layer for layer in chosen if not 0 <= layer < count]
    if strange or not chosen:
        what = f"layer {strange[0]}" if strange else "no layer"
        raise InputError(
            f"layers names {what}, and the model has {count} layers; give some of 0 to "
            f"{count - 1}, or None for all."
        )
    return chosen


def _existing(
    model: PreTrainedModel, *, experts: int, top_k: int, layers: Sequence[int], count: int
) -> Any:
    """Return the config of transformers' own MoE family that fits exactly, ``None`` for none."""
    dense: Any = model.config
    family = dense.model_type
    whole = len(layers) == count
    plain_llama = family == "llama" and not dense.attention_bias and not dense.mlp_bias
    if whole and (plain_llama or family == "mistral"):
        return _config(MixtralConfig, dense, num_local_experts=experts, num_experts_per_tok=top_k)
    if family == "qwen3" and not dense.use_sliding_window:
        return _config(
            Qwen3MoeConfig,
            dense,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=dense.intermediate_size,
            mlp_only_layers=[layer for layer in range(count) if layer not in layers],
            norm_topk_prob=True,
            head_dim=dense.head_dim,
        )
    return None


def _config(kind: Any, dense: Any, **values: Any) -> Any:
    """Return a config of a kind, with all that a dense config says of the same fields."""
    names = {field.name for field in dataclasses.fields(kind)} - _NOT_CARRIED
    return kind(**{k: v for k, v in dense.to_dict().items() if k in names} | values)


def _registered(model: PreTrainedModel, where: FeedForward, layer: nn.Module) -> UpcycledConfig:
    """Return the config of the registered architecture, for now without experts."""
    dense: Any = model.config
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)} - _NOT_CARRIED
    return UpcycledConfig(
        dense=type(dense).from_dict(dense.to_dict()),
        moe_intermediate_size=where.matrices(layer)[1].shape[1],
        **{name: getattr(dense, name) for name in shared},
    )


def _built(model: PreTrainedModel, config: Any) -> Any:
    """Return a model of a config with the head that a model has."""
    kind = type(model)
    for head in HEADS:
        known = head.auto._model_mapping.get(type(model.config), ())
        if kind in (known if isinstance(known, tuple) else (known,)):
            sparse = head.auto.from_config(
                config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
            )
            return sparse.to(model.device)
    names = ", ".join(head.auto.__name__ for head in HEADS)
    raise InputError(
        f"The model's class {kind.__name__} has a head that does not carry over; load it by one "
        f"of {names}."
    )


def _carry_over(model: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Copy all weights beside the feed-forward blocks that became experts."""
    own, given = sparse.state_dict(), model.state_dict()
    fresh = {path.rpartition(".")[0] for path in routers_of(sparse)}
    own_base, given_base = f"{sparse.base_model_prefix}.", f"{model.base_model_prefix}."
    for name, value in own.items():
        # The base model has another name under Llama's question answering than under Mixtral's.
        there = name if name in given else given_base + name.removeprefix(own_base)
        if there in given:
            value.copy_(given[there])
        elif not any(name.startswith(f"{block}.") for block in fresh):
            raise InputError(
                f"The dense model has no {name}, which the new one needs; this version of "
                "transformers keeps the family's weights elsewhere: upcycle another family."
            )
    if model.can_generate():
        sparse.generation_config = model.generation_config


def _fill(
    sparse: PreTrainedModel,
    container: Experts,
    where: FeedForward,
    layer: nn.Module,
    noise: float,
    generator: torch.Generator,
) -> None:
    """Write a dense block's weights into each expert of a container, with noise of their own."""
    matrices, biases = where.matrices(layer), where.biases(layer)
    parameters = dict(container.module.named_parameters())
    names = ("gate_up_proj" if where.gated else "up_proj", "down_proj")
    for expert in range(container.num_experts):
        for side, matrix in enumerate(matrices):
            drawn = matrix
            if noise > 0:
                added = torch.randn(matrix.shape, generator=generator) * noise
                drawn = matrix + added.to(matrix) * matrix.std()
            container.put(sparse, expert, side, drawn)
            if biases is not None:
                parameters[f"{names[side]}_bias"].data[expert].copy_(biases[side])
