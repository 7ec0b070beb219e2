"""What a streamed profile keeps on disk: what layers saw, and what is done, so that it resumes.

One file per layer holds what its experts read, gave, and are blamed for; a journal says which rows
are whole. Experts are the expensive part of a pass, and each layer's are run once forward and once
backward: whoever asks again, the second run of a checkpointed layer or the same command after an
interruption, gets what is kept, provided that what the experts read is the same to the bit. The
journal has checksums: where rows are not as they were left, as those of a removed file, all goes.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import NDArray
from safetensors.numpy import load

from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.tensor_files import TensorFile, TensorFileWriter, TensorInfo, file_bytes
from dmpq.errors import InputError
from dmpq.files import JsonLines, goes_on, replace_atomically, safetensors_bytes

_STATE: Final = "profile.json"
_DONE: Final = "profile.jsonl"
_SLOPES: Final = "slopes.safetensors"
_PARTS: Final = {"forward": ("hidden", "index", "weights", "output"), "backward": ("gradient",)}


@dataclass(frozen=True)
class LotLoss:
    """What a forward over some windows says of the loss.

    Attributes:
        tokens: Of the windows.
        nll: Summed negative log-likelihood, nats.
        predicted: Tokens that it is over.
    """

    tokens: int
    nll: float
    predicted: int


@dataclass(eq=False)
class Record:
    """Files of what each layer's experts saw, written while the model runs.

    Args:
        source: The checkpoint.
        folder: Where to; what is there of the same state, and as it was left, is gone on with,
            else cleared away.
        tokens: All of them.
        lot: Tokens of one forward, at most.
        state: What the files are made of.

    Raises:
        InputError: If the disk is too small.
    """

    source: Checkpoint
    folder: Path
    tokens: int
    lot: int
    state: Mapping[str, Any]
    _row: int = 0
    _slopes_of: int = 0
    _done: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _lots: dict[int, LotLoss] = field(default_factory=dict)
    _checksums: dict[tuple[str, int, int], tuple[int, int, int]] = field(default_factory=dict)
    _sums: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        goes_on(self.folder, _STATE, self.state)
        self._check_disk()
        self._open()
        if not self._is_as_left():
            self.close()
            (self.folder / _STATE).unlink()
            goes_on(self.folder, _STATE, self.state)
            for noted in (self._done, self._lots, self._checksums, self._sums):
                noted.clear()
            del self._readers
            self._open()

    def _open(self) -> None:
        plans = record_tensors(self.source, self.tokens, self.lot)
        self._writers = {
            name: TensorFileWriter(self.folder / name, held, {}) for name, held in plans.items()
        }
        self._journal = JsonLines(self.folder / _DONE)
        for entry in self._journal:
            match entry:
                case {"ran": str(what), "layer": int(layer), "row": int(row), "rows": int(rows)}:
                    self._remember(what, layer, row, rows)
                    sums = entry.get("checksum", 0), entry.get("slopes", 0)
                    self._checksums[what, layer, row] = rows, *sums
                case {"sums": int(layer), "checksum": int(checksum)}:
                    self._sums[layer] = checksum
                case {"lot": int(row), "tokens": int(n), "nll": float(nll), "predicted": int(p)}:
                    self._lots[row] = LotLoss(n, nll, p)

    def _is_as_left(self) -> bool:
        """Return whether every row that the journal says was written is there, unchanged."""
        for (what, layer, row), (rows, checksum, slopes) in self._checksums.items():
            if not rows:
                continue
            known = what in _PARTS and _name(layer) in self._writers
            if not known or not 0 <= row <= self.tokens - rows:
                return False
            if self._checksum(_name(layer), _PARTS[what], row, rows) != checksum:
                return False
            # One file for all lots: of what is done it may be the next one's, and is not read.
            read = (
                what == "backward" and (what, layer, row) in self._done and row not in self._lots
            )
            if read and self._checksum(_SLOPES, _slopes(layer), 0, rows) != slopes:
                return False
        return True

    def _checksum(self, file: str, names: Sequence[str], row: int, rows: int) -> int:
        found = 0
        for name in names:
            values = self._readers[file].read(name, row, row + rows)
            found = zlib.crc32(values.numpy().data, found)
        return found

    def _check_disk(self) -> None:
        needed = disk_needed(self.source, self.tokens, self.lot)
        there = sum(file.stat().st_blocks * 512 for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free + there
        if free < needed:
            raise InputError(
                f"What the layers see takes {needed / 1e9:.2f} GB on disk until the profile is "
                f"done, and {self.folder} has {free / 1e9:.2f} GB free; make room, give another "
                "--scratch, or ask for fewer --profile-tokens."
            )

    @cached_property
    def _readers(self) -> dict[str, TensorFile]:
        return {name: TensorFile(self.folder / name) for name in self._writers}

    def saw(self, layer: int) -> TensorFile:
        """Return a layer's file: hidden, index, weights, output and gradient, a row per token."""
        return self._readers[_name(layer)]

    def close(self) -> None:
        """Close the files."""
        self._journal.close()
        for writer in self._writers.values():
            writer.close()

    # One lot of windows after the other.

    def loss(self, row: int) -> LotLoss | None:
        """Return the loss of the lot whose first token has this number, where it is all done."""
        return self._lots.get(row)

    def start(self, row: int) -> None:
        """Begin a forward whose first token has this number."""
        self._row = row

    def finish(self, loss: LotLoss) -> None:
        """Note that a lot's forward and backward are done."""
        self._lots[self._row] = loss
        self._journal.append({"lot": self._row, **vars(loss)})

    # One layer of a lot after the other; the protocol of a streamed model's recorder.

    def output(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Return what a layer's experts gave when they read this very input; ``None`` if never."""
        if not self._read_the_same("forward", layer, hidden, index, weights):
            return None
        return self._rows(_name(layer), "output", len(hidden)).to(hidden.dtype)

    def gave(
        self,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Keep what a layer's experts read and gave."""
        self._forget("forward", layer)
        values = {"hidden": hidden, "weights": weights, "output": output}
        kept = {name: one.float() for name, one in values.items()}
        self._keep(_name(layer), {**kept, "index": index.long()})
        self._note("forward", layer, len(hidden))

    def slopes(
        self,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the gradients of hidden and weights, where this very input had this gradient."""
        count = len(hidden)
        same = self._read_the_same("backward", layer, hidden, index, weights)
        if not same or not _equal(self._rows(_name(layer), "gradient", count), gradient):
            return None
        to_hidden, to_weights = (
            self._readers[_SLOPES].read(name, 0, count) for name in _slopes(layer)
        )
        return to_hidden.to(hidden.dtype), to_weights.to(weights.dtype)

    def blamed(
        self,
        layer: int,
        gradient: torch.Tensor,
        to_hidden: torch.Tensor,
        to_weights: torch.Tensor,
    ) -> None:
        """Keep a layer's gradient, and those of its hidden values and weights."""
        self._forget("backward", layer)
        self._keep(_name(layer), {"gradient": gradient.float()})
        writer = self._writers[_SLOPES]
        for name, values in zip(_slopes(layer), (to_hidden, to_weights), strict=True):
            writer.write(name, values.float())
        writer.flush()
        self._note("backward", layer, len(gradient))

    def _read_the_same(self, what: str, layer: int, *inputs: torch.Tensor) -> bool:
        if self._done.get((what, layer, self._row)) != len(inputs[0]):
            return False
        names = ("hidden", "index", "weights")
        return all(
            _equal(self._rows(_name(layer), name, len(one)), one)
            for name, one in zip(names, inputs, strict=True)
        )

    def _rows(self, file: str, name: str, count: int) -> torch.Tensor:
        return self._readers[file].read(name, self._row, self._row + count)

    def _keep(self, file: str, values: Mapping[str, torch.Tensor]) -> None:
        writer = self._writers[file]
        for name, tensor in values.items():
            writer.write(name, tensor.detach(), row=self._row)
        writer.flush()

    def _remember(self, what: str, layer: int, row: int, rows: int) -> None:
        if what == "backward" and row != self._slopes_of:  # one file for all lots: now this one's
            self._done = {key: n for key, n in self._done.items() if key[0] != "backward"}
            self._slopes_of = row
        self._done[what, layer, row] = rows

    def _forget(self, what: str, layer: int) -> None:
        """Take back a note before its rows are written again, lest a torn write look whole."""
        if (what, layer, self._row) in self._done:
            self._note(what, layer, 0)

    def _note(self, what: str, layer: int, rows: int) -> None:
        self._remember(what, layer, self._row, rows)
        entry = {"ran": what, "layer": layer, "row": self._row, "rows": rows}
        if rows:
            entry["checksum"] = self._checksum(_name(layer), _PARTS[what], self._row, rows)
        if rows and what == "backward":
            entry["slopes"] = self._checksum(_SLOPES, _slopes(layer), 0, rows)
        self._journal.append(entry)

    # One layer's sums after the other.

    def sums(self, layer: int) -> dict[str, NDArray[Any]] | None:
        """Return what was kept of a layer by :meth:`keep_sums`, if it is as it was left."""
        path = self.folder / f"sums-{layer}.safetensors"
        data = path.read_bytes() if path.exists() else b""
        return load(data) if data and zlib.crc32(data) == self._sums.get(layer) else None

    def keep_sums(self, layer: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what a layer's tokens say of its experts."""
        data = safetensors_bytes(dict(arrays))
        replace_atomically(self.folder / f"sums-{layer}.safetensors", data)
        self._journal.append({"sums": layer, "checksum": zlib.crc32(data)})


def record_tensors(source: Checkpoint, tokens: int, lot: int) -> dict[str, dict[str, TensorInfo]]:
    """Return what each file of a record holds."""
    files: dict[str, dict[str, TensorInfo]] = {_SLOPES: {}}
    for number, layer in enumerate(source.moe.spec.moe_layers):
        wide = TensorInfo(torch.float32, (tokens, layer.hidden_size))
        files[_name(number)] = {
            **dict.fromkeys(("hidden", "output", "gradient"), wide),
            "weights": TensorInfo(torch.float32, (tokens, layer.top_k)),
            "index": TensorInfo(torch.int64, (tokens, layer.top_k)),
        }
        files[_SLOPES] |= {
            name: TensorInfo(torch.float32, (lot, width))
            for name, width in zip(_slopes(number), (layer.hidden_size, layer.top_k), strict=True)
        }
    return files


def disk_needed(source: Checkpoint, tokens: int, lot: int) -> int:
    """Return the bytes on disk that a record takes, but for its journal and sums."""
    plans = record_tensors(source, tokens, lot)
    return sum(file_bytes(held, {}) for held in plans.values())


def _name(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _slopes(layer: int) -> tuple[str, str]:
    return f"{layer}.hidden", f"{layer}.weights"


def _equal(kept: torch.Tensor, now: torch.Tensor) -> bool:
    return torch.equal(kept, now.detach().to(kept.dtype))
