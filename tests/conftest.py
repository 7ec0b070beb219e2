"""Shared fixtures: one thread, no network, and tiny random models of several families."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

os.environ["TORCHAO_FORCE_SKIP_LOADING_SO_FILES"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

import hypothesis
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dmpq.moe import MoEModel

torch.set_num_threads(1)
hypothesis.settings.register_profile("dmpq", deadline=None)  # machines are shared
hypothesis.settings.load_profile("dmpq")

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def build(family: str) -> torch.nn.Module:
    """Return a tiny random model; its routers are random too, so that experts differ in use."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES.get(family, {})))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], MoEModel]:
    """Build a tiny model by family name, once per session."""
    built: dict[str, MoEModel] = {}

    def make(family: str = "olmoe") -> MoEModel:
        if family not in built:
            built[family] = MoEModel(build(family), name=f"tiny-{family}")
        return built[family]

    return make


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Random token ids, (12, 16)."""
    return torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
