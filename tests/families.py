"""Tiny random models of every MoE family: one table of what the generic shrinking leaves open."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dmpq.families import auto_class

EXPERTS, WIDTH, HIDDEN = 4, 16, 32

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    # experts
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    # latent, indexed and linear attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 1,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    # pictures and sounds, which no test shows to a model
    "image_size": 28,
    "patch_size": 14,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "projector_hidden_size": 16,
    "projection_intermediate_size": 16,
    "num_position_embeddings": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 32,
    "output_dim": HIDDEN,
}
"""What a config's field is set to wherever a config, or a part of one, has it."""

_PICTURES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA4: dict[str, Any] = {
    "enable_moe_block": True,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
}
_LLAMA4: dict[str, Any] = {"intermediate_size_mlp": 48, "moe_layers": [1]}
_DENSE_FIRST = ["dense", "sparse"]
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {
        "vision_config": {"model_type": "idefics3_vision", **_PICTURES},
        "projector_patch_to_query_dict": {4: 4},
    },
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {},
    "beam": {"mlp_layer_types": _DENSE_FIRST},
    "cohere2_moe": {},
    "dbrx": {
        "n_heads": 2,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _DENSE_FIRST}},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note": {
        "vision_config": {
            "hidden_size": 32,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": _DENSE_FIRST,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {},
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 8],
            "rope_parameters": _SECTIONS | {"mrope_section": [2, 2, 4]},
        },
    },
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": {
        "text_config": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 0.5}},
    },
    "glm5_next": {
        "text_config": {
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "mlp_layer_types": _DENSE_FIRST,
        },
    },
    "glm_moe_dsa": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2": {},
    "inkling2_text": {},
    "inkling_mm_model": {},
    "inkling_text": {},
    "jamba": {},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mellum": {},
    "mimo_v2_flash": {"num_attention_heads": 4},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "minimax_m3_vl_text": {},
    "mistral4": {},
    "mistral_large4": {"vision_config": {"model_type": "pixtral", **_PICTURES}},
    "mixtral": {},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 1,
            "patch_sizes": [16],
            "hidden_sizes": [16],
            "depths": [1],
        },
        "text_config": {"moe_hidden_size": 24},
    },
    "nemotron_h": {},
    "nllb-moe": {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), WIDTH),
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 2),
        "decoder_attention_heads": 2,
        "decoder_start_token_id": 1,
        "pad_token_id": 1,
    },
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_omni_moe_thinker": {},
    "qwen3_vl_moe": {},
    "qwen4_exp_text": {},
    "solar_open": {},
    "switch_transformers": {
        **dict.fromkeys(("num_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
        "d_ff": WIDTH,
        "d_kv": 16,
        "expert_capacity": 3,
    },
    "unlimited_ocr": {},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model types, and what each needs beside :data:`TINY`."""

TRANSPOSED = (
    "aria",
    "aria_text",
    "gpt_oss",
    "llama4",
    "llama4_text",
    "openai_privacy_filter",
)
"""Families that keep expert weights as (in, out)."""


def tiny_values(kind: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config class at their tiny values, those of its parts within them."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in TINY.items() if name in names}
    if "intermediate_size" in names:
        values["intermediate_size"] = 48 if "moe_intermediate_size" in names else WIDTH
    parts = {
        name: tiny_values(part, overrides.get(name, {}))
        for name, part in (kind.sub_configs or {}).items()
        if isinstance(part, type) and dataclasses.is_dataclass(part)
    }
    return values | overrides | parts


def tiny_config(family: str) -> Any:
    """Return the config of a tiny model."""
    kind = CONFIG_MAPPING[family]
    return kind(**tiny_values(kind, FAMILIES[family]))


def build_tiny(family: str) -> PreTrainedModel:
    """Return a tiny random model whose experts and routers differ enough to be told apart."""
    torch.manual_seed(0)
    config = tiny_config(family)
    model = auto_class(config).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)
