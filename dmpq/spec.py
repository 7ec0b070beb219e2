"""The geometry of a Mixture-of-Experts model: every shape that a cost depends on, no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Final, get_type_hints

import numpy as np
from numpy.typing import NDArray

from dmpq import hf_config
from dmpq.errors import InputError, unknown
from dmpq.formats import Menu

GEOMETRIES: Final = ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b")

_MAX_COUNT: Final = 1 << 40
_MAX_LAYERS: Final = 1 << 16


@dataclass(frozen=True)
class MoELayer:
    """The routed experts of one layer, all of one shape.

    Attributes:
        path: Module path of the experts container.
        num_experts: Routed experts, E.
        top_k: Experts that each token selects.
        hidden_size: Width of the residual stream, H.
        intermediate_size: Width inside an expert, I.
        gated: Whether a gate projection stands beside the up projection.
        shared_intermediate_size: Summed width of the shared experts; 0 for none.
    """

    path: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, may_be_zero=("shared_intermediate_size",))
        if self.top_k > self.num_experts:
            raise InputError(
                f"{self.path} selects {self.top_k} of {self.num_experts} experts per token; "
                "top_k may be at most num_experts."
            )

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """Shape (out, in) of the gate and up projections, stacked."""
        return (2 if self.gated else 1) * self.intermediate_size, self.hidden_size

    @property
    def down_shape(self) -> tuple[int, int]:
        """Shape (out, in) of the down projection."""
        return self.hidden_size, self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts of this layer."""
        return self.num_experts * (math.prod(self.gate_up_shape) + math.prod(self.down_shape))

    @property
    def resident_parameters(self) -> int:
        """Weights that every token uses: the router and the shared experts."""
        matrices = 3 if self.gated else 2
        shared = matrices * self.hidden_size * self.shared_intermediate_size
        return self.num_experts * self.hidden_size + shared


