"""How weights are quantized, as one name: ``rtn``, ``hqq+lr8``, ``gptq,tokens=4096,affinity``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from dmpq.errors import InputError, did_you_mean, unknown

QuantizerName = Literal["rtn", "hqq", "gptq"]

QUANTIZERS: Final[tuple[QuantizerName, ...]] = get_args(QuantizerName)
CALIBRATED: Final = "gptq"
DEFAULT_DAMPING: Final = 0.01

_RANK: Final = "lr"
_LARGEST_DAMPING: Final = 10.0


@dataclass(frozen=True)
class Quantizer:
    """A method with its options; its text is what ``--quantizer`` takes and a bit map holds.

    Attributes:
        name: ``"rtn"`` (round to nearest), ``"hqq"`` or ``"gptq"``.
        rank: Of the low-rank compensator that MiLo (arXiv 2504.02658) adds to every quantized
            matrix; 0 for none. Written ``hqq+lr8``. Not with GPTQ, whose errors are small where
            the inputs are, not as a matrix.
        tokens: GPTQ: calibration tokens used, of those given, in whole windows; ``None`` for all.
        affinity: GPTQ: tokens weigh by the routing weight that they give the expert (MoEQuant's
            affinity-guided quantization, arXiv 2505.03804).
        balanced: GPTQ: the windows used are those that together use a layer's experts most
            evenly, not a random draw (after MoEQuant's expert-balanced sampling).
        damping: GPTQ: share of the Hessian's mean diagonal that is added to its diagonal.
    """

    name: QuantizerName
    rank: int = 0
    tokens: int | None = None
    affinity: bool = False
    balanced: bool = False
    damping: float = DEFAULT_DAMPING

    def __post_init__(self) -> None:
        if self.name not in QUANTIZERS:
            raise unknown("quantizer", self.name, QUANTIZERS)
        if self.calibrated and self.rank:
            raise InputError(
                f"The quantizer {self.name!r} takes no compensator (rank {self.rank}); add it to "
                "rtn or hqq, as in hqq+lr8."
            )
        options = (self.tokens, self.affinity, self.balanced, self.damping)
        if not self.calibrated and options != (None, False, False, DEFAULT_DAMPING):
            raise InputError(
                f"The quantizer {self.name!r} is not calibrated and takes no options; give them "
                "to gptq, as in gptq,affinity."
            )
        if self.balanced and self.tokens is None:
            raise InputError(
                "Balanced calibration chooses among windows of text, but the number of tokens is "
                "not given; write it, as in gptq,tokens=4096,balanced."
            )

    @property
    def calibrated(self) -> bool:
        """Whether quantizing takes calibration text."""
        return self.name == CALIBRATED

    @property
    def integer_zero(self) -> bool:
        """Whether zero-points are integer codes, not 16-bit floats."""
        return self.name != "hqq"

    @classmethod
    def parse(cls, text: str) -> Quantizer:
        """Return the quantizer that a text names.

        Args:
            text: ``NAME``, ``NAME+lrRANK``, or ``gptq`` with options after commas: ``tokens=N``,
                ``affinity``, ``balanced`` and ``damping=SHARE``.

        Raises:
            InputError: If a name, an option or a value is none.
        """
        head, *parts = (part.strip() for part in text.split(","))
        name, plus, compensator = head.partition("+")
        if name not in QUANTIZERS:
            raise unknown("quantizer", name, QUANTIZERS)
        options: dict[str, Any] = {}
        if plus:
            rank = compensator.removeprefix(_RANK)
            if not compensator.startswith(_RANK) or not _is_whole(rank) or int(rank) < 1:
                raise InputError(
                    f"{compensator!r} is no compensator; write its rank, 1 or more, as in "
                    f"{name}+{_RANK}8."
                )
            options["rank"] = int(rank)
        for part in parts:
            option, equals, value = (piece.strip() for piece in part.partition("="))
            if option not in _OPTIONS:
                raise InputError(
                    f"{option!r} is no option of a quantizer{did_you_mean(option, _OPTIONS)}; "
                    f"there are {', '.join(_OPTIONS)}."
                )
            if option in options:
                raise InputError(
                    f"The quantizer's option {option!r} is given twice; give it once."
                )
            options[option] = _OPTIONS[option](option, value if equals else None)
        return cls(name, **options)

    def __str__(self) -> str:
        """Return the one spelling of this quantizer, which :meth:`parse` reads."""
        options = [
            *([] if self.tokens is None else [f"tokens={self.tokens}"]),
            *(["affinity"] if self.affinity else []),
            *(["balanced"] if self.balanced else []),
            *([] if self.damping == DEFAULT_DAMPING else [f"damping={self.damping!r}"]),
        ]
        return ",".join([self.name + (f"+{_RANK}{self.rank}" if self.rank else ""), *options])


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


def _flag(option: str, value: str | None) -> bool:
    if value is not None:
        raise InputError(
            f"The quantizer's option {option!r} takes no value and has {value!r}; write it "
            f"alone, as in gptq,{option}."
        )
    return True


def _tokens(option: str, value: str | None) -> int:
    if value is None or not _is_whole(value) or int(value) < 1:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a number of tokens, as in "
            f"gptq,{option}=4096."
        )
    return int(value)


def _damping(option: str, value: str | None) -> float:
    try:
        share = float(value or "")
    except ValueError:
        share = math.nan
    if not 0 < share <= _LARGEST_DAMPING:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a share above 0, and not above "
            f"{_LARGEST_DAMPING:g}, as in gptq,{option}=0.01."
        )
    return share


_OPTIONS: Final[dict[str, Callable[[str, str | None], Any]]] = {
    "tokens": _tokens,
    "affinity": _flag,
    "balanced": _flag,
    "damping": _damping,
}
