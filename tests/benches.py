"""A tiny geometry, and this machine measured in a moment: every time of few repetitions."""

from dataclasses import replace

import numpy as np

from dmpq.formats import Menu
from dmpq.hw_models.bench import host_bench
from dmpq.hw_models.timing import Rig
from dmpq.spec import ModelSpec, MoELayer

TINY = ModelSpec(
    name="tiny",
    model_type="olmoe",
    hidden_size=64,
    num_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=256,
    tie_word_embeddings=False,
    dense_intermediate_size=48,
    moe_layers=(
        MoELayer("a", num_experts=4, top_k=2, hidden_size=64, intermediate_size=32),
        MoELayer("b", 4, 2, 64, 32, shared_intermediate_size=32),
    ),
)
SMALL_MENU = Menu.parse("2,4g32,8,16")


def quick_bench(**more):
    rig = Rig(cache_bytes=1 << 14, seconds=0.0, repetitions=3)
    return replace(host_bench(threads=1, rig=rig), **more)


def maps_of(spec, menu=SMALL_MENU):
    return np.repeat(np.arange(len(menu))[:, None], spec.num_experts, axis=1)