@dataclass(frozen=True)
class ModelSpec:
    """The geometry of a model.

    Attributes:
        name: What to call it.
        model_type: Family, as in the Hugging Face config.
        hidden_size: Width of the residual stream.
        num_layers: Decoder layers, with and without experts.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding.
        tie_word_embeddings: Whether the head shares the embedding's weights.
        dense_intermediate_size: Width of the layers without experts; 0 where all have some.
        moe_layers: Layers with experts, in order.
        dtype_bytes: Bytes of a weight that is not quantized.
        attention_parameters: Weights of one layer's attention with its norms; 0 to derive them
            from the heads.
        cache_values: Numbers that one token leaves in one layer's KV cache; 0 for a key and a
            value per head (latent attention keeps fewer).
        rotated_values: Of ``cache_values``, those of the rotated key that all heads share.
        key_dim: Width of a query and a key where latent attention makes them anew; 0 for
            ``head_dim``.
        value_dim: Width of a value there, likewise.
        sliding_window: Tokens that a layer with a window attends to; 0 for no such layers.
        windowed_layers: How many of the layers have it.
        counted_parameters: Weights outside the routed experts, as a model at hand counts its own;
            0 to derive them from the widths. Geometries that differ in it alone are equal.
    """

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    dense_intermediate_size: int
    moe_layers: tuple[MoELayer, ...]
    dtype_bytes: int = 2
    attention_parameters: int = 0
    cache_values: int = 0
    rotated_values: int = 0
    key_dim: int = 0
    value_dim: int = 0
    sliding_window: int = 0
    windowed_layers: int = 0
    counted_parameters: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        optional = [f.name for f in fields(self) if f.default == 0]
        _check_numbers(self, may_be_zero=["dense_intermediate_size", *optional])
        if not 0 < len(self.moe_layers) <= self.num_layers:
            raise InputError(
                f"{self.name} has {len(self.moe_layers)} MoE layers among {self.num_layers}; "
                "there must be at least one, and no more than layers."
            )
        if self.windowed_layers > self.num_layers or (self.windowed_layers > 0) != (
            self.sliding_window > 0
        ):
            raise InputError(
                f"{self.name} has a window of {self.sliding_window} tokens in "
                f"{self.windowed_layers} of {self.num_layers} layers; give both or neither, and "
                "no more than layers."
            )
        if self.rotated_values > self.cache_values:
            raise InputError(
                f"{self.name} caches {self.cache_values} numbers a token, and "
                f"{self.rotated_values} of them as a rotated key; these may not be more than all."
            )
        _check_layers(self.num_layers, self.name)
        if len({layer.path for layer in self.moe_layers}) != len(self.moe_layers):
            raise InputError(f"{self.name} names an experts path twice; every path must differ.")

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers, N."""
        return sum(layer.num_experts for layer in self.moe_layers)

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts."""
        return sum(layer.expert_parameters for layer in self.moe_layers)

    @property
    def gated(self) -> bool:
        """Whether experts, and the blocks in their place, have a gate beside the up projection."""
        return self.moe_layers[0].gated

    @property
    def attention_parameters_per_layer(self) -> int:
        """Weights of one layer's attention, with the norms of the layer."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.attention_parameters or self.hidden_size * (heads + 2)

    @property
    def cache_values_per_token(self) -> int:
        """Numbers that one token leaves in one layer's KV cache."""
        return self.cache_values or 2 * self.num_key_value_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, which are also those of an output head."""
        return self.vocab_size * self.hidden_size

    @property
    def dense_block_parameters(self) -> int:
        """Weights of the block, gated as experts are, that stands where a layer has none."""
        matrices = 3 if self.gated else 2
        return matrices * self.hidden_size * self.dense_intermediate_size

    @property
    def other_parameters(self) -> int:
        """Weights outside the routed experts, all kept at the checkpoint's own precision.

        A count of them is exact; widths alone tell nothing of vision towers, state spaces, or
        attention that no rule here knows.
        """
        if self.counted_parameters:
            return self.counted_parameters
        dense_layers = self.num_layers - len(self.moe_layers)
        return (
            self.num_layers * self.attention_parameters_per_layer
            + dense_layers * self.dense_block_parameters
            + sum(layer.resident_parameters for layer in self.moe_layers)
            + self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
            + self.hidden_size
        )

    def counted(self, parameters: int) -> ModelSpec:
        """Return the geometry of a model that has so many weights in all, the experts' included.

        It is this one where the widths tell as much.
        """
        others = parameters - self.expert_parameters
        derived = replace(self, counted_parameters=0)
        if others == derived.other_parameters:
            return derived
        return replace(self, counted_parameters=others)

    @cached_property
    def layer_of_expert(self) -> NDArray[np.int64]:
        """MoE layer ordinal of each expert, shape (N,)."""
        counts = [layer.num_experts for layer in self.moe_layers]
        return np.repeat(np.arange(len(counts)), counts)

    def stored_bits(self, menu: Menu) -> NDArray[np.int64]:
        """Return the bits of each expert's gate+up and down in each format, shape (N, 2, B).

        Raises:
            InputError: If a group size does not divide an expert's width.
        """
        per_layer = np.array(
            [
                (menu.stored_bits(layer.gate_up_shape), menu.stored_bits(layer.down_shape))
                for layer in self.moe_layers
            ]
        )
        stored: NDArray[np.int64] = per_layer[self.layer_of_expert]
        return stored

    def with_widths_of(self, other: ModelSpec) -> ModelSpec:
        """Return this model's layers, experts and vocabulary at another model's widths.

        Hidden, expert and attention widths are the other's; shared and dense widths keep their
        proportion to an expert's.
        """
        pattern = other.moe_layers[0]

        def scaled(width: int, layer: MoELayer) -> int:
            return round(width * pattern.intermediate_size / layer.intermediate_size)

        layers = tuple(
            replace(
                layer,
                hidden_size=pattern.hidden_size,
                intermediate_size=pattern.intermediate_size,
                gated=pattern.gated,
                shared_intermediate_size=scaled(layer.shared_intermediate_size, layer),
            )
            for layer in self.moe_layers
        )
        taken = (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "dtype_bytes",
            "attention_parameters",
            "cache_values",
            "rotated_values",
            "key_dim",
            "value_dim",
            "sliding_window",
        )
        windowed = round(other.windowed_layers * self.num_layers / other.num_layers)
        return replace(
            self,
            name=f"{self.name} at {other.name}'s widths",
            dense_intermediate_size=scaled(self.dense_intermediate_size, self.moe_layers[0]),
            moe_layers=layers,
            windowed_layers=max(windowed, min(1, other.windowed_layers)),
            counted_parameters=0,
            **{name: getattr(other, name) for name in taken},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the geometry as a plain dict."""
        data = asdict(self)
        if not self.counted_parameters:
            del data["counted_parameters"]
        data["moe_layers"] = list(data["moe_layers"])
        return data

    @classmethod
    def from_json(cls, data: Any) -> ModelSpec:
        """Return the geometry that :meth:`to_json` wrote.

        Raises:
            InputError: If a field is missing, unknown, or of the wrong type.
        """
        values = _read_fields(cls, data, "geometry")
        layers = values["moe_layers"]
        if not isinstance(layers, list | tuple):
            raise InputError("The geometry's moe_layers is not a list; write one object a layer.")
        values["moe_layers"] = tuple(
            MoELayer(**_read_fields(MoELayer, layer, f"geometry's MoE layer {i}"))
            for i, layer in enumerate(layers)
        )
        return cls(**values)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        name: str,
        paths: Sequence[str] | None = None,
    ) -> ModelSpec:
        """Return the geometry that a Hugging Face ``config.json`` describes.

        Args:
            config: The parsed file; of a multimodal model, its text part is read.
            name: What to call the model.
            paths: Module paths of the experts containers, where a loaded model tells them;
                ``None`` to follow the config's rule for sparse layers.

        Raises:
            InputError: If the config has no experts, or a width is missing.
        """
        text = config.get("text_config")
        text = hf_config.usual_names(text if isinstance(text, Mapping) else config)
        experts = hf_config.first_number(text, hf_config.EXPERT_COUNTS, name)
        if experts < 2:
            raise InputError(
                f"{name} is a dense model: it has no experts to give bits to; "
                "use a Mixture-of-Experts model."
            )
        layers = hf_config.layer_count(text, name)
        _check_layers(layers, name)
        width = hf_config.first_number(text, hf_config.EXPERT_WIDTHS, name)
        if paths is None:
            sparse = [i for i in range(layers) if hf_config.is_sparse(text, i)]
            paths = [f"model.layers.{i}.mlp.experts" for i in sparse]
        hidden = hf_config.first_number(text, ("hidden_size",), name)
        heads = hf_config.first_number(text, ("num_attention_heads",), name)
        moe_layer = MoELayer(
            path="experts",
            num_experts=experts,
            top_k=hf_config.first_number(text, hf_config.TOP_KS, name),
            hidden_size=hf_config.expert_hidden(text, hidden),
            intermediate_size=width,
            gated=hf_config.gated(text),
            shared_intermediate_size=hf_config.shared_width(text, width),
        )
        return cls(
            name=name,
            model_type=str(text.get("model_type", config.get("model_type", ""))),
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            vocab_size=hf_config.first_number(text, ("vocab_size",), name),
            tie_word_embeddings=bool(
                text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
            ),
            dense_intermediate_size=(
                hf_config.first_number(text, hf_config.DENSE_WIDTHS, name)
                if len(paths) < layers
                else 0
            ),
            moe_layers=tuple(replace(moe_layer, path=path) for path in paths),
            attention_parameters=hf_config.attention_parameters(text, hidden, heads),
            cache_values=hf_config.latent_width(text),
            **hf_config.latent_dims(text),
            **hf_config.windows(text, layers),
        )


