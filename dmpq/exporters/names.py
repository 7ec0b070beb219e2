"""What experts' matrices are called: by modules, one a matrix, and in the checkpoint on disk.

Tools that take a model apart know un-fused modules (``model.layers.0.mlp.experts.3.up_proj``);
readers of checkpoints know the names on disk (``model.layers.0.block_sparse_moe.experts.3.w3``).
The latter are not tabulated here: numbered tensors go through the very conversion by which
transformers saves a model, and their numbers say what came out where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from dmpq.errors import InputError, first_line
from dmpq.spec import ModelSpec, MoELayer

GATE, UP, DOWN = "gate", "up", "down"
PARTS: Final = (GATE, UP, DOWN)
_LEAVES: Final = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
_SUFFIX: Final = ".weight"

Matrices = Mapping[str, str]


@dataclass(frozen=True)
class LayerNames:
    """The names of one layer's experts.

    Attributes:
        path: Module path of the experts container.
        modules: Per expert: part (``"gate"``, ``"up"``, ``"down"``) → un-fused module.
        disk: Per expert: part → name on disk, without ``.weight``.
        fused: Whether one tensor on disk holds all experts, so that experts share their names.
    """

    path: str
    modules: tuple[Matrices, ...]
    disk: tuple[Matrices, ...]
    fused: bool

    @property
    def disk_parent(self) -> str:
        """What holds this layer's experts on disk: their names without number and matrix."""
        return self.disk[0][DOWN].rsplit(".", 1 if self.fused else 2)[0]


def parts_of(layer: MoELayer) -> tuple[str, ...]:
    """Return an expert's matrices: gate, up and down, or up and down where it has no gate."""
    return PARTS if layer.gated else (UP, DOWN)


def side_of(part: str) -> int:
    """Return which of an expert's two formats a matrix has: 0 of gate+up, 1 of down."""
    return int(part == DOWN)


def layer_names(spec: ModelSpec, *, architecture: str) -> tuple[LayerNames, ...]:
    """Return the names of all layers' experts.

    Args:
        spec: The model's geometry; names the containers.
        architecture: Class of the model, as in its configuration.

    Raises:
        InputError: If transformers cannot say how this family is stored.
    """
    found = _on_disk(spec, _conversions(architecture, spec.model_type))
    names = []
    for number, layer in enumerate(spec.moe_layers):
        experts = range(layer.num_experts)
        parts = parts_of(layer)
        missing = next((p for p in parts for e in experts if (number, e, p) not in found), None)
        if missing is not None:
            raise _unknown(spec, f"the {missing} matrices of {layer.path} are not saved")
        modules = tuple({p: f"{layer.path}.{e}.{_LEAVES[p]}" for p in parts} for e in experts)
        disk = tuple({p: found[number, e, p][0] for p in parts} for e in experts)
        fused = any(found[number, e, p][1] for p in parts for e in experts)
        names.append(LayerNames(layer.path, modules, disk, fused))
    return tuple(names)


def _conversions(architecture: str, model_type: str) -> list[Any]:
    """Return transformers' weight conversions for a class, or else for its family."""
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    candidates = [architecture]
    known = vars(transformers).get(architecture) or _class_named(architecture)
    if known is not None:
        candidates.append(known.config_class.model_type)
    candidates += [model_type, model_type.removesuffix("_text")]
    for name in candidates:
        found = get_checkpoint_conversion_mapping(name)
        if found is not None:
            return list(found)
    return []


def _class_named(architecture: str) -> Any:
    """Return a model class of transformers, whose names are resolved when they are asked for."""
    import transformers

    try:
        return getattr(transformers, architecture)
    except AttributeError:
        return None


def _on_disk(
    spec: ModelSpec, conversions: list[Any]
) -> dict[tuple[int, int, str], tuple[str, bool]]:
    """Return (layer, expert, part) → its name on disk, and whether it shares the tensor."""
    import torch
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    probes: dict[str, torch.Tensor] = {}
    meaning: list[tuple[int, int, str]] = []

    def numbered(number: int, experts: int, parts: Sequence[str]) -> torch.Tensor:
        start = len(meaning)
        meaning.extend((number, e, p) for e in range(experts) for p in parts)
        return torch.arange(start, len(meaning)).view(experts, len(parts), 1)

    for number, layer in enumerate(spec.moe_layers):
        up = "gate_up_proj" if layer.gated else "up_proj"
        parts = parts_of(layer)[:-1]
        probes[f"{layer.path}.{up}"] = numbered(number, layer.num_experts, parts)
        probes[f"{layer.path}.down_proj"] = numbered(number, layer.num_experts, (DOWN,))
    # A prefix is added or removed only where a loaded checkpoint had it otherwise.
    kept = [c for c in conversions if not isinstance(c, PrefixChange)]
    stand_in: Any = SimpleNamespace(_weight_conversions=kept, config=SimpleNamespace())
    try:
        saved = revert_weight_conversion(stand_in, probes)
    except Exception as error:  # each conversion raises its own
        raise _unknown(spec, first_line(error)) from error
    found: dict[tuple[int, int, str], tuple[str, bool]] = {}
    for name, tensor in saved.items():
        held = [meaning[i] for i in tensor.flatten().tolist()]
        shared = len({expert for _, expert, _ in held}) > 1
        for key in held:
            found[key] = (name.removesuffix(_SUFFIX), shared)
    return found


def _unknown(spec: ModelSpec, reason: str) -> InputError:
    return InputError(
        f"How experts of family {spec.model_type!r} are named on disk is unknown ({reason}); "
        "--to dequantized writes them through transformers, whatever their names."
    )
