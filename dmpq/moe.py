"""One view on the MoE models of every family, and how a checkpoint of one is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from dmpq.adapters.stacked import StackedExperts
from dmpq.errors import InputError, did_you_mean, first_line
from dmpq.experts import FORWARD, IMPLEMENTATION, Experts, run_stacked
from dmpq.families import auto_class, find_containers, no_experts, refusal
from dmpq.overrides import overridden
from dmpq.spec import ModelSpec

__all__ = ["Experts", "MoEModel", "TextModel", "load_model", "reference_path", "run_stacked"]

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LANGUAGE_MODELLING: Final = "language modelling"
HEADS: Final[dict[str, Any]] = {
    "sequence classification": AutoModelForSequenceClassification,
    "token classification": AutoModelForTokenClassification,
    "question answering": AutoModelForQuestionAnswering,
}
"""What a checkpoint of a task is loaded as, by the kind of its head."""
_MOE_WITH_HEADS: Final = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "minimax", "gpt_oss", "deepseek_v3", "phimoe", "jamba"}
)
_REASONS: Final = {
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
    "automatic conversion": "weights of some experts are missing, or have other shapes than those "
    "of the rest",
}
"""What transformers means where it points at a report that it logs, and which is not shown."""


class TextModel:
    """A transformers model that reads text, with experts or without.

    Attributes:
        model: As transformers loaded it, frozen.
        name: What to call it in results.
        revision: Revision of a hub model, where there is one.
        containers: The experts that text can reach, in the order in which a forward runs them.
    """

    containers: tuple[Experts, ...] = ()

    def __init__(self, model: PreTrainedModel, *, name: str, revision: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.revision = revision

    def read(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the tokens that logits follow: each position's predict the next one's token.

        Of an encoder-decoder, the encoder reads the first half of a window, and the decoder its
        start token and the second half; of all others the window itself.

        Args:
            token_ids: int64 (sequences, length), windows of text.

        Returns:
            int64 (sequences, length), or (sequences, 1 + half the length).
        """
        if not self.model.config.is_encoder_decoder:
            return token_ids
        second = token_ids[:, token_ids.shape[1] // 2 :]
        return torch.cat([torch.full_like(second[:, :1], self.decoder_start), second], 1)

    @cached_property
    def decoder_start(self) -> int:
        """Token by which the decoder of an encoder-decoder starts."""
        config = self.model.config.to_dict()
        keys = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
        return next((config[key] for key in keys if config.get(key) is not None), 0)

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return next-token logits, fp32, of the tokens that :meth:`read` returns.

        Args:
            token_ids: int64 (sequences, length), windows of text.

        Returns:
            (sequences, length as read, vocabulary).
        """
        inputs = {"input_ids": token_ids}
        if self.model.config.is_encoder_decoder:
            inputs["input_ids"] = token_ids[:, : token_ids.shape[1] // 2]
            inputs["decoder_input_ids"] = self.read(token_ids)
        output = self.model(**inputs, use_cache=False)
        logits: torch.Tensor = output.logits.float()
        return logits


class MoEModel(TextModel):
    """A transformers model with its experts found and its experts forward replaceable.

    Attributes:
        containers: The experts that text can reach, in the order in which a forward runs them.
        unread: Containers that text alone never reaches, such as experts for pictures; they keep
            the checkpoint's precision, and count as other weights.

    Args:
        model: A language model of any supported family.
        name: What to call it in results.
        revision: Revision of a hub model, where there is one.

    Raises:
        InputError: If the model has no experts, or is of a family that is refused.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, revision: str | None = None) -> None:
        refused = refusal(model.config.model_type, name)
        if refused is not None:
            raise refused
        super().__init__(model, name=name, revision=revision)
        self.containers = find_containers(model)
        self.unread: tuple[Experts, ...] = ()
        if not self.containers:
            raise no_experts(model, name)
        model.set_experts_implementation(IMPLEMENTATION)
        for experts in self.containers:
            if isinstance(experts.module, StackedExperts):
                continue  # runs by what is attached to it, whatever the config says
            config: Any = experts.module.config
            used = config._experts_implementation
            if used != IMPLEMENTATION:
                raise InputError(
                    f"{experts.path} of {name} ignores the experts interface (it uses {used!r}); "
                    "this family is not supported."
                )
        if model.config.get_text_config() is not model.config and model.device.type != "meta":
            self._leave_out_what_text_never_reaches()

    def _leave_out_what_text_never_reaches(self) -> None:
        """Run two tokens of text, and keep the containers that ran, in the order they ran in."""
        found, order = self.containers, []

        def noting(experts: Experts) -> Any:
            def forward(*inputs: Any) -> torch.Tensor:
                order.append(experts)
                return run_stacked(*inputs)

            return forward

        ids = torch.tensor([_text_tokens(self.model.config)], device=self.model.device)
        with torch.inference_mode(), self.experts_forward([noting(e) for e in found]):
            self.logits(ids)
        if len(set(order)) < len(order):
            raise InputError(
                f"{self.name} runs {order[0].path} more than once in a forward; such a family "
                "(layers that share experts) is not supported."
            )
        self.containers = tuple(order)
        self.unread = tuple(experts for experts in found if experts not in order)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's geometry, shapes of experts and the count of weights read off the model."""
        paths = [experts.path for experts in self.containers]
        spec = ModelSpec.from_config(self.model.config.to_dict(), name=self.name, paths=paths)
        layers = tuple(
            experts.geometry(layer)
            for layer, experts in zip(spec.moe_layers, self.containers, strict=True)
        )
        found = replace(spec, moe_layers=layers)
        return found.counted(sum(one.numel() for one in self.model.parameters()))

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
        with overridden(modules, FORWARD, forwards):
            yield