def load_geometry(name_or_path: str) -> ModelSpec:
    """Return a shipped geometry by name, or that of a ``config.json``, or of its folder.

    Raises:
        InputError: If there is no such geometry, or the file is no config of an MoE model.
    """
    if name_or_path in GEOMETRIES:
        file = resources.files("dmpq") / "geometries" / f"{name_or_path}.json"
        return ModelSpec.from_config(json.loads(file.read_text("utf-8")), name=name_or_path)
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise unknown("geometry", name_or_path, GEOMETRIES, "Or give the path of a config.json.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a model's config.json.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object; give a model's config.json.")
    try:
        return ModelSpec.from_config(config, name=path.parent.name or path.stem)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{path} describes no geometry ({type(error).__name__}: {error}); give the "
            "config.json of an MoE model."
        ) from error


def _check_layers(layers: int, name: str) -> None:
    """Refuse more layers than any model has: costs take memory for each."""
    if layers > _MAX_LAYERS:
        raise InputError(f"{name} has {layers} layers; give a model of at most {_MAX_LAYERS}.")


def _check_numbers(owner: MoELayer | ModelSpec, *, may_be_zero: Sequence[str]) -> None:
    """Refuse numbers of no sense: costs are computed from them without another look."""
    for name, hint in get_type_hints(type(owner)).items():
        if hint is not int:
            continue
        value, least = getattr(owner, name), 0 if name in may_be_zero else 1
        if not least <= value <= _MAX_COUNT:
            raise InputError(
                f"The geometry's {name} is {value}; give a whole number from {least} to "
                f"{_MAX_COUNT}."
            )


def _read_fields(kind: type[Any], data: Any, what: str) -> dict[str, Any]:
    """Return the values of a dataclass's fields from a JSON object, their types checked."""
    if not isinstance(data, dict):
        raise InputError(f"The {what} is not a JSON object; write its fields as names and values.")
    hints = get_type_hints(kind)
    strange = next((key for key in data if key not in hints), None)
    if strange is not None:
        raise unknown(f"field of the {what}", str(strange), hints)
    for known in fields(kind):
        if known.name not in data:
            if known.default is known.default_factory:
                raise InputError(f"The {what} has no {known.name}; add it.")
            continue
        hint, value = hints[known.name], data[known.name]
        if hint in (int, str, bool) and type(value) is not hint:
            raise InputError(
                f"The {what}'s {known.name} is {value!r}; it must be of type {hint.__name__}."
            )
    return dict(data)
