"""How weights are quantized, as one name: ``rtn``, ``hqq+lr8``, ``gptq,tokens=4096,affinity``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from dmpq.errors import InputError, did_you_mean, unknown

QuantizerName = Literal["rtn", "hqq", "gptq"]

QUANTIZERS: Final[tuple[QuantizerName, ...]] = get_args(QuantizerName)
CALIBRATED: Final = "gptq"
DEFAULT_DAMPING: Final = 0.01
DEFAULT_BEAMS: Final = 4
DEFAULT_TAU: Final = 1.2

_RANK: Final = "lr"
_LARGEST_DAMPING: Final = 10.0
_MOST_BEAMS: Final = 64
_LEAST_TAU: Final = 1e-6
_LARGEST_TAU: Final = 1e6
_OF_EBSS: Final = ("beams", "tau")


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
        ebss: GPTQ: the model writes the text itself (MoEQuant's expert-balanced self-sampling;
            see :mod:`dmpq.ebss`): as many tokens as asked for, or as the profile has.
        beams: With ``ebss``: prefixes kept while a window is written, MoEQuant's w.
        tau: With ``ebss``: larger values weigh balance less beside likelihood.
        damping: GPTQ: share of the Hessian's mean diagonal that is added to its diagonal.
    """

    name: QuantizerName
    rank: int = 0
    tokens: int | None = None
    affinity: bool = False
    balanced: bool = False
    ebss: bool = False
    beams: int = DEFAULT_BEAMS
    tau: float = DEFAULT_TAU
    damping: float = DEFAULT_DAMPING

    def __post_init__(self) -> None:
        if self.name not in QUANTIZERS:
            raise unknown("quantizer", self.name, QUANTIZERS)
        if self.calibrated and self.rank:
            raise InputError(
                f"The quantizer {self.name!r} takes no compensator (rank {self.rank}); add it to "
                "rtn or hqq, as in hqq+lr8."
            )
        given = [o.name for o in fields(self)[2:] if getattr(self, o.name) != o.default]
        if not self.calibrated and given:
            raise InputError(
                f"The quantizer {self.name!r} is not calibrated and takes no options; give them "
                "to gptq, as in gptq,affinity."
            )
        if self.balanced and self.tokens is None:
            raise InputError(
                "Balanced calibration chooses among windows of text, but the number of tokens is "
                "not given; write it, as in gptq,tokens=4096,balanced."
            )
        if self.balanced and self.ebss:
            raise InputError(
                "Balanced calibration chooses among windows of given text, and with ebss the "
                "model writes its own; give one of the two."
            )
        if not self.ebss and (lone := [name for name in given if name in _OF_EBSS]):
            raise InputError(
                f"The quantizer's option {lone[0]!r} is of the text that a model writes; give "
                f"ebss too, as in gptq,ebss,{lone[0]}={getattr(self, lone[0])!r}."
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
                ``affinity``, ``balanced``, ``ebss``, ``beams=W``, ``tau=T`` and ``damping=SHARE``.

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
            *(["ebss"] if self.ebss else []),
            *([] if self.beams == DEFAULT_BEAMS else [f"beams={self.beams}"]),
            *([] if self.tau == DEFAULT_TAU else [f"tau={self.tau!r}"]),
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
    tokens = _whole(value)
    if tokens < 1:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a number of tokens, as in "
            f"gptq,{option}=4096."
        )
    return tokens


def _beams(option: str, value: str | None) -> int:
    beams = _whole(value)
    if not 1 <= beams <= _MOST_BEAMS:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a number from 1 to "
            f"{_MOST_BEAMS}, as in gptq,ebss,{option}={DEFAULT_BEAMS}."
        )
    return beams


def _whole(value: str | None) -> int:
    return int(value) if value is not None and _is_whole(value) else 0


def _damping(option: str, value: str | None) -> float:
    share = _number(value)
    if not 0 < share <= _LARGEST_DAMPING:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a share above 0, and not above "
            f"{_LARGEST_DAMPING:g}, as in gptq,{option}=0.01."
        )
    return share


def _tau(option: str, value: str | None) -> float:
    tau = _number(value)
    if not _LEAST_TAU <= tau <= _LARGEST_TAU:
        raise InputError(
            f"The quantizer's option {option!r} is {value!r}; give a number from {_LEAST_TAU:g} "
            f"to {_LARGEST_TAU:g}, as in gptq,ebss,{option}={DEFAULT_TAU}."
        )
    return tau


def _number(value: str | None) -> float:
    try:
        return float(value or "")
    except ValueError:
        return math.nan


_OPTIONS: Final[dict[str, Callable[[str, str | None], Any]]] = {
    "tokens": _tokens,
    "affinity": _flag,
    "balanced": _flag,
    "ebss": _flag,
    "beams": _beams,
    "tau": _tau,
    "damping": _damping,
}
