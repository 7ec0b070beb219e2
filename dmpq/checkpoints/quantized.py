"""A quantized checkpoint written expert by expert: whole at the end, or not there.

It grows in a hidden folder beside its place, one layer after the other, and is moved there when
everything is in it; the same command goes on with what an interrupted one has left.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from dmpq import hf
from dmpq.bitmap import BitMap
from dmpq.checkpoints.checkpoint import INDEX, SIDES, SINGLE, Checkpoint, check_memory
from dmpq.checkpoints.packed import PackedLayer, stored_parts, tensor_name
from dmpq.checkpoints.tensor_files import TensorFileWriter, TensorInfo, file_bytes
from dmpq.errors import InputError
from dmpq.experts import Experts
from dmpq.files import JsonLines, goes_on, locked, replace_atomically
from dmpq.formats import Format
from dmpq.quantization import QuantizedTensor, quantize

LARGEST_SHARD: Final = 5 * 10**9
"""Bytes, as transformers has it."""
BITMAP: Final = "bitmap.json"
_STATE: Final = "apply.json"
_DONE: Final = "apply.jsonl"
_OTHERS: Final = "others"
_COPIED: Final = ("*.json", "*.jinja", "*.model", "*.txt")
_MATRICES: Final = 12
"""Copies of an expert's larger matrix in fp32 that quantizing it takes, at most."""
_FIXED: Final = 64 << 20
"""Bytes for whatever is copied in pieces."""

