r"""Train the bundled reference checkpoint on the training side of the embedded text.

    nice python benchmarks/train_reference.py --work runs/reference --out dmpq/reference/model
    nice python benchmarks/train_reference.py --family mixtral --tokens 24_000_000 \\
        --work runs/mixtral --out benchmarks/models/mixtral

An OLMoE of 64 experts on bytes, in fp32 on a CPU; other families, of other widths, depths and
numbers of experts, by the same recipe. The learning rate warms up, stays, and falls
to zero linearly over the last fifth. The run is resumable: the same command continues from the
last checkpoint in ``--work``, and since the batch of a step depends on the seed and the step
alone, resuming changes nothing. On two cores it takes about an hour (GOMP_SPINCOUNT=30000 and a
large MALLOC_TRIM_THRESHOLD_ help on Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from dmpq.embedded import side_documents

END_OF_TEXT = 256


@dataclass(frozen=True)
class TrainingConfig:
    """What the run depends on; kept beside its checkpoints and compared on resume."""

    seed: int = 0
    sequence_length: int = 128
    sequences: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_share: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose id of a byte is the byte's value; 256 ends a text."""
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[value]: value for value in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    assert tokenizer.eos_token_id == END_OF_TEXT
    return tokenizer


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-in for each byte, as ``ByteLevel`` writes them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(value if value in printable else next(stand_ins)) for value in range(256)]


