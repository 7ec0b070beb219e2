"""What a Hugging Face ``config.json`` says of a geometry, by the rules in transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dmpq.errors import InputError

EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_KS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
)
EXPERT_WIDTHS: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
SHARED_COUNTS: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTHS: Final = (
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
LATENT_WIDTHS: Final = ("moe_hidden_size", "moe_latent_size")
UNGATED: Final = ("nemotron_h", "nllb-moe", "switch_transformers")
_WINDOW_UNUSED: Final = ("qwen2_moe", "qwen3_moe")
"""Families whose configs name a window that they do not use unless told so."""

DENSE_WIDTHS: Final = ("intermediate_size_mlp", "intermediate_size")


def first_number(config: Mapping[str, Any], keys: Sequence[str], name: str) -> int:
    """Return the number under the first of several keys that holds one, or starts a list of them.

    Lists are of a number per layer, or of one for text and one for pictures.

    Raises:
        InputError: If none does, but for counts of experts: a dense model has 0.
    """
    for key in keys:
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if keys is EXPERT_COUNTS:
        return 0
    raise InputError(
        f"The config of {name} gives no whole number for {' or '.join(keys)}; add one."
    )


def usual_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config under the names of most families, where its family has names of its own.

    The layers of an encoder stand before those of its decoder.
    """
    family = config.get("model_type")
    if family == "dbrx":
        attention, experts = config["attn_config"], config["ffn_config"]
        return {
            **config,
            "hidden_size": config["d_model"],
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": config["n_heads"],
            "num_key_value_heads": attention["kv_n_heads"],
            "num_experts": experts["moe_num_experts"],
            "num_experts_per_tok": experts["moe_top_k"],
            "intermediate_size": experts["ffn_hidden_size"],
        }
    if family == "switch_transformers":
        decoder = config.get("num_decoder_layers") or config["num_layers"]
        return {
            **config,
            "hidden_size": config["d_model"],
            "num_hidden_layers": config["num_layers"] + decoder,
            "decoder_layers": decoder,
            "num_attention_heads": config["num_heads"],
            "head_dim": config["d_kv"],
            "num_experts_per_tok": 1,
            "intermediate_size": config["d_ff"],
            "mlp_layer_types": [
                *_every(config["encoder_sparse_step"], config["num_layers"], 1),
                *_every(config["decoder_sparse_step"], decoder, 1),
            ],
        }
    if family == "nllb-moe":
        encoder, decoder = config["encoder_layers"], config["decoder_layers"]
        return {
            **config,
            "hidden_size": config["d_model"],
            "num_hidden_layers": encoder + decoder,
            "num_attention_heads": config["encoder_attention_heads"],
            "num_experts_per_tok": min(2, config["num_experts"]),
            "intermediate_size": config["encoder_ffn_dim"],
            "attention_bias": True,
            "mlp_layer_types": [
                *_every(config["encoder_sparse_step"], encoder, 0),
                *_every(config["decoder_sparse_step"], decoder, 0),
            ],
        }
    return config


def _every(step: int, layers: int, first: int) -> list[str]:
    """Return the kinds of layers of which every ``step``-th has experts.

    Args:
        step: Distance; 1 for all, 0 for none.
        layers: How many there are.
        first: Remainder of their numbers: 1 counts from the second, 0 from the ``step``-th.
    """
    offset = 0 if first else 1
    return [
        "sparse" if step > 0 and (step == 1 or (i + offset) % step == first) else "dense"
        for i in range(layers)
    ]


def layer_count(config: Mapping[str, Any], name: str) -> int:
    """Return the number of layers, which some families give by a list of their kinds alone.

    Raises:
        InputError: If the config tells neither.
    """
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list):
        return len(kinds)
    return first_number(config, ("num_hidden_layers",), name)


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Say whether a layer has experts, by the rules of the families in transformers."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return bool(kinds[layer] == "sparse")
    if config.get("moe_layers"):
        return layer in config["moe_layers"]
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return bool(frequency[layer])
    return (
        layer >= (config.get("first_k_dense_replace") or 0)
        and layer not in (config.get("mlp_only_layers") or ())
        and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
        and layer % (frequency or 1) == 0
    )