Progress = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(eq=False)
class QuantizedCheckpoint:
    """The checkpoint that a bit map makes of another.

    Args:
        bitmap: The map.
        source: The checkpoint that the map was made for.
        largest_shard: Bytes of a file, at most, unless a single tensor is larger.
        factors: Gives what calibrates an expert, by the layer's ordinal and its index there
            (:meth:`dmpq.calibration.Calibration.factors`); only where the map's quantizer is
            calibrated.
        given: Gives an expert's matrices as they are quantized already, likewise; ``None`` for
            those at 16 bits. Without it the map's quantizer makes them of the weights.

    Raises:
        InputError: If the map is of other experts, or its quantizer lacks what calibrates it.
    """

    bitmap: BitMap
    source: Checkpoint
    largest_shard: int = LARGEST_SHARD
    factors: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
    given: Callable[[int, int], Sequence[QuantizedTensor | None]] | None = None

    def __post_init__(self) -> None:
        if self.bitmap.menu.method.calibrated and self.factors is None:
            raise InputError(
                f"The map's quantizer {self.bitmap.menu.quantizer!r} is calibrated, and nothing "
                "calibrates it here; give the factors of its calibration."
            )
        self.source.keep([layer.path for layer in self.bitmap.geometry.moe_layers])
        self.bitmap.to_assignment(self.source.moe.spec)

    @cached_property
    def layers(self) -> list[tuple[Experts, PackedLayer]]:
        """Each container, and what is stored of it."""
        config = hf.DmpqConfig(**self.quantization_config)
        spec = self.source.moe.spec
        return [
            (experts, config.layer(layer, self.source.dtype))
            for experts, layer in zip(self.source.moe.containers, spec.moe_layers, strict=True)
        ]

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        """What ``config.json`` says of the quantization."""
        return hf.quantization_config(
            self.bitmap.menu, self.bitmap.assignment, self.bitmap.model["fingerprint"]
        )

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Everything that it holds."""
        packed = {k: v for _, layer in self.layers for k, v in layer.tensors().items()}
        guard = hf.guard_name(self.source.moe.containers[0])
        return {
            **self.source.other_tensors,
            **self.source.other_parameters,
            **packed,
            guard: TensorInfo(self.source.dtype, (0,)),
        }

    @cached_property
    def _metadata(self) -> dict[str, str]:
        """What the files' headers say beside the tensors."""
        return {"format": "pt", hf.METHOD: hf.DmpqConfig(**self.quantization_config).digest}

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the files that hold the tensors, their headers included."""
        return sum(file_bytes(held, self._metadata) for held in self._shards().values())

    @property
    def needed_memory(self) -> int:
        """Bytes that writing it takes beside the imports, an estimate from above."""
        return _FIXED + 4 * _MATRICES * self.source.largest_matrix

    def check_memory(self, allowed: float) -> None:
        """Refuse a limit that a single expert exceeds.

        Args:
            allowed: Bytes beside the imports.

        Raises:
            InputError: If it does.
        """
        check_memory(f"Quantizing one expert of {self.source.name}", self.needed_memory, allowed)

    def check_fingerprint(self, progress: Progress = _silent) -> None:
        """Refuse weights other than those that the map was made for.

        Raises:
            InputError: If they are.
        """
        found = self.source.fingerprint(lambda i, n: progress("reading the weights", i, n))
        wanted = self.bitmap.model["fingerprint"]
        if found != wanted:
            raise InputError(
                f"The bit map was made for weights {wanted[:12]}..., {self.source.name} has "
                f"{found[:12]}...; give the right --model."
            )

    def write(
        self, folder: Path, *, card: str, progress: Progress = _silent, check: bool = True
    ) -> None:
        """Write it, or go on with what an interrupted run has left.

        Args:
            folder: Where to; it must not exist yet.
            card: Text of its README.md.
            progress: Called with a stage's name, steps done, and all steps.
            check: Whether to compare the weights with the map's fingerprint first.

        Raises:
            InputError: If something is there, or another run is at work; if the disk is too small,
                or the weights are others.
        """
        if os.path.lexists(folder):  # a link to nowhere as well: it cannot be moved over
            raise InputError(f"{folder} exists already; remove it, or give another --out.")
        partial = folder.parent / f".{folder.name}.partial"
        self._check_disk(folder.parent, partial)
        if check:
            self.check_fingerprint(progress)
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial, folder):
            self._fill(partial, card, progress)
            os.replace(partial, folder)

    def _fill(self, partial: Path, card: str, progress: Progress) -> None:
        """Write everything into a folder that no other run writes to."""
        goes_on(partial, _STATE, {"map": self.bitmap.to_json(), "shard": self.largest_shard})
        shards = self._shards()
        writers = {
            name: TensorFileWriter(partial / name, tensors, self._metadata)
            for name, tensors in shards.items()
        }
        journal = JsonLines(partial / _DONE)
        try:
            done = {str(record.get("unit")) for record in journal}
            home = {tensor: writers[name] for name, held in shards.items() for tensor in held}
            units = self._units(home)
            for number, (unit, work) in enumerate(units.items(), 1):
                if unit not in done:
                    work()
                    for writer in writers.values():
                        writer.flush()
                    journal.append({"unit": unit})
                progress("quantizing", number, len(units))
        finally:
            journal.close()
            for writer in writers.values():
                writer.close()
        self._write_texts(partial, shards, card)
        (partial / _STATE).unlink()
        (partial / _DONE).unlink()

    def _check_disk(self, parent: Path, partial: Path) -> None:
        there = sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors"))
        existing = next(path for path in (parent, *parent.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free + there
        if free < self.num_bytes:
            raise InputError(
                f"The quantized checkpoint takes {self.num_bytes / 1e9:.2f} GB, and {existing} "
                f"has {free / 1e9:.2f} GB free; make room, or give another --out."
            )

    def _shards(self) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of each file, in the order of the model."""
        files: list[dict[str, TensorInfo]] = [{}]
        held = 0
        for name, info in self.tensors.items():
            if files[-1] and held + info.num_bytes > self.largest_shard:
                files.append({})
                held = 0
            files[-1][name] = info
            held += info.num_bytes
        if len(files) == 1:
            return {SINGLE: files[0]}
        return {
            f"model-{i:05}-of-{len(files):05}.safetensors": file for i, file in enumerate(files, 1)
        }

    def _units(self, home: Mapping[str, TensorFileWriter]) -> dict[str, Callable[[], None]]:
        """Return what is done between two entries of the journal."""

        def others() -> None:
            for name in self.source.other_tensors:
                at = 0
                for piece in self.source.chunks(name):
                    home[name].write_bytes(name, piece, offset=at)
                    at += piece.numel()
            for name in self.source.other_parameters:
                home[name].write(name, self.source.parameter(name))

        units: dict[str, Callable[[], None]] = {_OTHERS: others}
        for experts, layer in self.layers:

            def one(experts: Experts = experts, layer: PackedLayer = layer) -> None:
                for name, row, values in self._packed(experts, layer):
                    home[name].write(name, values[None], row=row)

            units[experts.path] = one
        return units

    def _packed(
        self, experts: Experts, layer: PackedLayer
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield what is stored of each expert: the tensor, its row there, and its values."""
        number = [c.path for c, _ in self.layers].index(experts.path)
        rows = [
            {
                e: (key, row)
                for key, members in layer.members(side).items()
                for row, e in enumerate(members)
            }
            for side in range(len(SIDES))
        ]
        for index in range(experts.num_experts):
            factors = None
            if self.factors is not None:
                factors = self.factors(number, index)
            for side, name in enumerate(SIDES):
                if index not in rows[side]:
                    continue  # pruned
                key, row = rows[side][index]
                fmt, weight = Format.parse(key), self.source.expert(experts, name, index)
                quantized = None
                if self.given is not None:
                    quantized = self.given(number, index)[side]
                elif not fmt.is_full:
                    factor = None if factors is None else factors[side]
                    quantized = quantize(weight, fmt, layer.menu, factor=factor)
                for part, values in stored_parts(weight, quantized, layer.menu).items():
                    if values.is_floating_point() and not torch.isfinite(values).all():
                        raise InputError(
                            f"Weights of expert {index} of {experts.path}, up to "
                            f"{float(weight.abs().max()):.3g}, overflow its {part}, which is "
                            "float16; search a map that leaves the expert at 16 bits."
                        )
                    yield tensor_name(experts.path, side, key, part), row, values

    def _write_texts(
        self, folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]], card: str
    ) -> None:
        """Write everything but the weights: configuration, tokenizer, map, card."""
        for pattern in _COPIED:
            for file in sorted(self.source.folder.glob(pattern)):
                if file.name not in (INDEX, "config.json"):
                    shutil.copyfile(file, folder / file.name)
        config = json.loads((self.source.folder / "config.json").read_text("utf-8"))
        config["quantization_config"] = self.quantization_config
        replace_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(one.num_bytes for one in self.tensors.values())},
                "weight_map": {tensor: name for name, held in shards.items() for tensor in held},
            }
            replace_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        self.bitmap.write(folder / BITMAP)
        replace_atomically(folder / "README.md", card.encode())
