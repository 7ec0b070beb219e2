"""Formats on offer for an expert's weights, and what they really cost in bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.quantizer import Quantizer

QUANTIZED_WIDTHS: Final = (2, 3, 4, 8)
FULL_WIDTH: Final = 16
PRUNED_WIDTH: Final = 0
DEFAULT_GROUP_SIZE: Final = 128
SCALE_BITS: Final = 16
COMPENSATOR_BITS: Final = 3
"""Width of a compensator's factors: MiLo stores them in INT3 (arXiv 2504.02658)."""
_COMPENSATOR_GROUP: Final = 64

_KEY: Final = re.compile(r"(?P<bits>\d+)(?:g(?P<group>\d+))?")


@dataclass(frozen=True, order=True)
class Format:
    """One way to store a weight matrix.

    Attributes:
        bits: Nominal width; 16 is the checkpoint's own precision, 0 a pruned expert: nothing of
            it is stored, and the routing weights of a token's other experts take up its own
            (:mod:`dmpq.pruning`).
        group_size: Number of consecutive input weights that share a scale.
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        if self.bits not in (PRUNED_WIDTH, *QUANTIZED_WIDTHS, FULL_WIDTH):
            allowed = ", ".join(str(b) for b in (*QUANTIZED_WIDTHS, FULL_WIDTH))
            raise InputError(
                f"Bit-width {self.bits} is not on offer; choose among {allowed}, or 0 for a "
                "pruned expert."
            )
        if self.group_size < 1:
            raise InputError(
                f"Group size {self.group_size} is not positive; choose for example 32, 64 or 128."
            )
        if not self.is_quantized and self.group_size != DEFAULT_GROUP_SIZE:
            raise InputError(f"{self.bits} bits are stored without groups; write '{self.bits}'.")

    @classmethod
    def parse(cls, key: str) -> Format:
        """Return the format of a menu key such as ``"2"`` or ``"2g32"``."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{key!r} is not a format; write for example '4' or '4g32'.")
        return cls(int(match["bits"]), int(match["group"] or DEFAULT_GROUP_SIZE))

    @property
    def key(self) -> str:
        """The name in a bit map: the width, and the group size where it is not the default."""
        suffix = "" if self.group_size == DEFAULT_GROUP_SIZE else f"g{self.group_size}"
        return f"{self.bits}{suffix}"

    @property
    def is_full(self) -> bool:
        """Whether this is the checkpoint's own precision."""
        return self.bits == FULL_WIDTH

    @property
    def is_pruned(self) -> bool:
        """Whether nothing is stored: the expert is left out."""
        return self.bits == PRUNED_WIDTH

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored as codes in groups."""
        return not (self.is_full or self.is_pruned)

    def group_along(self, in_features: int) -> int:
        """Return the group size along an input of ``in_features``: never wider than the input.

        Raises:
            InputError: If the input is not a whole number of groups.
        """
        group = min(self.group_size, in_features)
        if in_features % group:
            raise InputError(
                f"Group size {self.group_size} does not divide an input width of {in_features}; "
                "choose a group size that does."
            )
        return group


@dataclass(frozen=True)
class Menu:
    """The formats among which a search chooses, cheapest first, under one quantizer.

    Attributes:
        formats: Formats by increasing width, then decreasing group size; no two alike.
        quantizer: The text of a :class:`~dmpq.quantizer.Quantizer`, as ``"hqq"``.
        symmetric: Whether codes are symmetric around zero, so that no zero-point is stored.
    """

    formats: tuple[Format, ...] = field(
        default_factory=lambda: tuple(Format(b) for b in (*QUANTIZED_WIDTHS, FULL_WIDTH))
    )
    quantizer: str = "hqq"
    symmetric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizer", str(self.method))
        if not self.formats:
            raise InputError("The menu of bit-widths is empty; give at least one, as in '2,4,16'.")
        ordered = tuple(sorted(set(self.formats), key=lambda f: (f.bits, -f.group_size)))
        if len(ordered) != len(self.formats):
            raise InputError("The menu of bit-widths names a format twice; name each once.")
        object.__setattr__(self, "formats", ordered)

    @classmethod
    def parse(
        cls,
        keys: str | Iterable[str],
        *,
        quantizer: str = "hqq",
        symmetric: bool = False,
        group_sizes: str | None = None,
    ) -> Menu:
        """Return the menu of comma-separated keys, for example ``"2,3,4,8,16"``.

        Args:
            keys: Of the formats.
            quantizer: As :meth:`dmpq.quantizer.Quantizer.parse` reads it, for example ``"hqq"``.
            symmetric: Whether codes are symmetric around zero.
            group_sizes: Comma-separated; each quantized format is offered in groups of every one.

        Raises:
            InputError: If a key, a group size or the quantizer is none, if a format is named
                twice, if a key names a group size beside those given for all, or if pruned is
                all that is on offer.
        """
        method = Quantizer.parse(quantizer)
        names = keys.split(",") if isinstance(keys, str) else list(keys)
        names = [name.strip() for name in names if name.strip()]
        if group_sizes is not None:
            own = next((name for name in names if "g" in name), None)
            if own is not None:
                raise InputError(
                    f"The format {own!r} names its group, and group sizes are given for all; name "
                    "them in one way."
                )
            sizes = [size.strip() for size in group_sizes.split(",") if size.strip()]
            if not sizes:
                raise InputError("No group sizes are given; write some, as in 32,64,128.")
            without = (str(PRUNED_WIDTH), str(FULL_WIDTH))
            quantized = [name for name in names if name not in without]
            rest = [name for name in names if name in without]
            names = [*(f"{name}g{size}" for name in quantized for size in sizes), *rest]
        menu = cls(tuple(map(Format.parse, names)), str(method), symmetric)
        if not menu.stored:
            raise InputError(
                "The menu offers pruned experts (0) alone; give a width besides, as in '0,2,4,16'."
            )
        return menu

    def __len__(self) -> int:
        """Return the number of formats."""
        return len(self.formats)

    @cached_property
    def method(self) -> Quantizer:
        """The quantizer, read."""
        return Quantizer.parse(self.quantizer)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each format."""
        return tuple(f.key for f in self.formats)

    @cached_property
    def bits(self) -> NDArray[np.int64]:
        """The nominal width of each format, shape (B,)."""
        return np.array([f.bits for f in self.formats])

    @cached_property
    def pruned(self) -> NDArray[np.bool_]:
        """Whether each format is a pruned expert, shape (B,)."""
        return np.array([f.is_pruned for f in self.formats])

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """Positions of the formats that store weights, cheapest first."""
        return tuple(np.flatnonzero(~self.pruned).tolist())

    @property
    def narrowest(self) -> int:
        """Position of the narrowest format that stores weights: the yardstick of damage.

        A model without any expert is none: its loss says little of what quantization costs, and
        it would make menus with and without pruning incomparable.
        """
        return self.stored[0] if self.stored else 0

    @property
    def pruning(self) -> tuple[int, int] | None:
        """Positions of the pruned format and of the narrowest stored one; ``None`` without."""
        return (self.pruned.tolist().index(True), self.narrowest) if self.pruned.any() else None

    def check_whole(self, pairs: NDArray[np.integer]) -> None:
        """Refuse maps that prune one projection of an expert and keep the other.

        Args:
            pairs: (..., 2), positions of gate+up and of down.

        Raises:
            InputError: If there is one.
        """
        halves = self.pruned[pairs[..., 0]] != self.pruned[pairs[..., 1]]
        if halves.any():
            raise InputError(
                f"A map prunes one projection of an expert and keeps the other ({halves.sum()} "
                "times); an expert is pruned whole: give both 0, or neither."
            )

    def index(self, key: str) -> int:
        """Return the position of a key on the menu."""
        if key not in self.keys:
            raise unknown("format", key, self.keys, "Widths on offer are set with --bits.")
        return self.keys.index(key)

    def overhead_bits(self, fmt: Format) -> int:
        """Return the bits that one group adds: a 16-bit scale, and a zero-point if asymmetric.

        RTN and GPTQ round their zero-points to integer codes; HQQ's are 16-bit floats.
        """
        if self.symmetric:
            return SCALE_BITS
        return SCALE_BITS + (fmt.bits if self.method.integer_zero else SCALE_BITS)

    def stored_bits(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return the bits that a matrix of ``shape`` (out, in) takes in each format, (B,).

        Raises:
            InputError: If a group does not divide ``in``, or the quantizer's compensator has a
                higher rank than the matrix.
        """
        out_features, in_features = shape
        factors = 0
        if self.method.rank:
            check_rank(self.method.rank, shape)
            factors = sum(
                self.method.rank * self._row_bits(compensator_format(width), width)
                for width in shape
            )
        stored = [
            out_features * self._row_bits(f, in_features) + factors
            if f.is_quantized
            else out_features * in_features * f.bits
            for f in self.formats
        ]
        return np.array(stored)

    def _row_bits(self, fmt: Format, width: int) -> int:
        return width * fmt.bits + width // fmt.group_along(width) * self.overhead_bits(fmt)

    def effective_bits(self, in_features: int, *, out_features: int = 1) -> NDArray[np.float64]:
        """Return bits per weight, all that is stored included, of each format, shape (B,).

        Args:
            in_features: Input width of the matrix.
            out_features: Its output width, on which the share of a compensator depends and
                nothing else does.
        """
        shape = out_features, in_features
        return self.stored_bits(shape) / (out_features * in_features)


def compensator_format(width: int) -> Format:
    """Return how rows of ``width`` of a compensator's factors are stored."""
    return Format(COMPENSATOR_BITS, math.gcd(width, _COMPENSATOR_GROUP))


def check_rank(rank: int, shape: Sequence[int]) -> None:
    """Refuse a compensator of a higher rank than the matrix it compensates.

    Raises:
        InputError: If ``rank`` is above the smaller dimension of ``shape``.
    """
    if rank > min(shape):
        raise InputError(
            f"A compensator of rank {rank} does not suit a matrix of {shape[0]} by {shape[1]}; "
            f"give a rank of at most {min(shape)}."
        )