def shared_width(config: Mapping[str, Any], width: int) -> int:
    """Return the summed width of the shared experts, ``width`` that of one; 0 for none.

    A dense block that runs beside the experts, as in Gemma 4, is one that all tokens share.
    """
    family = config.get("model_type")
    if family in ("llama4_text", "hunyuan_v1_moe"):
        return width
    if family == "gemma4_text":
        return int(config.get("intermediate_size") or 0)
    given = next((config[key] for key in SHARED_WIDTHS if config.get(key)), None)
    count = next((config[key] for key in SHARED_COUNTS if config.get(key)), 0)
    return int(given or count * width)


def expert_hidden(config: Mapping[str, Any], hidden: int) -> int:
    """Return the width that the experts read and write: less than ``hidden`` where projected."""
    return int(next((config[key] for key in LATENT_WIDTHS if config.get(key)), hidden))


def gated(config: Mapping[str, Any]) -> bool:
    """Return whether the experts have a gate beside the up projection."""
    own = config.get("experts_gated")
    return config.get("model_type") not in UNGATED if own is None else bool(own)


def latent_width(config: Mapping[str, Any]) -> int:
    """Return what latent attention (DeepSeek-V2, arXiv 2405.04434) caches; 0 for other kinds."""
    rank = config.get("kv_lora_rank") or 0
    return rank + config["qk_rope_head_dim"] if rank else 0


def latent_dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the widths inside latent attention; none for other kinds."""
    if not config.get("kv_lora_rank"):
        return {}
    rotated = config["qk_rope_head_dim"]
    return {
        "rotated_values": rotated,
        "key_dim": config["qk_nope_head_dim"] + rotated,
        "value_dim": config["v_head_dim"],
    }


def windows(config: Mapping[str, Any], layers: int) -> dict[str, int]:
    """Return the sliding window and how many layers have it, by the rules in transformers."""
    family, window = config.get("model_type"), config.get("sliding_window")
    if not window or not config.get("use_sliding_window", family not in _WINDOW_UNUSED):
        return {}
    last = config.get("max_window_layers")
    last = layers if last is None else last
    if kinds := config.get("layer_types"):
        windowed = kinds.count("sliding_attention")
    elif family == "gpt_oss":
        windowed = len(range(0, layers, 2))
    elif family == "qwen2_moe":
        windowed = len(range(0, min(last, layers), 2))
    elif family == "dots1":
        windowed = len(range(last, layers))
    else:
        windowed = layers
    return {"sliding_window": window, "windowed_layers": windowed} if windowed else {}


def attention_parameters(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Return one layer's attention weights with its norms, as the families in transformers do."""
    norms = 2 * hidden
    if config.get("kv_lora_rank"):
        return _latent_attention_parameters(config, hidden, heads) + norms
    head_dim = config.get("head_dim") or hidden // heads
    query = heads * head_dim
    cached = (config.get("num_key_value_heads") or heads) * head_dim
    family = config.get("model_type")
    if family == "olmoe":
        norms += query + cached
    if family == "qwen3_moe":
        norms += 2 * head_dim
    biased = family == "qwen2_moe" and config.get("qkv_bias", True)
    biases = query + 2 * cached if biased or config.get("attention_bias") else 0
    whole: int = hidden * 2 * (query + cached) + biases + norms
    if config.get("is_encoder_decoder"):
        # A decoder's layers attend twice; a geometry has one number for all layers.
        layers, decoder = config["num_hidden_layers"], config["decoder_layers"]
        return int(whole + round((whole - hidden) * decoder / layers))
    return whole


def _latent_attention_parameters(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Return the weights of latent attention: down- and up-projections of queries and cache."""
    rope, plain, value = (
        config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    rank, query_rank = config["kv_lora_rank"], config.get("q_lora_rank")
    out = heads * (plain + rope)
    query = hidden * query_rank + query_rank + query_rank * out if query_rank else hidden * out
    cache = hidden * (rank + rope) + rank + rank * heads * (plain + value)
    return int(query + cache + heads * value * hidden)
