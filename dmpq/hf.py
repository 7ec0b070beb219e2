"""``import dmpq.hf``: transformers loads quantized checkpoints that ``dmpq.apply`` wrote.

After the import, ``AutoModelForCausalLM.from_pretrained(DIR)`` builds the ordinary model with its
experts packed (:mod:`dmpq.checkpoints.packed`), and ``generate``, ``save_pretrained`` and device
maps work as they do elsewhere. Without it such a folder does not load: a tensor in it has a shape
that no model has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dmpq.adapters.stacked import StackedExperts
from dmpq.bitmap import PROJECTIONS, LayerAssignment
from dmpq.checkpoints.checkpoint import grouped
from dmpq.checkpoints.packed import CHILD, PackedExperts, PackedLayer
from dmpq.checkpoints.tensor_files import TensorFile, TensorInfo
from dmpq.errors import InputError, first_line, unknown
from dmpq.experts import Experts
from dmpq.families import find_containers
from dmpq.formats import Format, Menu
from dmpq.spec import MoELayer

METHOD: Final = "dmpq"
VERSION: Final = 1
IMPLEMENTATION: Final = "dmpq_packed"


@register_quantization_config(METHOD)
class DmpqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a folder: the formats on offer, and each expert's.

    Args:
        quantizer: Name and whether symmetric, as in a bit map.
        choices: Menu key → bits and group size.
        assignment: Container → a menu key per expert, or such lists for ``gate_up`` and ``down``.
        fingerprint: SHA-256 of the weights that were quantized.
        version: Of the layout.
        quant_method: Always ``"dmpq"``.

    Raises:
        InputError: If it was written by a later version, or is malformed.
    """

    def __init__(
        self,
        quantizer: Mapping[str, Any],
        choices: Mapping[str, Mapping[str, int]],
        assignment: Mapping[str, LayerAssignment],
        fingerprint: str,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if version != VERSION:
            raise InputError(
                f"The checkpoint is laid out by version {version!r} of dmpq's format, this dmpq "
                f"reads {VERSION}; load it with the dmpq that wrote it."
            )
        if not isinstance(assignment, Mapping):
            raise InputError(
                f"The checkpoint's quantization_config has the assignment {str(assignment)[:80]}, "
                "which is no mapping; get it again."
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version
        self.quantizer = quantizer
        self.choices = choices
        self.assignment = assignment
        self.fingerprint = fingerprint
        if choices != _choices(self.menu):
            raise InputError(
                "The checkpoint's quantization_config gives other bits and group sizes than the "
                f"names of its choices say ({', '.join(self.menu.keys)}); it was edited: get it "
                "again."
            )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read it from ``config.json``.

        Raises:
            InputError: If a key is missing, or is none of its keys.
        """
        try:
            own = super().from_dict(  # type: ignore[no-untyped-call]
                config_dict, return_unused_kwargs, **kwargs
            )
        except TypeError as error:
            raise InputError(
                f"The checkpoint's quantization_config has missing or unknown keys "
                f"({first_line(error)}); it was edited: get it again."
            ) from error
        return own

    @property
    def digest(self) -> str:
        """SHA-256 of which expert has which format, which the files with the weights hold too."""
        content = [self.version, self.quantizer, self.choices, self.assignment, self.fingerprint]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def menu(self) -> Menu:
        """The formats on offer."""
        try:
            name, symmetric = self.quantizer["name"], self.quantizer["symmetric"]
            if not isinstance(name, str) or not isinstance(symmetric, bool):
                raise TypeError("a name, and true or false")
            return Menu.parse(list(self.choices), quantizer=name, symmetric=symmetric)
        except (KeyError, TypeError) as error:
            raise InputError(
                "The checkpoint's quantization_config names no quantizer or choices; get it again."
            ) from error

    def layer(self, layer: MoELayer, dtype: torch.dtype) -> PackedLayer:
        """Return what is stored of a layer.

        Raises:
            InputError: If the configuration is of other experts.
        """
        given = self.assignment.get(layer.path)
        keys = [given.get(n) for n in PROJECTIONS] if isinstance(given, Mapping) else [given] * 2
        for part in keys:
            if not isinstance(part, list) or len(part) != layer.num_experts:
                raise InputError(
                    f"The checkpoint's quantization_config gives no list of {layer.num_experts} "
                    f"formats for {layer.path}; it was edited, or belongs to another model."
                )
            strange = [key for key in part if not isinstance(key, str) or key not in self.choices]
            if strange:
                raise unknown(f"format in {layer.path}", str(strange[0]), self.choices)
        up, down = (tuple(map(str, part or ())) for part in keys)
        pruned = [[Format.parse(key).is_pruned for key in side] for side in (up, down)]
        if pruned[0] != pruned[1]:
            raise InputError(
                f"The checkpoint's quantization_config prunes (0) one of the projections of an "
                f"expert in {layer.path}, and not the other; it was edited: get it again."
            )
        return PackedLayer(layer, self.menu, (up, down), dtype)


@register_quantizer(METHOD)
class DmpqHfQuantizer(HfQuantizer):
    """Puts packed experts in the place of a model's, before its weights are loaded."""

    requires_calibration = True
    quantization_config: DmpqConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        containers = find_containers(model)
        unknown_paths = self.quantization_config.assignment.keys() - {c.path for c in containers}
        if unknown_paths:
            raise InputError(
                f"The checkpoint's quantization_config names {sorted(unknown_paths)[0]}, which "
                "the model does not have; it was edited, or belongs to another model."
            )
        stored: dict[str, TensorInfo] = {}
        for experts in containers:
            if experts.path not in self.quantization_config.assignment:
                continue  # experts that text does not reach are as they were
            packed = self.quantization_config.layer(experts.geometry(), experts.down.dtype)
            stored |= packed.tensors()
            pack(model, experts, PackedExperts(packed))
            # Some families draw an expert's weights at random from the block around it.
            block = model.get_submodule(experts.path.rpartition(".")[0])
            block._is_hf_initialized = True  # type: ignore[assignment]
        model.set_experts_implementation(IMPLEMENTATION)
        _ignore_guards(model, containers)
        if checkpoint_files:
            found = _checked_files(checkpoint_files, stored, self.quantization_config.digest)
            _check_whole(model, found)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, buffer in model.named_buffers():
            if f".{CHILD}." not in name or buffer.is_meta or not buffer.is_floating_point():
                continue
            if not torch.isfinite(buffer).all():
                raise InputError(
                    f"The quantized checkpoint holds values in {name} that are not finite; it is "
                    "damaged: write it again with dmpq.apply."
                )

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` writes what was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained; they cannot."""
        return False


def pack(model: PreTrainedModel, experts: Experts, packed: PackedExperts) -> None:
    """Replace a container's weights by packed ones."""
    container = model.get_submodule(experts.path)
    for module in container.modules():
        # Nothing of it is to be drawn at random: what is missing on disk is refused.
        module._is_hf_initialized = True  # type: ignore[assignment]
    for path in experts.own_parameters():
        holder, _, name = path.rpartition(".")
        delattr(model.get_submodule(holder), name)
    container.add_module(CHILD, packed)
    if isinstance(experts.module, StackedExperts):
        experts.module.run_packed(CHILD, packed, _run)


def _run(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run a packed container; the signature of the experts interface."""
    packed: PackedExperts = module.get_submodule(CHILD)  # type: ignore[assignment]
    return packed.run(Experts("", module, None), hidden, index, weights)


ExpertsInterface.register(IMPLEMENTATION, _run)


def guard_name(experts: Experts) -> str:
    """Return the tensor whose shape keeps a plain ``from_pretrained`` from random experts.

    It has no values, and the name of a parameter that only an unpacked model has.
    """
    return experts.own_parameters(0)[0]


def _ignore_guards(model: PreTrainedModel, containers: Sequence[Experts]) -> None:
    known = list(model._keys_to_ignore_on_load_unexpected or [])
    guards = [f"{re.escape(guard_name(experts))}$" for experts in containers]
    model._keys_to_ignore_on_load_unexpected = {*known, *guards}


def _checked_files(
    files: Sequence[str], stored: Mapping[str, TensorInfo], digest: str
) -> dict[str, TensorInfo]:
    """Return what files hold; refuse such as lack a packed tensor, or are of another map."""
    opened = [TensorFile(file) for file in files]
    # What ``save_pretrained`` writes again has no digest.
    if any(file.metadata.get(METHOD, digest) != digest for file in opened):
        raise InputError(
            "The quantized checkpoint's config.json gives experts other formats than its weights "
            "were written with; it was edited: write it again with dmpq.apply."
        )
    found = {name: info for file in opened for name, info in file.tensors.items()}
    strange = next((name for name in found if f".{CHILD}." in name and name not in stored), None)
    if strange is not None:
        raise InputError(
            f"The quantized checkpoint holds {strange}, of which its config.json says nothing; it "
            "was edited: write it again with dmpq.apply."
        )
    for name, info in stored.items():
        if name not in found:
            what = "is missing"
        elif found[name].shape != info.shape:
            what = f"is {found[name].shape}, not {info.shape}"
        elif not _same_kind(found[name].dtype, info.dtype):
            what = f"is of {found[name].dtype}, not {info.dtype}"
        else:
            continue
        raise InputError(
            f"The quantized checkpoint does not hold what its config.json says: {name} "
            f"{what}; it was edited or is incomplete: write it again with dmpq.apply."
        )
    return found


def _check_whole(model: PreTrainedModel, found: Iterable[str]) -> None:
    """Refuse files that lack weights beside the experts': transformers would draw them at random.

    A head that the checkpoint was not written with, such as a classifier, is the user's own.
    """
    there = grouped(model, found).keys()
    tied = model.all_tied_weights_keys
    whole = type(model).__name__ in (model.config.architectures or ())
    prefix = "" if whole else f"{model.base_model_prefix}."
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name in model.state_dict()
        if name.startswith(prefix)
        and f".{CHILD}." not in name
        and not {name, tied.get(name, name), *(n for n, of in tied.items() if of == name)} & there
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        raise InputError(
            f"The quantized checkpoint lacks {len(missing)} of its weights, among them "
            f"{missing[0]}, and they would be random; complete it, or write it again with "
            "dmpq.apply."
        )


def _same_kind(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Return whether a type is the wanted one; weights may be in any float type."""
    return found == wanted or (found.is_floating_point and wanted.is_floating_point)


def _choices(menu: Menu) -> dict[str, dict[str, int]]:
    return {f.key: {"bits": f.bits, "group_size": f.group_size} for f in menu.formats}


def quantization_config(
    menu: Menu, assignment: Mapping[str, LayerAssignment], fingerprint: str
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a folder's ``config.json``, as plain JSON values."""
    config = DmpqConfig(
        quantizer={"name": menu.quantizer, "symmetric": menu.symmetric},
        choices=_choices(menu),
        assignment=dict(assignment),
        fingerprint=fingerprint,
    )
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain
