"""Safetensors files that are larger than memory: read slice by slice, written in any order.

The library maps a whole file into memory, which counts as resident, and writes one only from
tensors that are all there. A file is a length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"), so that both can be done by offset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open

from dmpq.errors import InputError, first_line

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the format's names; 8-bit floats, of checkpoints that are quantized already, are not read."""
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_LIBRARY_ORDER: Final = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
)
"""The library writes the last of these first; of one width, it does not go by names alone."""
_LENGTH: Final = 8
_CHUNK: Final = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, without its values.

    Attributes:
        dtype: Of its elements.
        shape: Of the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFile:
    """A safetensors file, read by offset and never mapped.

    Args:
        path: The file.

    Raises:
        InputError: If it is no whole safetensors file, or holds a type that is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):
                pass  # the library's own check of the header against the file's size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                header: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, ValueError) as error:
            raise InputError(
                f"{self.path} is no whole safetensors file ({first_line(error)}); get it again."
            ) from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, TensorInfo] = {}
        self._start: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise InputError(
                    f"{self.path} holds {name} as {entry['dtype']}, which is not read here; give "
                    "a checkpoint that is not quantized, in bfloat16, float16 or float32."
                )
            self.tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._start[name] = _LENGTH + length + entry["data_offsets"][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return a tensor, or the rows ``start`` to ``stop`` of it along the first dimension."""
        info = self.tensors[name]
        shape = info.shape
        if start or stop is not None:
            stop = shape[0] if stop is None else stop
            shape = (stop - start, *shape[1:])
        found = torch.empty(shape, dtype=info.dtype)
        if found.numel():
            row = info.num_bytes // info.shape[0] if info.shape else 0
            with self.path.open("rb", buffering=0) as file:
                _read_into(file, self._start[name] + start * row, found)
        return found

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a tensor's first dimension, in the order given."""
        info = self.tensors[name]
        found = torch.empty((len(indices), *info.shape[1:]), dtype=info.dtype)
        stride = info.num_bytes // max(1, info.shape[0])
        with self.path.open("rb", buffering=0) as file:
            for place, index in enumerate(indices):
                _read_into(file, self._start[name] + index * stride, found[place])
        return found

    def chunks(self, name: str) -> Any:
        """Yield a tensor's bytes, uint8, in pieces of 16 MiB at most."""
        left, at = self.tensors[name].num_bytes, self._start[name]
        with self.path.open("rb", buffering=0) as file:
            while left:
                piece = torch.empty(min(left, _CHUNK), dtype=torch.uint8)
                _read_into(file, at, piece)
                yield piece
                at, left = at + piece.numel(), left - piece.numel()


def _read_into(file: Any, at: int, tensor: torch.Tensor) -> None:
    view = memoryview(_bytes(tensor))
    file.seek(at)
    while view:
        count = file.readinto(view)
        if not count:
            raise InputError(f"{file.name} ends too early; get it again.")
        view = view[count:]


def _bytes(tensor: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor as a numpy array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def file_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> int:
    """Return the size of the file that would hold these tensors."""
    header, _ = _laid_out(tensors, metadata)
    return _LENGTH + len(header) + sum(info.num_bytes for info in tensors.values())


def _laid_out(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, as_library: bool = False
) -> tuple[bytes, dict[str, int]]:
    """Return a file's header, and where each tensor starts behind it."""

    def rank(dtype: torch.dtype) -> int:
        return _LIBRARY_ORDER.index(dtype) if as_library else dtype.itemsize

    # Wide types first, as the library does, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-rank(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start: dict[str, int] = {}
    at = 0
    for name in order:
        info = tensors[name]
        start[name] = at
        at += info.num_bytes
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start[name], at],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _LENGTH), start


class TensorFileWriter:
    """A safetensors file whose tensors are known beforehand, filled in any order.

    Args:
        path: The file; one of the same size that is there is gone on with.
        tensors: Everything that it will hold.
        metadata: Text for its header.
        as_library: Whether types of one width are in the library's order, so that the file is the
            library's own to the byte; else they are in the order of their names.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        *,
        as_library: bool = False,
    ) -> None:
        self.path = Path(path)
        header, self._start = _laid_out(tensors, metadata, as_library=as_library)
        head = len(header).to_bytes(_LENGTH, "little") + header
        self._tensors = tensors
        self._data = len(head)
        self.num_bytes = len(head) + sum(info.num_bytes for info in tensors.values())
        self.path.touch()
        self._file = self.path.open("r+b", buffering=0)
        self._file.write(head)
        os.ftruncate(self._file.fileno(), self.num_bytes)

    def write(self, name: str, values: torch.Tensor, *, row: int = 0) -> None:
        """Write values of a tensor, from a row of its first dimension on.

        Raises:
            ValueError: If they are of another type than was announced.
        """
        info = self._tensors[name]
        if values.dtype != info.dtype:
            raise ValueError(f"{name} is {info.dtype}, not {values.dtype}.")
        stride = info.num_bytes // info.shape[0] if info.shape and info.shape[0] else 0
        self.write_bytes(name, values.contiguous(), offset=row * stride)

    def write_bytes(self, name: str, values: torch.Tensor, *, offset: int) -> None:
        """Write a contiguous tensor's bytes into another's place, from a byte on."""
        self._file.seek(self._data + self._start[name] + offset)
        view = memoryview(_bytes(values))
        while view:
            view = view[self._file.write(view) :]

    def flush(self) -> None:
        """Hand everything to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Hand everything to the disk, and close the file; safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()