COMMON: dict[str, Any] = {
    "vocab_size": END_OF_TEXT + 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
    "use_cache": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {  # 64 experts in 4 layers, two per token
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    "mixtral": {  # 24 wide experts in 3 layers, two per token, their weights summing to 1
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {  # 60 experts in 5 layers, two per token beside a shared one
        "hidden_size": 96,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "deepseek_v2": {  # 96 small experts in 3 of 4 layers, four per token beside a shared one
        "hidden_size": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}


def model_config(family: str = "olmoe") -> PreTrainedConfig:
    """Return the geometry of a family's model."""
    return AutoConfig.for_model(family, **(FAMILIES[family] | COMMON))


@torch.compile(dynamic=True)
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


@torch.compile(dynamic=True)
def _swiglu_backward(
    gate_up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([grad_gate, grad * silu], -1), silu * up


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts on tokens sorted by expert: 1.4x a step of ``grouped_mm`` on two cores."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the experts' weighted sum, (T, H)."""
        tokens, k = index.shape
        order = torch.argsort(index.flatten(), stable=True)
        counts = torch.bincount(index.flatten(), minlength=len(down_proj)).tolist()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        inputs = hidden[order // k]
        gate_up = inputs.new_empty(len(order), gate_up_proj.shape[1])
        for e, (x, out) in enumerate(_pairs(counts, inputs, gate_up)):
            torch.mm(x, gate_up_proj[e].T, out=out)
        activated = _swiglu(gate_up)
        outputs = torch.empty_like(inputs)
        for e, (x, out) in enumerate(_pairs(counts, activated, outputs)):
            torch.mm(x, down_proj[e].T, out=out)
        ctx.save_for_backward(
            inputs, gate_up, outputs, gate_up_proj, down_proj, order, inverse, weights
        )
        ctx.counts = counts
        return (outputs[inverse].view(tokens, k, -1) * weights[..., None]).sum(1)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, torch.Tensor]:
        """Return the gradients of hidden states, both weights, and routing weights."""
        (inputs, gate_up, outputs, gate_up_proj, down_proj, order, inverse, weights) = (
            ctx.saved_tensors
        )
        counts, k = ctx.counts, weights.shape[1]
        grad_rows = grad[order // k]
        grad_weights = (grad_rows * outputs).sum(-1)[inverse].view_as(weights)
        grad_rows = grad_rows * weights.flatten()[order, None]
        grad_activated = grad_rows.new_empty(len(order), down_proj.shape[2])
        for e, (x, out) in enumerate(_pairs(counts, grad_rows, grad_activated)):
            torch.mm(x, down_proj[e], out=out)
        grad_gate_up, activated = _swiglu_backward(gate_up, grad_activated)
        grad_inputs = torch.empty_like(inputs)
        grad_gate_up_proj = torch.empty_like(gate_up_proj)
        grad_down_proj = torch.empty_like(down_proj)
        rows = zip(
            *(t.split(counts) for t in (grad_rows, activated, grad_gate_up, inputs, grad_inputs)),
            strict=True,
        )
        for e, (d_out, act, d_gate_up, x, d_x) in enumerate(rows):
            torch.mm(d_out.T, act, out=grad_down_proj[e])
            torch.mm(d_gate_up.T, x, out=grad_gate_up_proj[e])
            torch.mm(d_gate_up, gate_up_proj[e], out=d_x)
        grad_hidden = grad_inputs[inverse].view(*weights.shape, -1).sum(1)
        return grad_hidden, grad_gate_up_proj, grad_down_proj, None, grad_weights


def _pairs(
    counts: list[int], rows: torch.Tensor, out: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(rows.split(counts), out.split(counts), strict=True)


@torch._dynamo.disable
def _sorted_experts(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    result: torch.Tensor = SortedExperts.apply(
        hidden, self.gate_up_proj, self.down_proj, index, weights
    )
    return result


def training_tokens() -> NDArray[np.int64]:
    """Return the training side as one row of token ids, each document closed by end-of-text."""
    pieces = []
    for document in side_documents("train"):
        data = document.text.encode("utf-8", errors="replace")
        pieces.append(np.frombuffer(data, dtype=np.uint8).astype(np.int64))
        pieces.append(np.array([END_OF_TEXT], dtype=np.int64))
    return np.concatenate(pieces)


class Batches:
    """The batch of a step, as a function of seed and step alone.

    Each epoch cuts the text at a fresh phase and visits its windows in a fresh order.
    """

    def __init__(self, tokens: NDArray[np.int64], config: TrainingConfig) -> None:
        self.tokens, self.config = tokens, config
        windows = len(tokens) // config.sequence_length - 1
        self.steps_per_epoch = windows // config.sequences
        self._epoch: tuple[int, int, NDArray[np.int64]] = (-1, 0, np.empty(0, np.int64))

    def __getitem__(self, step: int) -> torch.Tensor:
        config = self.config
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([config.seed, epoch])
            phase = int(rng.integers(config.sequence_length))
            order = rng.permutation(self.steps_per_epoch * config.sequences)
            self._epoch = (epoch, phase, order)
        _, phase, order = self._epoch
        chosen = order[position * config.sequences : (position + 1) * config.sequences]
        starts = phase + chosen * config.sequence_length
        rows = starts[:, None] + np.arange(config.sequence_length)
        return torch.from_numpy(self.tokens[rows])


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return the Switch load-balancing loss averaged over the layers; ``top_k`` when balanced.

    The model's own loss pools the layers before the product, so that layers may collapse in
    turn as long as their sum is balanced: a third of the experts died under it.
    """
    losses = [load_balancing_loss_func((g,), g.shape[-1], top_k) for g in router_logits]
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Return the rate of a step: linear warm-up, constant, linear decay to zero."""
    decay = max(1, round(steps * config.decay_share))
    scale = min((step + 1) / config.warmup_steps, 1.0, (steps - step) / decay)
    return config.learning_rate * scale


def save_progress(
    work: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write model, optimizer state and counters as one file, replaced atomically."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[i]}"] = value
    partial = work / "progress.tmp"
    save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
    os.replace(partial, work / "progress.safetensors")


def load_progress(
    work: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore what :func:`save_progress` wrote; ``None`` where nothing was."""
    from safetensors import safe_open

    path = work / "progress.safetensors"
    if not path.exists():
        return None
    tensors = load_file(path)
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    full = optimizer.state_dict()
    full["state"] = {
        i: {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, (name, _) in enumerate(model.named_parameters())
    }
    optimizer.load_state_dict(full)
    with safe_open(path, framework="pt") as handle:
        restored: dict[str, Any] = json.loads(handle.metadata()["progress"])
    return restored


def optimizer_for(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, parameters in the model's order."""
    groups = [
        {"params": [p], "weight_decay": config.weight_decay if p.ndim > 1 else 0.0}
        for p in model.parameters()
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def compile_dense_parts(model: PreTrainedModel) -> None:
    """Compile attention and norms, whose element-wise passes would otherwise take half a step.

    Latent attention rotates complex numbers, which the compiler leaves alone.
    """
    latent = getattr(model.config, "kv_lora_rank", None)
    for layer in model.model.layers:
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        for part in norms if latent else [layer.self_attn, *norms]:
            part.forward = torch.compile(part.forward)


def train(
    work: Path,
    out: Path,
    *,
    tokens: int,
    threads: int,
    config: TrainingConfig,
    family: str = "olmoe",
) -> None:
    """Train until ``tokens`` have been seen and write the bf16 checkpoint to ``out``."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    ExpertsInterface.register("sorted", _sorted_experts)
    work.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(model_config(family), experts_implementation="sorted")
    model.router_aux_loss_coef = 0.0  # balance_loss takes its place
    optimizer = optimizer_for(model, config)
    init_norms = [
        layer.mlp.gate.weight.detach().norm(dim=1).tolist()
        for layer in model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    progress = load_progress(work, model, optimizer) or {
        "step": 0,
        "seconds": 0.0,
        "config": asdict(config),
        "router_init_norms": init_norms,
    }
    if progress["config"] != asdict(config):
        raise SystemExit(f"{work} holds a run of another configuration: {progress['config']}")
    batches = Batches(training_tokens(), config)
    per_step = config.sequences * config.sequence_length
    steps = math.ceil(tokens / per_step)
    compile_dense_parts(model)
    log = (work / "log.jsonl").open("a")
    mark = time.monotonic()
    for step in range(progress["step"], steps):
        batch = batches[step]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        output = model(input_ids=batch, labels=batch, output_router_logits=True)
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (output.loss + config.balance_weight * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] = step + 1
        if (step + 1) % 100 == 0 or step + 1 == steps:
            now = time.monotonic()
            progress["seconds"] += now - mark
            mark = now
            line = {
                "step": step + 1,
                "tokens": (step + 1) * per_step,
                "bits_per_byte": float(output.loss) / math.log(2),
                "balance": float(balance) / model.config.num_experts_per_tok,
                "gradient_norm": float(norm),
                "seconds": progress["seconds"],
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            save_progress(work, model, optimizer, progress)
    export(model, out, progress, tokens=steps * per_step)


def export(model: PreTrainedModel, out: Path, progress: dict[str, Any], *, tokens: int) -> None:
    """Write the checkpoint in bf16 with its tokenizer and what it was trained on."""
    model.config.router_init_norms = progress["router_init_norms"]
    model.config.training = {"tokens": tokens, "seconds": round(progress["seconds"])}
    model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, default="olmoe")
    parser.add_argument("--work", type=Path, default=Path("runs/reference"))
    parser.add_argument("--out", type=Path, default=Path("dmpq/reference/model"))
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    train(
        arguments.work,
        arguments.out,
        tokens=arguments.tokens,
        threads=arguments.threads,
        config=TrainingConfig(),
        family=arguments.family,
    )


if __name__ == "__main__":
    main()
