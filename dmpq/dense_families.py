"""Where the feed-forward blocks of dense transformers stand, family by family.

A block is ``down(act(up(x)))``, or gated, ``down(act(gate(x)) * up(x))``. Families differ in the
names of these parts, in whether gate and up are one matrix, and in what else shares their module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dmpq.errors import unknown


@dataclass(frozen=True)
class FeedForward:
    """Where a dense family keeps the feed-forward block of a layer.

    Attributes:
        layers: Path of the list of layers inside the base model.
        up: Path of the up projection inside a layer.
        down: Path of the down projection inside a layer.
        act: Path of the activation inside a layer.
        gate: Path of the gate projection inside a layer; empty for none, or one within ``up``.
        fused: Whether ``up`` holds a gate, the first half of its outputs, and the up projection.
    """

    layers: str
    up: str
    down: str
    act: str
    gate: str = ""
    fused: bool = False

    @property
    def gated(self) -> bool:
        """Whether a gate stands beside the up projection."""
        return self.fused or bool(self.gate)

    def matrices(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's gate+up, or up alone, and down weights, each (out, in)."""
        names = [name for name in (self.gate, self.up) if name]
        up = torch.cat([_matrix(layer.get_submodule(name)) for name in names])
        return up, _matrix(layer.get_submodule(self.down))

    def biases(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the biases of the same, each (out,); ``None`` where a layer has none at all.

        A projection without a bias beside one that has some counts as one of zeros.
        """
        modules = [layer.get_submodule(name) for name in (self.gate, self.up, self.down) if name]
        given = [dict(module.named_parameters()).get("bias") for module in modules]
        if all(bias is None for bias in given):
            return None
        *ups, down = (
            _matrix(module).new_zeros(len(_matrix(module))) if bias is None else bias.detach()
            for module, bias in zip(modules, given, strict=True)
        )
        return torch.cat(ups), down

    def activation(self, layer: nn.Module) -> Any:
        """Return a layer's activation: a module, or in some families a function."""
        holder, _, name = self.act.rpartition(".")
        return getattr(layer.get_submodule(holder), name)

    def replace(self, layer: nn.Module, block: nn.Module) -> None:
        """Put another block in the place of a layer's feed-forward block.

        A gated block goes whole. Of others, what comes before the down projection hands its input
        on, and the new block stands in that projection's place: dropout, residual and norm, which
        some families keep in the same module, stay as they are. Dropout between an activation and
        the down projection (ModernBERT's ``mlp_dropout``, 0 by default) goes with the block.
        """
        if self.gated:
            _put(layer, self.down.rpartition(".")[0], block)
            return
        for name in (self.up, self.act):
            _put(layer, name, nn.Identity())
        _put(layer, self.down, block)
        # Some families draw a projection's weights anew from the module around it.
        holder: Any = layer.get_submodule(self.down.rpartition(".")[0])
        holder._is_hf_initialized = True


def _matrix(module: nn.Module) -> torch.Tensor:
    """Return a linear module's weight (out, in); GPT-2's keeps (in, out)."""
    weight = module.get_parameter("weight").detach()
    return weight.mT if isinstance(module, Conv1D) else weight


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(layer.get_submodule(holder), name, module)


_BERT: Final = FeedForward(
    "encoder.layer", "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"
)
_LLAMA: Final = FeedForward(
    "layers", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj"
)
_PHI3: Final = FeedForward(
    "layers", "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", fused=True
)
_FOUR: Final = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act")
FAMILIES: Final[dict[str, FeedForward]] = {
    **dict.fromkeys(
        ("bert", "camembert", "deberta", "deberta-v2", "electra", "ernie", "mpnet", "roberta"),
        _BERT,
    ),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta"), _BERT),
    **dict.fromkeys(
        ("cohere", "gemma", "gemma2", "gemma3_text", "granite", "helium", "llama", "mistral"),
        _LLAMA,
    ),
    **dict.fromkeys(
        ("olmo", "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"), _LLAMA
    ),
    **dict.fromkeys(("glm", "glm4", "phi3"), _PHI3),
    "distilbert": FeedForward("transformer.layer", "ffn.lin1", "ffn.lin2", "ffn.activation"),
    "falcon": FeedForward("h", *_FOUR),
    "gpt2": FeedForward("h", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "gpt_neo": FeedForward("h", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "gpt_neox": FeedForward("layers", *_FOUR),
    "gptj": FeedForward("h", "mlp.fc_in", "mlp.fc_out", "mlp.act"),
    "modernbert": FeedForward("layers", "mlp.Wi", "mlp.Wo", "mlp.act", fused=True),
    "nemotron": FeedForward("layers", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"),
    "opt": FeedForward("decoder.layers", "fc1", "fc2", "activation_fn"),
    "phi": FeedForward("layers", "mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
    "starcoder2": FeedForward("layers", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
}
"""Dense families whose feed-forward blocks can become experts, by model type."""


def feed_forward(family: str) -> FeedForward:
    """Return where a dense family keeps its feed-forward blocks.

    Raises:
        InputError: If the family is not one of :data:`FAMILIES`.
    """
    if family not in FAMILIES:
        raise unknown("dense family", family, FAMILIES)
    return FAMILIES[family]
