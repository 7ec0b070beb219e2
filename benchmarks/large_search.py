"""Time a search over as many experts as DeepSeek-V3 has, and say how much memory it takes.

    python benchmarks/large_search.py

14,848 experts in 58 layers at DeepSeek-V3's widths, a synthetic profile, PPO's proposals on the
additive surrogate, costs on an EPYC 9654, which has memory for them.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq import agents
from dmpq.formats import Menu
from dmpq.hw_models import load_hardware
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile
from dmpq.spec import ModelSpec

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
"""The widths of deepseek-ai/DeepSeek-V3's config.json."""


def synthetic_profile(spec: ModelSpec, seed: int) -> Profile:
    """Return a profile whose experts differ in use and damage as trained ones do, by guess."""
    rng, menu, count = np.random.default_rng(seed), Menu(), spec.num_experts
    frequency = np.concatenate(
        [rng.dirichlet(np.full(x.num_experts, 2.0)) * x.top_k for x in spec.moe_layers]
    ).clip(0, 1)
    curve = np.where(menu.bits == 16, 0.0, 5.0 ** (2.0 - menu.bits))
    sensitivity = (frequency * np.exp(rng.normal(0, 1, count)))[:, None] * curve / count
    same = np.ones(count)
    return Profile(
        spec=spec,
        menu=menu,
        tokens=8192,
        text="synthetic",
        fingerprint="",
        full_nll=2.0,
        cost_tokens=0.0,
        hits=np.round(8192 * frequency).astype(np.int64),
        frequency=frequency,
        routing_weight=frequency / 8,
        contribution=np.exp(rng.normal(0, 0.5, count)),
        sensitivity=sensitivity,
        projection_sensitivity=None,
        output_error=sensitivity,
        proxy=sensitivity * np.exp(rng.normal(0, 0.5, count))[:, None],
        weight_norm=np.exp(rng.normal(0, 0.1, count)),
        kurtosis=rng.normal(0, 1, count),
        outlier_ratio=same,
        max_row_variance=same,
        router_norm=same,
        router_norm_change=np.full(count, np.nan),
        uniform_kl=sensitivity.sum(0),
    )


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--avg-bits", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = ModelSpec.from_config(DEEPSEEK_V3, name="deepseek-v3")
    problem = Problem(
        profile=synthetic_profile(spec, 0),
        hardware=load_hardware("epyc-9654"),
        cost_spec=spec,
        weights=Weights.parse("acc=1"),
        constraints=Constraints(avg_bits=arguments.avg_bits),
    )
    started = time.monotonic()
    problem.mckp()
    knapsack = time.monotonic() - started
    started = time.monotonic()
    found = agents.make("ppo").search(problem, evaluations=arguments.evaluations, seed=0)
    seconds = time.monotonic() - started
    kilobyte = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    print(
        f"{problem.num_decisions:,} experts: knapsack {knapsack:.2f} s, PPO {seconds:.0f} s for "
        f"{found.evaluations} proposals, {problem.effective_bits(found.assignment[None])[0]:.4f} "
        f"effective bits, peak memory {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
