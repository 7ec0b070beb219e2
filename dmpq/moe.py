"""One view on every MoE family that uses transformers' experts interface.

The interface's decorator leaves flags on each experts module (``is_transposed``, ``has_gate``,
``has_bias``...). They are all that is read here, so that no family needs code of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from dmpq.errors import InputError, did_you_mean, first_line
from dmpq.overrides import overridden
from dmpq.spec import ModelSpec, MoELayer

IMPLEMENTATION: Final = "dmpq"
_FLAGS: Final = frozenset({"is_transposed", "has_gate", "has_bias", "num_experts"})
_EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_FORWARDS: Final = "_dmpq_forward"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADS: Final[dict[str, Any]] = {
    "language modelling": AutoModelForCausalLM,
    "sequence classification": AutoModelForSequenceClassification,
    "token classification": AutoModelForTokenClassification,
    "question answering": AutoModelForQuestionAnswering,
}
"""What a checkpoint is loaded as, by the kind of its head."""
_MOE_WITH_HEADS: Final = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "minimax", "gpt_oss", "deepseek_v3", "phimoe", "jamba"}
)
_REASONS: Final = {
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
    "automatic conversion": "weights of some experts are missing, or have other shapes than those "
    "of the rest",
}
"""What transformers means where it points at a report that it logs, and which is not shown."""


@dataclass(frozen=True, eq=False)
class Experts:
    """All routed experts of one MoE layer.

    Attributes:
        path: Module path of the container.
        module: The container, holding the experts' weights as 3-D parameters.
        router: The router's weight (E, hidden), where the family keeps one in the usual place.
    """

    path: str
    module: nn.Module
    router: torch.Tensor | None

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.down.shape[0]

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def gate_up(self) -> torch.Tensor:
        """Gate and up weights, or up alone, (E, out, in)."""
        return self.oriented(getattr(self.module, self._up_name))

    @property
    def down(self) -> torch.Tensor:
        """Down weights, (E, out, in)."""
        return self.oriented(self.module.down_proj)

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Gate and up weights, or up alone, and down weights, as the module holds them."""
        return getattr(self.module, self._up_name), self.module.down_proj  # type: ignore[return-value]

    def oriented(self, weight: Any) -> torch.Tensor:
        """Swap the last two dimensions where the family stores (in, out)."""
        oriented: torch.Tensor = weight.data.mT if self.module.is_transposed else weight.data
        return oriented

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weights (..., out, in) in the family's own memory order.

        Matrix products round differently on the other order, and full precision must stay the
        model's own to the bit.
        """
        return weight.mT.contiguous().mT if self.module.is_transposed else weight.contiguous()

    def stacked(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        copies: int = 1,
        only: int | None = None,
        gaps: bool = False,
    ) -> SimpleNamespace:
        """Return what the interface's forward reads, over other weights.

        Args:
            gate_up: (E * copies, out, in); the copies of an expert stand together.
            down: (E * copies, out, in).
            copies: Virtual experts per expert.
            only: Index of the one expert that the weights belong to (E = 1); ``None`` for all.
            gaps: Whether the index ``E * copies`` stands for no expert: nothing is computed for
                it, and it adds zeros. The interface means an expert on another device by it.
        """
        module = self.module
        view = {
            "num_experts": len(down),
            self._up_name: gate_up.mT if module.is_transposed else gate_up,
            "down_proj": down.mT if module.is_transposed else down,
            "_apply_gate": module._apply_gate,
            "_is_expert_parallel": gaps,
            **{flag: getattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")},
            "has_post_expert_norm": getattr(module, "has_post_expert_norm", False),
        }
        if not module.has_gate:
            view["act_fn"] = module.act_fn
        if module.has_bias:
            for name in (f"{self._up_name}_bias", "down_proj_bias"):
                bias = getattr(module, name) if only is None else getattr(module, name)[only, None]
                view[name] = bias.repeat_interleave(copies, 0)
        if view["has_post_expert_norm"]:
            view["post_expert_norm"] = module.post_expert_norm
        return SimpleNamespace(**view)


def run_stacked(
    view: SimpleNamespace, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run transformers' ``grouped_mm`` experts over the weights of :meth:`Experts.stacked`.

    Args:
        view: What the forward reads in place of a module.
        hidden: (T, H).
        index: int64 (T, K), virtual experts.
        weights: (T, K), routing weights.

    Returns:
        (T, H).
    """
    reads_as_module: Any = view
    return grouped_mm_experts_forward(reads_as_module, hidden, index, weights)


