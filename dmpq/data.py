"""Calibration, search and held-out text: read, tokenized, cut into windows, never overlapping."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq import embedded
from dmpq.errors import InputError, did_you_mean, first_line

Windows = NDArray[np.int64]

_SUFFIXES: Final = (".json", ".jsonl", ".parquet", ".txt")
_TEXT_COLUMNS: Final = ("text", "content", "sentence")
_HELDOUT_SHARE: Final = 0.2
_STRANGE_SHARE: Final = 0.01
"""Share of characters that may be no UTF-8: a file cut in the middle of one is still text."""
_BLOCK: Final = 1 << 16
"""Characters tokenized at a time, so that a long file needs no second copy in memory."""


@dataclass(frozen=True)
class TokenRequest:
    """How many tokens each role needs; ``0`` for a role that is not used.

    Of ``further`` calibration text there may be less: what the other roles leave. ``calibration``
    is what GPTQ is calibrated by.
    """

    profile: int
    search: int
    selection: int
    heldout: int
    further: int = 0
    calibration: int = 0


@dataclass(frozen=True)
class Draw:
    """Which windows of a calibration text were drawn: what a profile was measured on.

    Attributes:
        stream: SHA-256 of all token ids of the calibration text.
        length: Tokens per window.
        windows: Numbers of the windows drawn, counted from the text's beginning.
    """

    stream: str
    length: int
    windows: tuple[int, ...]

    def touched(self, length: int, count: int) -> NDArray[np.bool_]:
        """Return which windows of another length share a token with those drawn.

        Args:
            length: Tokens per window of the other cut of the same text.
            count: Number of its windows.

        Returns:
            (count,).
        """
        touched = np.zeros(count, np.bool_)
        for window in self.windows:
            start = window * self.length
            touched[start // length : (start + self.length - 1) // length + 1] = True
        return touched


@dataclass(frozen=True)
class CalibrationText:
    """The text that GPTQ is calibrated by, as a bit map tells it.

    Attributes:
        dataset: As for :func:`load_splits`; ``"ebss"`` where the model wrote the text itself.
        draw: Which of its windows were drawn. Of a text that the model wrote: its SHA-256, and in
            place of windows the tokens that these start with.
    """

    dataset: str
    draw: Draw

    def to_json(self) -> dict[str, Any]:
        """Return it as a bit map's ``calibration``."""
        return {"dataset": self.dataset, **asdict(self.draw)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CalibrationText:
        """Return what :meth:`to_json` described, of a valid bit map."""
        draw = Draw(data["stream"], data["length"], tuple(data["windows"]))
        return cls(data["dataset"], draw)


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint windows of token ids, each int64 (windows, length).

    Attributes:
        profile: For the experts' statistics and sensitivities.
        search: For the search's evaluations.
        selection: Fresh calibration text for the final choice among candidates.
        further: Further calibration text, for searches that read more than the search's.
        heldout: For what is reported; its documents serve no other role.
        source: What the text is, in words.
        drawn: The windows of ``profile``.
        calibration: For GPTQ, and nothing else; ``None`` where none was asked for.
        calibrating: The windows of ``calibration``.
    """

    profile: Windows
    search: Windows
    selection: Windows
    further: Windows
    heldout: Windows
    source: str
    drawn: Draw
    calibration: Windows | None = None
    calibrating: Draw | None = None


def load_splits(
    dataset: str,
    tokenizer: Any,
    *,
    length: int,
    tokens: TokenRequest,
    seed: int,
    taken: Sequence[Draw] = (),
) -> Splits:
    """Return windows of text for every role.

    The embedded text keeps calibration and held-out documents apart by module. Of a data set
    with a test or validation split that split is held out; of any other the last fifth. The
    calibration windows are drawn at random by ``seed``; the held-out windows are always the same.
    Either way they come evenly from all documents, as far as these are long enough: a few long
    ones would otherwise decide what every figure says.

    Args:
        dataset: ``"embedded"``, a local file or folder (.txt, .jsonl, .json, .parquet), or a hub
            name, with a configuration after a colon (``"wikitext:wikitext-2-raw-v1"``).
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per window.
        tokens: Number of tokens per role, rounded up to whole windows.
        seed: Draws the calibration windows.
        taken: What earlier draws from the same text have used; no role gets any of it. A draw
            from another text has no effect.

    Raises:
        InputError: If the text cannot be read, or is too short.
    """
    calibration, heldout, source = _read(dataset)
    pool, owners, stream = _windows(calibration, tokenizer, length)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pool))
    for draw in taken:
        if draw.stream == stream:
            order = order[~draw.touched(length, len(pool))[order]]
    counts = [-(-t // length) for t in (tokens.profile, tokens.search, tokens.selection)]
    needed, own = sum(counts), -(-tokens.calibration // length)
    if len(order) < needed + own:
        raise _too_short(dataset, "calibration", len(order), needed + own, length)
    drawn_evenly = evenly(order, owners, needed + own + -(-tokens.further // length))
    order = rng.permutation(drawn_evenly[:needed])
    profile, search, selection = np.split(pool[order], np.cumsum(counts)[:2])
    calibrating = np.sort(drawn_evenly[needed : needed + own])
    further = pool[rng.permutation(drawn_evenly[needed + own :])]
    wanted = -(-tokens.heldout // length)
    rest, owners, _ = _windows(heldout, tokenizer, length)
    if len(rest) < wanted:
        raise _too_short(dataset, "held-out", len(rest), wanted, length)
    spread = np.sort(evenly(np.random.default_rng(0).permutation(len(rest)), owners, wanted))
    drawn = Draw(stream, length, tuple(sorted(order[: counts[0]].tolist())))
    splits = Splits(profile, search, selection, further, rest[spread], source, drawn)
    if not own:
        return splits
    draw = Draw(stream, length, tuple(calibrating.tolist()))
    return replace(splits, calibration=pool[calibrating], calibrating=draw)


def training_text(dataset: str) -> tuple[list[str], str]:
    """Return texts to train on, and what they are in words; none of them is held out.

    Of the embedded text those of the modules that the bundled model was trained on; of any other
    what :func:`load_splits` has for calibration.

    Args:
        dataset: As for :func:`load_splits`.

    Raises:
        InputError: If the text cannot be read.
    """
    if dataset == "embedded":
        texts = [document.text for document in embedded.side_documents("train")]
        return texts, "embedded (the standard library's training modules)"
    calibration, _, source = _read(dataset)
    return calibration, source


def token_stream(texts: Sequence[str], tokenizer: Any) -> NDArray[np.int64]:
    """Return the token ids of texts on end, int64 (tokens,).

    Each is closed by end-of-text, or a line's end where the tokenizer has no such token.

    Args:
        texts: One or more.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        InputError: If the tokenizer knows no text.
    """
    return np.concatenate(_pieces(texts, tokenizer))


def redrawn(dataset: str, tokenizer: Any, draw: Draw) -> Windows:
    """Return the windows that an earlier draw took, in their order in the text.

    Args:
        dataset: As for :func:`load_splits`.
        tokenizer: A Hugging Face tokenizer.
        draw: What was drawn.

    Returns:
        int64 (windows, length).

    Raises:
        InputError: If the text cannot be read, or is not the one that was drawn from.
    """
    pool, _, stream = _windows(_read(dataset)[0], tokenizer, draw.length)
    if stream != draw.stream:
        raise InputError(
            f"The text {dataset!r} is another than the one drawn from (its tokens hash to "
            f"{stream[:12]}..., not {draw.stream[:12]}...); give the same text and tokenizer."
        )
    if draw.windows and not 0 <= min(draw.windows) <= max(draw.windows) < len(pool):
        raise InputError(
            f"The draw from {dataset!r} names window {max(draw.windows)}, and there are "
            f"{len(pool)}, counted from 0; draw again."
        )
    return pool[np.array(draw.windows, np.int64)]


def evenly(order: NDArray[np.int64], owners: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return windows in rounds: one of each document, one more of each that has another, and on.

    Args:
        order: (n,), numbers of the windows to choose from; of a document those come first that
            come first here.
        owners: (windows,), the document of each window.
        count: Windows wanted, at most n.

    Returns:
        (count,).
    """
    by_owner = np.argsort(owners[order], kind="stable")
    _, first, sizes = np.unique(owners[order][by_owner], return_index=True, return_counts=True)
    rounds = np.empty(len(order), np.int64)
    rounds[by_owner] = np.arange(len(order)) - np.repeat(first, sizes)
    return order[np.argsort(rounds, kind="stable")[:count]]


def _too_short(dataset: str, role: str, have: int, need: int, length: int) -> InputError:
    return InputError(
        f"The text {dataset!r} is too short: its {role} part gives {have * length:,} tokens and "
        f"{need * length:,} are needed; give more text or ask for fewer tokens "
        "(--profile-tokens, --search-tokens, --selection-tokens, --heldout-tokens)."
    )


def _pieces(texts: Sequence[str], tokenizer: Any) -> list[NDArray[np.int64]]:
    """Tokenize and close each text.

    A text is closed by end-of-text, or a line's end where the tokenizer has no such token.

    Raises:
        InputError: If the tokenizer knows no text, as one whose files are missing.
    """
    end = [tokenizer.eos_token_id]
    if tokenizer.eos_token_id is None:
        end = tokenizer("\n", add_special_tokens=False).input_ids
    pieces: list[NDArray[np.int64]] = []
    for text in texts:
        ids: list[int] = []
        for start in range(0, len(text), _BLOCK):
            part = text[start : start + _BLOCK]
            ids.extend(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
        pieces.append(np.array(ids + end, dtype=np.int64))
    if pieces and all(len(piece) == len(end) for piece in pieces) and any(map(str.strip, texts)):
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'the model'} gives no token for any "
            "text: its vocabulary is missing; put the checkpoint's tokenizer files "
            "(tokenizer.json, or tokenizer.model) into its folder."
        )
    return pieces


