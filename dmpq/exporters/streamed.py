"""Checkpoints for other tools written expert by expert, of models larger than memory.

The files are those that ``save_pretrained`` would write of the loaded model: transformers reverts
its own conversions on a model that stands on the meta device, which says what every file holds;
then values are read, changed and written one expert, or one other weight, at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from dmpq.bitmap import BitMap
from dmpq.checkpoints.checkpoint import INDEX, SIDES, Checkpoint, check_memory
from dmpq.checkpoints.tensor_files import TensorFileWriter, TensorInfo
from dmpq.errors import InputError
from dmpq.experts import Experts
from dmpq.exporters.plan import pairs_of
from dmpq.exporters.weights import Matrix, check_fits, quantized, save_whole, to_bfloat16

LARGEST_SHARD: Final = "50GB"
"""As ``save_pretrained`` has it."""
_MATRICES: Final = 12
"""Copies of an expert's larger matrix in fp32 that quantizing it takes, at most."""

Progress = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


class Packing(Protocol):
    """What stands in files in the place of experts' weights."""

    def tensors(self, name: str, info: TensorInfo) -> Mapping[str, TensorInfo] | None:
        """Return what stands in the place of a tensor; ``None`` where it is no expert's."""

    def values(self, matrix: Matrix) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a matrix becomes: names in a file, and values."""

    def finish(self, folder: Path) -> None:
        """Say in the folder's configuration how experts are stored."""