def _dispatch(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run an experts module by the function attached to it, else as the model would."""
    forward = vars(module).get(_FORWARDS, grouped_mm_experts_forward)
    result: torch.Tensor = forward(module, hidden, index, weights)
    return result


ExpertsInterface.register(IMPLEMENTATION, _dispatch)


class MoEModel:
    """A transformers model with its experts found and its experts forward replaceable.

    Args:
        model: A causal language model of a family that uses the experts interface.
        name: What to call it in results.
        revision: Revision of a hub model, where there is one.

    Raises:
        InputError: If the model has no experts, or keeps them outside the interface.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, revision: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.revision = revision
        self.containers = _find_containers(model)
        if not self.containers:
            raise _no_experts(model, name)
        model.set_experts_implementation(IMPLEMENTATION)
        for experts in self.containers:
            config: Any = experts.module.config
            used = config._experts_implementation
            if used != IMPLEMENTATION:
                raise InputError(
                    f"{experts.path} of {name} ignores the experts interface (it uses {used!r}); "
                    "this family is not supported."
                )

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's geometry, the experts' shapes read off their weights."""
        paths = [experts.path for experts in self.containers]
        spec = ModelSpec.from_config(self.model.config.to_dict(), name=self.name, paths=paths)
        layers = tuple(
            _measured(layer, experts)
            for layer, experts in zip(spec.moe_layers, self.containers, strict=True)
        )
        return replace(spec, moe_layers=layers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bf16 bytes of all parameters."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            data = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(data.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def experts_forward(self, forwards: Sequence[Any]) -> Iterator[None]:
        """Run each container by a function of the interface's signature while the block lasts."""
        modules = [experts.module for experts in self.containers]
        with overridden(modules, _FORWARDS, forwards):
            yield

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return next-token logits, fp32 (sequences, length, vocabulary)."""
        output = self.model(input_ids=token_ids, use_cache=False)
        logits: torch.Tensor = output.logits.float()
        return logits


def _find_containers(model: PreTrainedModel) -> tuple[Experts, ...]:
    found = []
    for path, module in model.named_modules():
        if not vars(module).keys() >= _FLAGS:
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        routers = (dict(parent.named_children()).get(name) for name in ("gate", "router"))
        weights = (dict(r.named_parameters()).get("weight") for r in routers if r is not None)
        router = next((w for w in weights if w is not None and len(w) == module.num_experts), None)
        found.append(Experts(path, module, router))
    return tuple(found)


def _measured(layer: MoELayer, experts: Experts) -> MoELayer:
    hidden, intermediate = experts.down.shape[1:]
    return replace(
        layer,
        num_experts=experts.num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=bool(experts.module.has_gate),
    )


def _no_experts(model: PreTrainedModel, name: str) -> InputError:
    config = model.config.get_text_config().to_dict()
    family = model.config.model_type
    if any((config.get(key) or 0) > 1 for key in _EXPERT_COUNTS):
        return InputError(
            f"{name} is a Mixture-of-Experts model of family {family!r}, which keeps its experts "
            "outside transformers' experts interface, so their widths cannot be set; use a family "
            "inside it, such as olmoe, mixtral, qwen3_moe or deepseek_v3."
        )
    return InputError(
        f"{name} is a dense model (family {family!r}): it has no experts to give bits to; "
        "use a Mixture-of-Experts model."
    )


def reference_path() -> Path:
    """Return the folder of the bundled reference checkpoint."""
    return Path(__file__).parent / "reference" / "model"


def load_model(
    name: str = "reference",
    *,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    head: str = "language modelling",
) -> tuple[MoEModel, Any]:
    """Load a checkpoint and its tokenizer, from safetensors only.

    Args:
        name: ``"reference"``, a local folder, or a hub id.
        revision: Revision of a hub model.
        device: Torch device. On a CPU weights are computed with in fp32, whatever their dtype.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        head: Kind of the model's head, a key of :data:`HEADS`.

    Raises:
        InputError: If there is no such model, no network, no weights, or no experts.
    """
    _check_device(device)
    source = str(reference_path()) if name == "reference" else name
    local = os.path.isdir(source)
    if local and not os.path.isfile(os.path.join(source, "config.json")):
        raise InputError(
            f"The folder {source} holds no checkpoint (no config.json); give a folder written by "
            "save_pretrained, or a hub id."
        )
    if local and revision is not None:
        raise InputError(
            f"The folder {name} has no revisions, so --revision {revision} names nothing; leave "
            "it out, or give a hub id."
        )
    if local:
        _refuse_pickles(source)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local,
        "trust_remote_code": trust_remote_code,
    }
    dtype: Any = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_head(name, config, head)
        loaded: Any = HEADS[head].from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader raises
        raise _load_error(name, local, error) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"The checkpoint {name} lacks {len(missing)} of its weights, among them {missing[0]}; "
            "complete it, or they would be random."
        )
    moe = MoEModel(model.to(device), name=name, revision=revision)
    _check_weights(moe)
    return moe, tokenizer


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises its own
        raise InputError(
            f"The device {device!r} cannot be used ({first_line(error)}); try 'cpu'."
        ) from error


def _check_head(name: str, config: Any, head: str) -> None:
    """Refuse a family that has no model with such a head; of language models all are let by."""
    mapping = HEADS[head]._model_mapping
    if HEADS[head] is AutoModelForCausalLM or type(config) in mapping:
        return
    known = {other.model_type for other in mapping}
    families = sorted(f for f in known if f in _MOE_WITH_HEADS)
    raise InputError(
        f"{name} is of family {config.model_type!r}, of which this version of transformers has no "
        f"model for {head}; Mixture-of-Experts families that have one: {', '.join(families)}."
    )


def _refuse_pickles(folder: str) -> None:
    names = os.listdir(folder)
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"The checkpoint in {folder} cannot be read: its weights are a pickle ({pickled[0]}), "
            "and no pickle is ever opened, since it can run code; convert it to safetensors."
        )


def _check_weights(moe: MoEModel) -> None:
    """Refuse weights that would only fail later, and there without a reason."""
    for path, parameter in moe.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"The checkpoint {moe.name} holds values in {path} that are not finite; "
                "it is damaged, or overflowed where it was converted: get it again."
            )
    initial = moe.model.config.to_dict().get("router_init_norms")
    if initial is not None and not _fits(initial, moe.containers):
        raise InputError(
            f"The config.json of {moe.name} gives router_init_norms of other layers or experts "
            "than the weights have; correct or remove them."
        )


def _fits(norms: Any, containers: Sequence[Experts]) -> bool:
    """Return whether there is one number for each expert of each layer."""
    if not isinstance(norms, list) or len(norms) != len(containers):
        return False
    return all(
        isinstance(row, list)
        and len(row) == experts.num_experts
        and all(isinstance(norm, int | float) for norm in row)
        for row, experts in zip(norms, containers, strict=True)
    )


def _load_error(name: str, local: bool, error: Exception) -> InputError:
    reason = first_line(error)
    if local:
        plain = next((text for sign, text in _REASONS.items() if sign in str(error)), reason)
        return InputError(
            f"The checkpoint in {name} cannot be read: {plain}; get it again, or write it by "
            "save_pretrained."
        )
    hint = did_you_mean(name, ["reference"])
    return InputError(
        f"There is no folder {name!r}{hint}, and the hub has not delivered a model of that name "
        f"({reason}); give 'reference', a local folder, or a hub id with a network at hand."
    )
