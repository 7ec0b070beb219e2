"""A checkpoint read expert by expert, by transformers' own conversions, without loading it.

The model stands on the meta device. Names on disk become names of the model by the renamings and
converters that ``from_pretrained`` would use; a converter whose operations leave experts apart is
run on one expert at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dmpq.checkpoints.tensor_files import TensorFile, TensorInfo
from dmpq.errors import InputError, first_line
from dmpq.experts import Experts
from dmpq.families import auto_class
from dmpq.moe import MoEModel, checkpoint_source, load_tokenizer, needs_its_code

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
SIDES: Final = ("gate_up", "down")
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HASHED_ROWS: Final = 1 << 22
"""Values that are hashed at once, about."""

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class Group:
    """What one parameter of the model is made of, or several by one converter.

    Attributes:
        target: The parameter, the first of several.
        converter: How; ``None`` where the tensor on disk is the parameter.
        sources: Pattern → names on disk, in the experts' order.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Every parameter that it makes."""
        if self.converter is None:
            return [self.target]
        patterns = self.converter.target_patterns
        return [self.target.replace(patterns[0], pattern) for pattern in patterns]

    @property
    def names(self) -> list[str]:
        """Names on disk."""
        return [name for names in self.sources.values() for name in names]


def grouped(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Group]:
    """Return what every tensor of a model is made of, as ``from_pretrained`` finds it.

    Args:
        model: May stand on the meta device.
        names: Of the tensors on disk; those that the model does not load are in no group.

    Returns:
        Name of the model's tensor → what makes it; a tensor that is not on disk is not there.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {text: one for one in converters for text in one.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            continue
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(target, Group(target, converter))
        group.sources.setdefault(pattern or name, []).append(name)
    return {target: group for group in groups.values() for target in group.targets}


def check_memory(doing: str, needed: float, allowed: float) -> None:
    """Refuse a limit of memory that single weights exceed.

    Args:
        doing: What takes the memory, as a sentence's beginning.
        needed: Bytes beside the imports.
        allowed: Bytes beside the imports.

    Raises:
        InputError: If more is needed than allowed.
    """
    if needed > allowed:
        raise InputError(
            f"{doing} takes up to {needed / 1e9:.2f} GB beside the imports, and --max-memory "
            f"allows {allowed / 1e9:.2f}; allow more, since weights are read whole."
        )


class Checkpoint:
    """A checkpoint on disk, with its model on the meta device.

    Attributes:
        moe: The model.
        groups: Name of a tensor of the model → what it is made of.

    Args:
        name: ``"reference"``, a local folder, or a hub id.
        revision: Revision of a hub model.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        InputError: If there is no such checkpoint, a shard is missing or damaged, the weights are
            quantized already, or the model has no experts that can be found.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> None:
        source, local = checkpoint_source(name, revision)
        self.name = name
        self.trust_remote_code = trust_remote_code
        self.folder = Path(source) if local else _downloaded(name, revision)
        try:
            config = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            if getattr(config, "quantization_config", None) is not None:
                raise InputError(
                    f"The checkpoint {name} is quantized already; give the one it was made from."
                )
            with torch.device("meta"):
                model: Any = auto_class(config).from_config(
                    config, trust_remote_code=trust_remote_code
                )
        except InputError:
            raise
        except Exception as error:  # a damaged config raises whatever its reader raises
            raise needs_its_code(name, error) or InputError(
                f"The checkpoint {name} describes no model that can be built "
                f"({first_line(error)}); get it again, or write it by save_pretrained."
            ) from error
        self.moe = MoEModel(model, name=name, revision=revision)
        self._files = self._opened()
        self._shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
        self.groups = grouped(model, self._files)
        self._check_complete(model)
        self._kept: tuple[str, torch.Tensor] | None = None

    def tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer.

        Raises:
            InputError: If it has none that can be read.
        """
        options = {"local_files_only": True, "trust_remote_code": self.trust_remote_code}
        return load_tokenizer(self.name, self.folder, options)

    def _opened(self) -> dict[str, TensorFile]:
        """Return the file of each tensor on disk."""
        index = self.folder / INDEX
        paths = [self.folder / SINGLE]
        if index.exists():
            try:
                weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
                paths = [self.folder / Path(name).name for name in sorted({*weight_map.values()})]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{index} names no shards ({first_line(error)}); get the checkpoint again."
                ) from error
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise InputError(
                f"The checkpoint {self.name} lacks {missing.name}; complete it, or get it again."
            )
        return {name: file for file in map(TensorFile, paths) for name in file.tensors}

    def _check_complete(self, model: PreTrainedModel) -> None:
        # Buffers too: a router's correction bias that is not there would be zeros.
        missing = [name for name in self._shapes if name not in self.groups]
        tied = model.all_tied_weights_keys
        missing = [name for name in missing if name not in tied]
        if missing:
            raise InputError(
                f"The checkpoint {self.name} lacks {len(missing)} of its weights, among them "
                f"{missing[0]}; complete it, or they would be random."
            )
        for name, group in self.groups.items():
            if group.converter is None:
                source = group.names[0]
                found = self._files[source].tensors[source].shape
                self._check_shape(name, found, self._shapes[name])
        for experts in self.moe.containers:
            for name in experts.own_parameters():
                count = experts.num_experts
                group = self.groups[name]
                listed = count * len(group.targets)  # one list may hold those of two containers
                wrong = [one for one in group.sources.values() if len(one) not in (1, listed)]
                if wrong:
                    raise InputError(
                        f"The checkpoint {self.name} holds {len(wrong[0])} experts of "
                        f"{experts.path}, and its config.json says {count}; get it again."
                    )

    def keep(self, paths: Sequence[str]) -> None:
        """Take some containers only, in this order: text does not reach all of every model.

        Raises:
            InputError: If the model has no such container.
        """
        known = {experts.path: experts for experts in self.moe.containers}
        strange = next((path for path in paths if path not in known), None)
        if strange is not None:
            raise InputError(
                f"{self.name} has no experts at {strange}; give the model that they belong to."
            )
        self.moe.containers = tuple(known[path] for path in paths)

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest matrix of an expert."""
        return max(
            rows * columns
            for layer in self.moe.spec.moe_layers
            for rows, columns in (layer.gate_up_shape, layer.down_shape)
        )

    @cached_property
    def _expert_groups(self) -> list[Group]:
        """What the kept containers' weights are made of."""
        return [self.groups[name] for name in self._own_parameters]

    @property
    def _own_parameters(self) -> list[str]:
        """The model's parameters that hold the kept containers' weights."""
        return [name for experts in self.moe.containers for name in experts.own_parameters()]

    @cached_property
    def other_tensors(self) -> dict[str, TensorInfo]:
        """Tensors on disk that the model loads, but for those that the experts are made of."""
        replaced = {name for group in self._expert_groups for name in group.names}
        loaded = {name for group in self.groups.values() for name in group.names}
        return {
            name: self._files[name].tensors[name]
            for name in sorted(loaded - replaced, key=dot_natural_key)
        }

    @cached_property
    def other_parameters(self) -> dict[str, TensorInfo]:
        """Parameters that are made of the same tensors as the experts, but are none of them."""
        made = {name for group in self._expert_groups for name in group.targets}
        others = made - {*self._own_parameters}
        shapes = {name: tuple(self.moe.model.get_parameter(name).shape) for name in others}
        return {name: TensorInfo(self.dtype, shape) for name, shape in sorted(shapes.items())}

    @property
    def unused(self) -> list[str]:
        """Tensors on disk that the model does not load."""
        loaded = {name for group in self.groups.values() for name in group.names}
        return sorted(self._files.keys() - loaded)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the experts are stored in."""
        name = self.groups[self.moe.containers[0].own_parameters(1)[0]].names[0]
        return self._files[name].tensors[name].dtype

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the bytes of a tensor on disk, uint8, in pieces."""
        yield from self._files[name].chunks(name)

    def expert(self, experts: Experts, side: str, index: int) -> torch.Tensor:
        """Return one expert's weights as stored, (out, in).

        Args:
            experts: A container of :attr:`moe`.
            side: ``"gate_up"`` or ``"down"``.
            index: Of the expert.
        """
        source = experts.sources[index][SIDES.index(side)]
        parts = []
        for own, start, stop in source.rows:
            name = f"{experts.path}.{own}"
            part = self._rows(name, start, stop, experts.num_experts)
            self._check_shape(name, tuple(part.shape[1:]), self._shapes[name][1:])
            parts.append(part)
        found = source.assembled(parts)
        if not torch.isfinite(found).all():
            raise InputError(
                f"The checkpoint {self.name} holds values in expert {index} of {experts.path} "
                "that are not finite; it is damaged, or overflowed where it was converted: get "
                "it again."
            )
        return found

    def _rows(self, name: str, start: int, stop: int, count: int) -> torch.Tensor:
        """Return an expert's rows of a parameter, one of ``count`` where they are converted."""
        group = self.groups[name]
        if group.converter is None:
            return self._read(group.names[0], start, stop)
        if stop - start == 1:
            return self._expert(group, group.converter, name, start, count)[None]
        return self.parameter(name)[start:stop]

    def _expert(
        self, group: Group, converter: WeightConverter, name: str, index: int, count: int
    ) -> torch.Tensor:
        """Return one row of a parameter of ``count``, an expert's, that is converted."""
        shapes = [self._files[key].tensors[key].shape for key in group.names]
        apart = all(len(names) == count for names in group.sources.values()) and all(
            len(shape) == 2 for shape in shapes
        )
        if apart and all(map(_keeps_modules_apart, converter.operations)):
            own = {text: [self._read(names[index])] for text, names in group.sources.items()}
            return self._converted(group, own)[name][0]
        fused = all(len(shape) == 3 and shape[0] == count for shape in shapes)
        if fused and all(map(_keeps_rows_apart, converter.operations)):
            own = {
                text: [self._read(key, index, index + 1) for key in names]
                for text, names in group.sources.items()
            }
            return self._converted(group, own)[name][0]
        if self._kept is None or self._kept[0] != name:
            self._kept = name, self.parameter(name)
        return self._kept[1][index]

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter of the model, whole."""
        group = self.groups[name]
        if group.converter is None:
            return self._read(group.names[0])
        own = {text: list(map(self._read, names)) for text, names in group.sources.items()}
        made = self._converted(group, own)[name]
        self._check_shape(name, tuple(made.shape), self._shapes[name])
        return made

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._files[name].read(name, start, stop)

    def _converted(
        self, group: Group, sources: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        converter: Any = deepcopy(group.converter)
        converter.collected_tensors.update(sources)
        model = self.moe.model
        try:
            made = converter.convert(group.target, model=model, config=model.config)
        except Exception as error:  # shapes that do not fit raise whatever torch raises
            raise InputError(
                f"The checkpoint {self.name} holds {group.names[0]} in a shape that does not fit "
                f"the others ({first_line(error)}); get it again."
            ) from error
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def fingerprint(self, progress: Progress | None = None) -> str:
        """Return what :attr:`dmpq.moe.MoEModel.fingerprint` is of the loaded model.

        Args:
            progress: Called with the parameters done, and all of them.
        """
        digest = hashlib.sha256()
        parameters = list(self.moe.model.named_parameters())
        counts = {
            name: experts.num_experts
            for experts in self.moe.containers
            for name in experts.own_parameters()
        }
        for done, (name, parameter) in enumerate(parameters, 1):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            for piece in self._pieces(name, counts.get(name)):
                data = piece.to(torch.bfloat16).contiguous()
                digest.update(data.view(torch.uint8).numpy().data)
            if progress is not None:
                progress(done, len(parameters))
        return digest.hexdigest()

    def _pieces(self, name: str, experts: int | None) -> Iterator[torch.Tensor]:
        """Yield a parameter in slices of its first dimension."""
        shape = tuple(self.moe.model.get_parameter(name).shape)
        group = self.groups[name]
        if experts is not None and group.converter is not None:
            for index in range(experts):
                piece = self._expert(group, group.converter, name, index, experts)
                self._check_shape(name, tuple(piece.shape), shape[1:])
                yield piece
        elif group.converter is None and shape:
            source = group.names[0]
            step = max(1, _HASHED_ROWS // max(1, torch.Size(shape[1:]).numel()))
            for start in range(0, shape[0], step):
                yield self._read(source, start, min(start + step, shape[0]))
        else:
            yield self.parameter(name)

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise InputError(
                f"The checkpoint {self.name} cannot be read: its weights have other shapes than "
                f"its config.json says ({name}: {found}, not {wanted}); get it again."
            )


def _keeps_modules_apart(operation: Any) -> bool:
    """Return whether an operation on lists of matrices treats each place of the lists alone."""
    stacks = isinstance(operation, MergeModulelist) and operation.dim == 0
    return stacks or _keeps_rows_apart(operation)


def _keeps_rows_apart(operation: Any) -> bool:
    """Return whether an operation treats each index of the first of three dimensions alone."""
    if isinstance(operation, Concatenate):
        return operation.dim in (1, 2, -1, -2)
    return (
        isinstance(operation, Transpose)
        and not operation.check_dims
        and {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}
    )


def _downloaded(name: str, revision: str | None) -> Path:
    """Return the folder that the hub's client keeps a model in, fetching what is not there."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the client raises its own, the network's and the disk's
        raise InputError(
            f"There is no folder {name!r}, and the hub has not delivered a model of that name "
            f"({first_line(error)}); give 'reference', a local folder, or a hub id with a network "
            "at hand."
        ) from error
    return Path(found)
