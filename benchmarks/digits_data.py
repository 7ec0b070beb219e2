"""Handwritten digits: the four idx files of MNIST or of a user, else scikit-learn's small set."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.errors import InputError

_STEMS: Final = {
    "train images": ("train-images", 3),
    "train labels": ("train-labels", 1),
    "test images": ("t10k-images", 3),
    "test labels": ("t10k-labels", 1),
}
_GZIP: Final = b"\x1f\x8b"
_UINT8: Final = 8
_MOST_BYTES: Final = 1 << 31
"""Of one file, unpacked; EMNIST, the largest of its kind, has a quarter of it."""
CLASSES: Final = 10


@dataclass(frozen=True, eq=False)
class Split:
    """Some images with their labels.

    Attributes:
        images: fp32 (N, pixels), ink from 0 to 1.
        labels: int64 (N,), 0 to 9.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, number: int) -> Split:
        """Return the first images, in an order that is random to begin with."""
        return Split(self.images[:number], self.labels[:number])


@dataclass(frozen=True, eq=False)
class Digits:
    """One data set, split.

    Attributes:
        name: ``"idx"``, or ``"scikit-learn"`` for its bundled digits.
        source: What was read, in a sentence.
        sha256: Of all images and labels, as bytes.
        train: What models are trained on.
        heldout: A tenth of the training images, which the number of epochs is chosen by.
        test: What the tables are measured on; nothing is chosen by it.
    """

    name: str
    source: str
    sha256: str
    train: Split
    heldout: Split
    test: Split


def load_digits(folder: Path) -> Digits:
    """Return the idx files of a folder, or scikit-learn's digits where it has none of them.

    Args:
        folder: With ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two of
            ``t10k``, each as it is or with ``.gz``; ``images.idx3`` and so on are read too.

    Raises:
        InputError: If only some of the files are there, or one is not what its name says.
    """
    found = {what: _find(folder, *stem) for what, stem in _STEMS.items()}
    missing = [what for what, path in found.items() if path is None]
    if len(missing) == len(found):
        return _bundled(folder)
    if missing:
        raise InputError(
            f"{folder} has no file of the {' and '.join(missing)}; put all four idx files of "
            "MNIST there, as they are or with .gz, or name a folder without any of them."
        )
    arrays = {what: read_idx(path, _STEMS[what][1]) for what, path in found.items() if path}
    for part in ("train", "test"):
        images, labels = arrays[f"{part} images"], arrays[f"{part} labels"]
        if len(images) != len(labels):
            raise InputError(
                f"{folder} has {len(images)} {part} images and {len(labels)} labels; there must "
                "be one label per image."
            )
        if labels.max() >= CLASSES:
            raise InputError(
                f"{found[f'{part} labels']} has the label {labels.max()}; digits are 0 to 9."
            )
    train, test = arrays["train images"], arrays["test images"]
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            f"{folder} has training images of {_size(train)} and test images of {_size(test)}; "
            "they must be of one size."
        )
    source = f"{len(train):,} training and {len(test):,} test images of {_size(train)}, idx files"
    return _digits("idx", source, arrays, ink=255.0)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return one idx file of bytes, gzipped or not.

    Args:
        path: The file.
        dimensions: 3 for images, 1 for labels.

    Returns:
        uint8 (N, height, width) or (N,), at least one entry along each.

    Raises:
        InputError: If it cannot be read, is of another kind, or is shorter or longer than it says.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
        with gzip.open(path) if packed else path.open("rb") as file:
            return _read(file, path, dimensions)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); copy it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend this.") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, dimensions: int) -> NDArray[np.uint8]:
    magic = file.read(4)
    wanted = bytes((0, 0, _UINT8, dimensions))
    if magic != wanted:
        raise InputError(
            f"{path} begins with the bytes {magic.hex(' ') or '(none)'}, and an idx file of "
            f"{'images' if dimensions > 1 else 'labels'} with {wanted.hex(' ')}; give MNIST's."
        )
    sizes = file.read(4 * dimensions)
    shape = tuple(int(size) for size in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
    count = int(np.prod(shape, dtype=object))
    if len(shape) < dimensions or not 0 < count <= _MOST_BYTES:
        raise InputError(
            f"{path} says that it has {' x '.join(map(str, shape)) or 'no'} values, and may have "
            f"1 to {_MOST_BYTES:,} in {dimensions} dimension(s); copy it again."
        )
    data = file.read(count + 1)
    if len(data) != count:
        has = f"only {len(data):,}" if len(data) < count else "more"
        raise InputError(
            f"{path} says that it has {count:,} bytes of data and has {has}; copy it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, stem: str, dimensions: int) -> Path | None:
    names = [f"{stem}{dash}idx{dimensions}-ubyte{end}" for dash in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _bundled(folder: Path) -> Digits:
    """Return scikit-learn's digits; every sixth image is a test image."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise InputError(
            f"{folder} has none of MNIST's four idx files, and scikit-learn, whose digits would "
            "stand in, is not installed; name a folder with them, or pip install scikit-learn."
        ) from error
    data = bundled()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    held = np.arange(len(labels)) % 6 == 5
    arrays = {
        "train images": images[~held],
        "train labels": labels[~held],
        "test images": images[held],
        "test labels": labels[held],
    }
    source = (
        f"NOT MNIST: {folder.name} has no idx files, so these are scikit-learn's bundled digits, "
        f"{(~held).sum():,} training and {held.sum():,} test images of {_size(images)}"
    )
    return _digits("scikit-learn", source, arrays, ink=16.0)


def _digits(name: str, source: str, arrays: dict[str, NDArray[np.uint8]], ink: float) -> Digits:
    """Return the arrays split; which tenth is held out depends on their number alone."""
    sums = hashlib.sha256(b"".join(arrays[what].tobytes() for what in _STEMS))
    splits = {
        part: Split(
            torch.from_numpy(arrays[f"{part} images"].reshape(len(labels), -1) / np.float32(ink)),
            torch.from_numpy(labels.astype(np.int64)),
        )
        for part, labels in (("train", arrays["train labels"]), ("test", arrays["test labels"]))
    }
    whole = splits["train"]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(whole) // 10], order[len(whole) // 10 :]
    heldout = Split(whole.images[held], whole.labels[held])
    train = Split(whole.images[kept], whole.labels[kept])
    return Digits(name, source, sums.hexdigest(), train, heldout, splits["test"])


def _size(images: NDArray[np.uint8]) -> str:
    return f"{images.shape[1]}x{images.shape[2]}"
