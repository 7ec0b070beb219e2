"""Further calibration text, a piece at a time: what a search reads instead of the same again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, overload

from dmpq.bank import Bank
from dmpq.data import Windows
from dmpq.evaluation import Evaluator
from dmpq.files import JsonLines
from dmpq.model_evaluator import ModelEvaluator

PIECE_TOKENS: Final = 8192


class FurtherText(Sequence[Evaluator]):
    """Evaluators on pieces of one text, in whole windows.

    One is kept at a time, since what the full-precision model says of a piece takes memory.

    Args:
        bank: The model's variants.
        windows: int64 (windows, length), the text; what is left over of it is not read.
        tokens: Of a piece.
        journal: Where answers are kept and looked up.
    """

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
        *,
        tokens: int = PIECE_TOKENS,
        journal: JsonLines | None = None,
    ) -> None:
        self._bank = bank
        self._windows = windows
        self._journal = journal
        self._size: int = max(1, tokens // windows.shape[1])
        self._kept: tuple[int, ModelEvaluator] | None = None

    def __len__(self) -> int:
        return len(self._windows) // self._size

    @overload
    def __getitem__(self, index: int) -> Evaluator: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Evaluator]: ...

    def __getitem__(self, index: int | slice) -> Evaluator | Sequence[Evaluator]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # before another takes memory
            start = number * self._size
            piece = self._windows[start : start + self._size]
            label = f"further {number}"
            self._kept = (
                number,
                ModelEvaluator(self._bank, piece, label=label, journal=self._journal),
            )
        return self._kept[1]
