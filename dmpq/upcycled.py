"""``dmpq_upcycled``: any dense transformer of a known family with experts in place of some FFNs.

Importing this module registers the architecture with transformers' Auto classes. A model of it is
its dense family's own model, of the family's own code, whose feed-forward blocks are replaced in
some layers; sparse upcycling (arXiv 2212.05055) makes one of a dense checkpoint
(:mod:`dmpq.training.upcycle`). The experts use transformers' experts interface, so that nothing
else in this package knows them from those of other families.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    initialization,
)
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from dmpq.dense_families import feed_forward
from dmpq.errors import InputError

MODEL_TYPE: Final = "dmpq_upcycled"
_ROUTER_STD: Final = 0.02
_WEIGHT_STD: Final = 0.02
_GEOMETRY: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)
"""What a geometry reads of a ``config.json`` (:mod:`dmpq.hf_config`), and dense configs have."""

_COMMON: Final = frozenset(dir(PreTrainedConfig()))
"""What every configuration has of its own, and reads in no other."""


class UpcycledConfig(PreTrainedConfig):
    """The configuration of a dense model with experts in some of its layers.

    What it does not hold itself, it reads in the dense model's configuration: the dense family's
    own code is built by this one.

    Attributes:
        dense: The dense model's own configuration, or its values as a dict with a model type.
        moe_layers: Indices of the layers with experts; ``None`` for all.
        num_experts: Experts in each of these, E.
        num_experts_per_tok: Experts that each token selects, k.
        moe_intermediate_size: Width inside an expert, as costs are told by the configuration
            alone; a model takes that of its dense blocks.
        experts_gated: Whether experts have a gate beside the up projection, told by the family.
        capacity_factor: In training, an expert takes at most ``ceil(factor * tokens * k / E)``
            selections of a forward; ``None`` for all of them.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    dense: Any = None
    moe_layers: list[int] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    experts_gated: bool | None = None
    capacity_factor: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Read the dense configuration, and show its geometry under the usual names."""
        given = self.dense
        if isinstance(given, dict):
            family = str(given.get("model_type"))
            feed_forward(family)
            values = {key: value for key, value in given.items() if key != "model_type"}
            self.dense = CONFIG_MAPPING[family](**values)
        if self.dense is not None:
            self.experts_gated = feed_forward(self.dense.model_type).gated
            width = self.moe_intermediate_size or getattr(self.dense, "intermediate_size", None)
            self.moe_intermediate_size = width
            kwargs.setdefault("intermediate_size", width)
            for key in _GEOMETRY:
                if (value := getattr(self.dense, key, None)) is not None:
                    kwargs.setdefault(key, value)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """Return what the dense configuration says, where this one says nothing."""
        dense = vars(self).get("dense")
        if dense is None or name in _COMMON:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(dense, name)


class _Router(nn.Module):
    """The k experts of highest logit, weighted by a softmax over these k.

    The weights of a token sum to 1, so that copies of one block make that block's output. With
    k = 1 the weight is always 1, and only auxiliary losses train the router. It computes in
    float32, whatever autocast says.
    """

    def __init__(self, num_experts: int, hidden: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.draw()

    def draw(self) -> None:
        """Draw the weights at random, where no checkpoint has given them."""
        initialization.normal_(self.weight, std=_ROUTER_STD)
        self._is_hf_initialized = not self.weight.is_meta

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (T, E), weights (T, k) and experts (T, k) of tokens (T, hidden)."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.float(), self.weight.float())
            chosen = logits.topk(self.top_k, dim=-1)
            return logits, chosen.values.softmax(-1), chosen.indices


class _Experts(nn.Module):
    """All experts of one layer as 3-D parameters (E, out, in), in the interface's form."""

    def __init__(
        self, config: UpcycledConfig, hidden: int, width: int, act: Any, gated: bool, biased: bool
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.act_fn = act
        name, rows = ("gate_up_proj", 2 * width) if gated else ("up_proj", width)
        for key, shape in ((name, (rows, hidden)), ("down_proj", (hidden, width))):
            matrices = torch.empty(self.num_experts, *shape)
            self.register_parameter(key, nn.Parameter(matrices))
            if biased:
                self.register_parameter(f"{key}_bias", nn.Parameter(matrices[..., 0].clone()))
        self.draw()

    def draw(self) -> None:
        """Draw the weights at random, where no checkpoint has given them."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                initialization.zeros_(parameter)
            else:
                initialization.normal_(parameter, std=_WEIGHT_STD)
        self._is_hf_initialized = not next(self.parameters()).is_meta

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run tokens (T, H) on experts (T, k) with weights (T, k)."""
        result: torch.Tensor = grouped_mm_experts_forward(self, hidden, index, weights)
        return result


@use_experts_implementation(has_gate=True, has_bias=False)
class _Gated(_Experts):
    pass


@use_experts_implementation(has_gate=True, has_bias=True)
class _GatedBiased(_Experts):
    pass


@use_experts_implementation(has_gate=False, has_bias=False)
class _Ungated(_Experts):
    pass


@use_experts_implementation(has_gate=False, has_bias=True)
class _UngatedBiased(_Experts):
    pass


_EXPERTS: Final[dict[tuple[bool, bool], Any]] = {
    (True, False): _Gated,
    (True, True): _GatedBiased,
    (False, False): _Ungated,
    (False, True): _UngatedBiased,
}
"""By whether experts have a gate, and biases."""


class SparseFeedForward(nn.Module):
    """A router and its experts, in the place of a dense feed-forward block.

    Without a capacity factor no token is dropped. With one, an expert takes selections in the
    order of choices first and tokens second (GShard, arXiv 2006.16668, algorithm 1), and what is
    over its capacity adds nothing: the token passes by the residual. Padding counts. Capacity
    holds in training alone, so that a sequence's answer never depends on its batch.

    Args:
        config: The model's.
        hidden: Width of the residual stream, H.
        width: Width inside an expert.
        gated: Whether experts have a gate.
        biased: Whether they have biases.
        act: Their activation.
    """

    def __init__(
        self,
        config: UpcycledConfig,
        *,
        hidden: int,
        width: int,
        gated: bool,
        biased: bool,
        act: Any,
    ) -> None:
        super().__init__()
        self.capacity_factor = config.capacity_factor
        self.gate = _Router(config.num_experts, hidden, config.num_experts_per_tok)
        self.experts = _EXPERTS[gated, biased](config, hidden, width, act, gated, biased)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., H) of (..., H)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits, weights, index = self.gate(flat)
        if self.capacity_factor is not None and self.training:
            capacity = math.ceil(self.capacity_factor * index.numel() / logits.shape[-1])
            weights = weights * within_capacity(index, logits.shape[-1], capacity)
        result: torch.Tensor = self.experts(flat, index, weights).view_as(hidden)
        return result