@dataclass(eq=False)
class StreamedExport:
    """The checkpoint that a bit map makes of another, in a layout that any tool reads.

    Args:
        bitmap: The map.
        source: The checkpoint that the map was made for; its model's types are changed.
        packing: What stands in the place of experts' weights; ``None`` for dequantized weights.
        largest_shard: Of a file, as ``save_pretrained`` takes it.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If the map is of other weights, or the layout ties experts to other weights.
    """

    bitmap: BitMap
    source: Checkpoint
    packing: Packing | None = None
    largest_shard: str = LARGEST_SHARD
    progress: Progress = _silent

    def __post_init__(self) -> None:
        moe, bitmap = self.source.moe, self.bitmap
        self.source.keep([layer.path for layer in bitmap.geometry.moe_layers])
        moe.__dict__["fingerprint"] = self.source.fingerprint(  # a cached property
            lambda done, total: self.progress("reading the weights", done, total)
        )
        check_fits(bitmap, moe)
        moe.model.float()  # as a model is loaded on a CPU
        to_bfloat16(moe)

    @cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        """What the model saves, by its own names, on the meta device."""
        model = self.source.moe.model
        state = dict(model.state_dict())
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        kept: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(state, model)
        return kept

    def _reverted(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = revert_weight_conversion(
            self.source.moe.model, dict(state)
        )
        return found

    @cached_property
    def _experts(self) -> dict[str, tuple[int, Experts, int]]:
        """Name of a parameter → layer, container and side."""
        found = {}
        for number, experts in enumerate(self.source.moe.containers):
            for side in range(len(SIDES)):
                names = experts.own_parameters(side)
                if len(names) != 1:  # an adapter's: a family that keeps its experts apart
                    raise self._strange(names[0])
                found[names[0]] = number, experts, side
        return found

    @cached_property
    def _units(self) -> list[list[str]]:
        """Names of the model's other tensors; those that are made together stand together."""
        groups = self.source.groups
        units: dict[int, list[str]] = {}
        for name in self._state:
            if name not in self._experts:
                units.setdefault(id(groups[name]), []).append(name)
            elif groups[name].targets != [name]:
                raise self._strange(name)
        return list(units.values())

    def _strange(self, name: str) -> InputError:
        return InputError(
            f"{self.source.name} stores {name} not as one tensor of a layer's experts alone, and "
            "cannot be written expert by expert; leave --max-memory out."
        )

    @cached_property
    def _names(self) -> dict[str, list[list[str]]]:
        """Parameter of experts → each one's tensors on disk; the same where they share one."""
        found = {}
        for name, (_, experts, _) in self._experts.items():
            whole = list(self._reverted({name: self._state[name]}))
            one = list(self._reverted({name: self._state[name][:1]}))
            if whole == one:
                found[name] = [one] * experts.num_experts
                continue
            found[name] = [
                [f".{index}.".join(own.rsplit(".0.", 1)) for own in one]
                for index in range(experts.num_experts)
            ]
            if sorted(whole) != sorted(n for names in found[name] for n in names):
                raise self._strange(name)
        return found

    @cached_property
    def shards(self) -> dict[str, dict[str, TensorInfo]]:
        """What each file holds."""
        whole = self._reverted(self._state)
        parts = [self._reverted({n: self._state[n] for n in unit}) for unit in self._units]
        known = {name for part in parts for name in part}
        known |= {n for names in self._names.values() for one in names for n in one}
        if known != whole.keys():
            raise self._strange(sorted(known ^ whole.keys())[0])
        # As for tensors with values: views of one storage are counted once, and stay together.
        split = split_state_dict_into_shards_factory(
            whole,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=self.largest_shard,
        )
        self._index = split.metadata if split.is_sharded else None
        files: dict[str, dict[str, TensorInfo]] = {}
        for file, names in split.filename_to_tensors.items():
            files[file] = {}
            for name in names:
                info = TensorInfo(whole[name].dtype, tuple(whole[name].shape))
                packed = None if self.packing is None else self.packing.tensors(name, info)
                files[file] |= {name: info} if packed is None else packed
        return files

    @cached_property
    def needed_memory(self) -> int:
        """Bytes that writing it takes beside the imports, an estimate from above."""
        groups, stored = self.source.groups, self.source.dtype.itemsize
        others = [
            sum(self._state[name].numel() for name in unit)
            * (2 + stored + (0 if groups[unit[0]].converter is None else 4))
            for unit in self._units
        ]
        return (64 << 20) + max([*others, 4 * _MATRICES * self.source.largest_matrix])

    def check_memory(self, allowed: float) -> None:
        """Refuse a limit that a single weight exceeds.

        Args:
            allowed: Bytes beside the imports.

        Raises:
            InputError: If it does.
        """
        check_memory(
            f"Writing the largest weight of {self.source.name}", self.needed_memory, allowed
        )

    def write(self, out: Path) -> None:
        """Write the folder, whole or not at all.

        Args:
            out: A new folder.

        Raises:
            InputError: If something is there, or a weight is not finite.
        """
        shards = self.shards

        def write(folder: Path) -> None:
            model = self.source.moe.model
            if model.can_generate():
                _take_generation_config(model, self.source.folder)
            model.save_pretrained(folder, state_dict={})  # all but the weights
            self.source.tokenizer().save_pretrained(folder)
            self._write_weights(folder)
            if self._index is not None:
                where = {name: file for file, held in shards.items() for name in held}
                total = {"total_parameters": model.num_parameters(), **self._index}
                index = {"metadata": total, "weight_map": where}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (folder / INDEX).write_text(text, "utf-8")
            self.bitmap.write(folder / "bitmap.json")
            if self.packing is not None:
                self.packing.finish(folder)

        save_whole(out, write)

    def _write_weights(self, folder: Path) -> None:
        writers = {
            file: TensorFileWriter(folder / file, held, {"format": "pt"}, as_library=True)
            for file, held in self.shards.items()
        }
        home = {n: (writers[file], held[n]) for file, held in self.shards.items() for n in held}

        def put(name: str, values: torch.Tensor, row: int = 0) -> None:
            writer, info = home[name]
            writer.write(name, values.to(info.dtype), row=row)

        try:
            for unit in self._units:
                for name, values in self._reverted(
                    {one: self.source.parameter(one) for one in unit}
                ).items():
                    put(name, values)
            done, total = 0, 2 * self.source.moe.spec.num_experts
            for name, (_, experts, _) in self._experts.items():
                fused = self._names[name][0] == self._names[name][-1]
                for matrix in self._matrices(name):
                    if self.packing is not None:
                        for own, values in self.packing.values(matrix):
                            put(own, values)
                    else:
                        made = self._dequantized(name, experts, matrix)
                        names = self._names[name][matrix.expert]
                        for own, values in zip(names, made, strict=True):
                            put(own, values, row=matrix.expert if fused else 0)
                    done += 1
                    self.progress("writing", done, total)
        finally:
            for writer in writers.values():
                writer.close()

    def _matrices(self, name: str) -> Iterator[Matrix]:
        number, experts, side = self._experts[name]
        pairs = pairs_of(self.bitmap)
        start = sum(one.num_experts for one in self.source.moe.containers[:number])
        for index in range(experts.num_experts):
            fmt = self.bitmap.menu.formats[pairs[start + index, side]]
            weight = self.source.expert(experts, SIDES[side], index).float()
            yield Matrix(number, index, side, fmt, weight)

    def _dequantized(self, name: str, experts: Experts, matrix: Matrix) -> list[torch.Tensor]:
        weight = matrix.weight
        if matrix.fmt.is_quantized:
            weight = quantized(weight, matrix.fmt, self.bitmap).dequantize(weight.dtype)
        own: Any = weight.mT if experts.module.is_transposed else weight
        return list(self._reverted({name: own[None]}).values())


def _take_generation_config(model: Any, folder: Path) -> None:
    """Give a model the generation config that ``from_pretrained`` would."""
    options = {"cache_dir": None, "force_download": False, "proxies": None, "token": None}
    local = {"local_files_only": True, "revision": "main", "subfolder": ""}
    model.adjust_generation_fn(
        None, False, False, str(folder), trust_remote_code=False, **options, **local
    )