def _windows(
    texts: Sequence[str], tokenizer: Any, length: int
) -> tuple[Windows, NDArray[np.int64], str]:
    """Tokenize, close each text, and cut into windows; the rest is dropped.

    Returns the windows, the number of the text in which each begins, and the SHA-256 of all token
    ids.
    """
    pieces = _pieces(texts, tokenizer)
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    whole = len(stream) // length
    digest = hashlib.sha256(stream.tobytes()).hexdigest()
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    owners = np.searchsorted(ends, length * np.arange(whole), side="right")
    return stream[: whole * length].reshape(whole, length), owners, digest


def _read(dataset: str) -> tuple[list[str], list[str], str]:
    """Return calibration texts, held-out texts, and what they are."""
    if not dataset.strip():
        raise InputError(
            "--dataset is empty; give 'embedded', a local file or folder, or a hub name."
        )
    if dataset == "embedded":
        calibration = embedded.texts_told_once("calibration")  # its windows serve several roles
        heldout = [document.text for document in embedded.side_documents("heldout")]
        return calibration, heldout, "embedded (the standard library's code and docstrings)"
    if os.path.exists(dataset):
        path = Path(dataset)
        texts = _read_local(path)
        return *_cut(texts), f"{path.name} (last fifth held out)"
    return _read_hub(dataset)


def _cut(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts before and after a share of all characters; one may be cut in two."""
    cut = round(sum(map(len, texts)) * (1 - _HELDOUT_SHARE))
    begins = np.cumsum([0, *map(len, texts)]).tolist()
    before = [text[: max(0, cut - begin)] for text, begin in zip(texts, begins, strict=False)]
    after = [text[max(0, cut - begin) :] for text, begin in zip(texts, begins, strict=False)]
    return [text for text in before if text], [text for text in after if text]


def _read_local(path: Path) -> list[str]:
    inside = path.rglob("*") if path.is_dir() else [path]
    files = sorted(f for f in inside if f.is_file() and f.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(
            f"{path} is no text that can be read; give a file or folder of {', '.join(_SUFFIXES)}."
        )
    texts = [text for file in files if file.stat().st_size for text in _read_file(file)]
    if not any(text.strip() for text in texts):
        raise InputError(f"The text {path} is empty; give a file with text in it.")
    return texts


def _read_file(file: Path) -> list[str]:
    kind = file.suffix.lower()
    try:
        if kind == ".txt":
            return [_decoded(file)]
        if kind == ".parquet":
            return _parquet_texts(file)
        return _json_texts(file, by_line=kind == ".jsonl")
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read as {kind[1:]} ({first_line(error)}); correct it, or leave it "
            "out."
        ) from error


def _decoded(file: Path) -> str:
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    strange = text.count("\ufffd") + text.count("\0")
    if strange > _STRANGE_SHARE * len(text):
        raise InputError(
            f"{file} is no UTF-8 text ({strange:,} of its {len(text):,} characters are none); "
            "convert it to UTF-8."
        )
    return text


def _json_texts(file: Path, *, by_line: bool) -> list[str]:
    """Read rows by the standard library: Arrow's reader crashes on a file of ``null``."""
    text = _decoded(file)
    try:
        whole = None if by_line else json.loads(text)
    except json.JSONDecodeError:  # many a .json holds one object a line
        by_line = True
    if by_line:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        rows = whole if isinstance(whole, list) else [whole]
    names = list(dict.fromkeys(n for row in rows if isinstance(row, dict) for n in row))
    column = _text_column(names, str(file))
    return _texts(row.get(column) for row in rows if isinstance(row, dict))


def _parquet_texts(file: Path) -> list[str]:
    import pandas as pd

    table = pd.read_parquet(file)
    return _texts(table[_text_column([str(name) for name in table.columns], str(file))])


def _texts(rows: Iterable[Any]) -> list[str]:
    """Return the rows that hold text."""
    return [row for row in rows if isinstance(row, str)]


def _text_column(columns: list[str], where: str) -> str:
    for name in _TEXT_COLUMNS:
        if name in columns:
            return name
    raise InputError(
        f"{where} has no column of text; it has {', '.join(columns)[:200] or 'none'}, and one of "
        f"{', '.join(_TEXT_COLUMNS)} is needed."
    )


def _read_hub(dataset: str) -> tuple[list[str], list[str], str]:
    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    try:
        splits = load_dataset(name, configuration or None)
    except Exception as error:
        hint = did_you_mean(dataset, ["embedded"])
        raise InputError(
            f"There is no file {dataset!r}{hint}, and the hub has not delivered a data set of "
            f"that name ({first_line(error)}); give 'embedded', a local file or folder, or a hub "
            "name with a network at hand."
        ) from error
    columns = next(iter(splits.values())).column_names
    column = _text_column(columns, dataset)
    apart = next((s for s in ("test", "validation") if s in splits), None)
    main = next((s for s in ("train", "validation") if s in splits and s != apart), None)
    if apart is not None and main is not None:
        return _texts(splits[main][column]), _texts(splits[apart][column]), f"{dataset} ({apart})"
    only = apart or main or next(iter(splits))
    return *_cut(_texts(splits[only][column])), f"{dataset} (last fifth held out)"