def _text_tokens(config: Any) -> tuple[int, int]:
    """Return two token ids that stand for no picture, sound, or other placeholder."""
    special = {
        value
        for key, value in config.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    first, second = [token for token in range(len(special) + 2) if token not in special][:2]
    return first, second


def reference_path() -> Path:
    """Return the folder of the bundled reference checkpoint."""
    return Path(__file__).parent / "reference" / "model"


def checkpoint_source(name: str, revision: str | None = None) -> tuple[str, bool]:
    """Return where a checkpoint is read from, and whether that is a folder of this machine.

    Args:
        name: ``"reference"``, a local folder, or a hub id.
        revision: Revision of a hub model.

    Raises:
        InputError: If the folder holds no checkpoint, or a pickle; or is given a revision.
    """
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
    return source, local


def load_model(
    name: str = "reference",
    *,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    head: str = LANGUAGE_MODELLING,
) -> tuple[MoEModel, Any]:
    """Load a checkpoint and its tokenizer, from safetensors only.

    Args:
        name: ``"reference"``, a local folder, or a hub id.
        revision: Revision of a hub model.
        device: Torch device. On a CPU weights are computed with in fp32, whatever their dtype.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        head: Kind of the model's head: :data:`LANGUAGE_MODELLING`, or a key of :data:`HEADS`.

    Raises:
        InputError: If there is no such model, no network, no weights, or no experts.
    """
    check_device(device)
    dtype = torch.float32 if torch.device(device).type == "cpu" else None
    model, tokenizer = load_transformer(
        name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, head=head
    )
    moe = MoEModel(_moved(model, device), name=name, revision=revision)
    check_weights(moe)
    return moe, tokenizer


def load_transformer(
    name: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: str = LANGUAGE_MODELLING,
    new_head: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a checkpoint, with experts or without, and its tokenizer, from safetensors only.

    Args:
        name: As for :func:`load_model`.
        dtype: Of the weights; ``None`` for that of the checkpoint.
        revision: As for :func:`load_model`.
        trust_remote_code: As for :func:`load_model`.
        head: As for :func:`load_model`.
        new_head: Entries of the configuration, such as ``id2label``, by which the model gets a
            head of its own, at random where the checkpoint has none of that shape; ``None`` to
            refuse a checkpoint that lacks any weight.

    Raises:
        InputError: If there is no such model, no network, or no weights.
    """
    source, local = checkpoint_source(name, revision)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local,
        "trust_remote_code": trust_remote_code,
    }
    resized = {} if new_head is None else {"ignore_mismatched_sizes": True, **new_head}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_head(name, config, head)
        kind = auto_class(config) if head == LANGUAGE_MODELLING else HEADS[head]
        loaded: Any = kind.from_pretrained(
            source,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **resized,
        )
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader raises
        raise _load_error(name, local, error) from error
    tokenizer = load_tokenizer(name, source, options)
    model, report = loaded
    head_keys = _of_the_head(model)
    missing = sorted(set(report["missing_keys"]) - (set() if new_head is None else head_keys))
    other = sorted({key for key, *_ in report["mismatched_keys"]} - head_keys)
    if other:
        raise InputError(
            f"The checkpoint in {name} cannot be read: {_REASONS['ignore_mismatched_sizes']}, "
            f"among them {other[0]}; get it again, or write it by save_pretrained."
        )
    if missing:
        refused = HeadMissingError if set(missing) <= head_keys else InputError
        raise refused(
            f"The checkpoint {name} lacks {len(missing)} of its weights, among them {missing[0]}; "
            "complete it, or they would be random."
        )
    return model, tokenizer


class HeadMissingError(InputError):
    """A checkpoint has all weights but those of the head that it was to be loaded with."""


def _of_the_head(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights outside the base model."""
    prefix = f"{model.base_model_prefix}."
    return {key for key in model.state_dict() if not key.startswith(prefix)}


def _moved(model: Any, device: str) -> PreTrainedModel:
    """Return a model on a device; the types of ``to`` are lost behind a decorator."""
    moved: PreTrainedModel = model.to(device)
    return moved


def load_tokenizer(name: str, source: str | Path, options: Mapping[str, Any]) -> Any:
    """Load a checkpoint's tokenizer.

    Args:
        name: The checkpoint, for the error.
        source: A folder, or a hub id.
        options: Of ``from_pretrained``.

    Raises:
        InputError: If it has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise needs_its_code(name, error) or InputError(
            f"The checkpoint {name} has no tokenizer that can be read ({first_line(error)}); put "
            "its tokenizer files (tokenizer.json, or tokenizer.model) into the folder."
        ) from error


def check_device(device: str) -> None:
    """Refuse a torch device that cannot be used.

    Raises:
        InputError: If it cannot.
    """
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises its own
        raise InputError(
            f"The device {device!r} cannot be used ({first_line(error)}); try 'cpu'."
        ) from error


def _check_head(name: str, config: Any, head: str) -> None:
    """Refuse a family that has no model with such a head; of language models all are let by."""
    if head == LANGUAGE_MODELLING or type(config) in HEADS[head]._model_mapping:
        return
    mapping = HEADS[head]._model_mapping
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


def check_weights(moe: TextModel) -> None:
    """Refuse weights that would only fail later, and there without a reason.

    Raises:
        InputError: If some are not finite, or the router's initial norms do not fit.
    """
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


def needs_its_code(name: str, error: Exception) -> InputError | None:
    """Return the refusal of a checkpoint whose own code may not run; ``None`` for other errors."""
    if "contains custom code" not in str(error):
        return None
    return InputError(
        f"The checkpoint {name} comes with code of its own, which has not run; read it, and allow "
        "it by --trust-remote-code, or give another checkpoint."
    )


def _load_error(name: str, local: bool, error: Exception) -> InputError:
    refused = needs_its_code(name, error)
    if refused is not None:
        return refused
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