def within_capacity(index: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """Return which selections an expert takes, as bool (T, k).

    Args:
        index: int64 (T, k), the experts that each token selects, its first choice first.
        experts: Number of experts.
        capacity: Selections that each takes: first choices before second ones, tokens in order.
    """
    by_choice = functional.one_hot(index.T.flatten(), experts)
    place = (by_choice.cumsum(0) * by_choice).sum(-1)
    return (place <= capacity).view(index.shape[1], -1).T


def _block(config: UpcycledConfig, layer: nn.Module) -> SparseFeedForward:
    """Return experts of the widths, gate, biases, activation and type of a layer's dense block."""
    where = feed_forward(config.dense.model_type)
    up, down = where.matrices(layer)
    block = SparseFeedForward(
        config,
        hidden=len(down),
        width=down.shape[1],
        gated=where.gated,
        biased=where.biases(layer) is not None,
        act=where.activation(layer),
    )
    return block.to(up.dtype)


class _Sparse:
    """What a dense family's model class becomes sparse by: a base class put before it."""

    def __init__(self, config: UpcycledConfig, *inputs: Any, **named: Any) -> None:
        asked = config._experts_implementation
        # The dense family's classes know of no experts, and refuse any other implementation.
        config._experts_implementation = "eager"
        super().__init__(config, *inputs, **named)  # type: ignore[call-arg]
        model: Any = self
        config._experts_implementation = model.get_correct_experts_implementation(asked)
        where = feed_forward(config.dense.model_type)
        layers: Any = model.base_model.get_submodule(where.layers)
        chosen = config.moe_layers
        for index in range(len(layers)) if chosen is None else chosen:
            where.replace(layers[index], _block(config, layers[index]))

    def initialize_weights(self) -> None:
        """Draw what no checkpoint has given: experts too, of which the dense family knows none."""
        model: Any = self
        for module in model.modules():
            if isinstance(module, _Router | _Experts) and not module._is_hf_initialized:
                module.draw()
        super().initialize_weights()  # type: ignore[misc]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


@cache
def _sparse_class(head: Any, dense: Any) -> Any:
    """Return the class of a dense family's models with a head, with experts.

    Args:
        head: One of :data:`HEADS`.
        dense: The class of the dense configuration.
    """
    found = head.auto._model_mapping.get(dense, None)
    found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise InputError(
            f"{head.auto.__name__} builds no model of the dense family {dense.model_type!r}; load "
            "it by the Auto class of its own head."
        )
    members = {"config_class": UpcycledConfig, "__module__": found.__module__}
    return type(head.__name__, (_Sparse, found), members)


def _check(config: UpcycledConfig) -> None:
    """Refuse a configuration that no model can be built by.

    Raises:
        InputError: If its family is unknown, or its experts or layers do not fit.
    """
    feed_forward(config.dense.model_type)
    experts, top_k, count = (
        config.num_experts,
        config.num_experts_per_tok,
        config.num_hidden_layers,
    )
    if not 1 <= top_k <= experts:
        raise InputError(
            f"The configuration of the upcycled model selects {top_k} of {experts} experts per "
            f"token; num_experts_per_tok is a number from 1 to {experts}."
        )
    strange = [layer for layer in config.moe_layers or () if not 0 <= layer < count]
    if strange:
        raise InputError(
            f"The configuration of the upcycled model puts experts into layer {strange[0]} of "
            f"{count}; moe_layers holds numbers from 0 to {count - 1}."
        )


class _Head:
    """What an Auto class calls a model of :class:`UpcycledConfig`: each family has one of its own.

    The class of a model is made from its dense family's own, so that its forward has that one's
    arguments, and its weights that one's names.
    """

    config_class = UpcycledConfig
    auto: ClassVar[Any]

    @classmethod
    def of(cls, config: UpcycledConfig) -> Any:
        """Return the class of models of a configuration.

        Raises:
            InputError: If the dense family is unknown, or has no such head.
        """
        if config.dense is None:
            raise InputError(
                "The configuration of the upcycled model names no dense model; write the folder "
                "again by save_pretrained."
            )
        _check(config)
        head: Any = cls
        family: Any = type(config.dense)
        return _sparse_class(head, family)

    @classmethod
    def from_pretrained(cls, folder: Any, *inputs: Any, config: Any = None, **named: Any) -> Any:
        """Load a checkpoint, as ``from_pretrained`` of every model of transformers does."""
        config = UpcycledConfig.from_pretrained(folder) if config is None else config
        return cls.of(config).from_pretrained(folder, *inputs, config=config, **named)

    @classmethod
    def _from_config(cls, config: UpcycledConfig, **named: Any) -> Any:
        return cls.of(config)._from_config(config, **named)


class UpcycledModel(_Head):
    """A base model without a head."""

    auto = AutoModel


class UpcycledForCausalLM(_Head):
    """A language model that reads from left to right."""

    auto = AutoModelForCausalLM


class UpcycledForMaskedLM(_Head):
    """A language model that fills in masked tokens."""

    auto = AutoModelForMaskedLM


class UpcycledForSequenceClassification(_Head):
    """A classifier of texts."""

    auto = AutoModelForSequenceClassification


class UpcycledForTokenClassification(_Head):
    """A classifier of tokens."""

    auto = AutoModelForTokenClassification


class UpcycledForQuestionAnswering(_Head):
    """A model that marks the answer in a text."""

    auto = AutoModelForQuestionAnswering


HEADS: Final[tuple[type[_Head], ...]] = (
    UpcycledModel,
    UpcycledForCausalLM,
    UpcycledForMaskedLM,
    UpcycledForSequenceClassification,
    UpcycledForTokenClassification,
    UpcycledForQuestionAnswering,
)

AutoConfig.register(MODEL_TYPE, UpcycledConfig, exist_ok=True)
for _head in HEADS:
    _head.auto.register(UpcycledConfig, _head, exist_ok=True)
