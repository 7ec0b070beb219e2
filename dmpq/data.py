"""Calibration, search and held-out text: read, tokenized, cut into windows, never overlapping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq import embedded
from dmpq.errors import InputError, did_you_mean, first_line

Windows = NDArray[np.int64]

_READERS: Final = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_COLUMNS: Final = ("text", "content", "sentence")
_HELDOUT_SHARE: Final = 0.2
_BLOCK: Final = 1 << 16
"""Characters tokenized at a time, so that a long file needs no second copy in memory."""


@dataclass(frozen=True)
class TokenRequest:
    """How many tokens each role needs; ``0`` for a role that is not used."""

    profile: int
    search: int
    selection: int
    heldout: int


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint windows of token ids, each int64 (windows, length).

    Attributes:
        profile: For the experts' statistics and sensitivities.
        search: For the search's evaluations.
        selection: Fresh calibration text for the final choice among candidates.
        heldout: For what is reported; its documents serve no other role.
        source: What the text is, in words.
    """

    profile: Windows
    search: Windows
    selection: Windows
    heldout: Windows
    source: str


def load_splits(
    dataset: str, tokenizer: Any, *, length: int, tokens: TokenRequest, seed: int
) -> Splits:
    """Return windows of text for every role.

    The embedded text keeps calibration and held-out documents apart by module. Of a data set
    with a test or validation split that split is held out; of any other the last fifth. The
    calibration windows are drawn at random by ``seed``; the held-out windows are always the same.

    Args:
        dataset: ``"embedded"``, a local file or folder (.txt, .jsonl, .json, .parquet), or a hub
            name, with a configuration after a colon (``"wikitext:wikitext-2-raw-v1"``).
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per window.
        tokens: Number of tokens per role, rounded up to whole windows.
        seed: Draws the calibration windows.

    Raises:
        InputError: If the text cannot be read, or is too short.
    """
    calibration, heldout, source = _read(dataset)
    pool = _windows(calibration, tokenizer, length)
    counts = [-(-t // length) for t in (tokens.profile, tokens.search, tokens.selection)]
    needed = sum(counts)
    if len(pool) < needed:
        raise _too_short(dataset, "calibration", len(pool), needed, length)
    order = np.random.default_rng(seed).permutation(len(pool))
    profile, search, selection = np.split(pool[order[:needed]], np.cumsum(counts)[:2])
    wanted = -(-tokens.heldout // length)
    rest = _windows(heldout, tokenizer, length)
    if len(rest) < wanted:
        raise _too_short(dataset, "held-out", len(rest), wanted, length)
    spread: NDArray[np.int64] = np.linspace(0, max(len(rest) - 1, 0), wanted).astype(np.int64)
    return Splits(profile, search, selection, rest[spread], source)


def _too_short(dataset: str, role: str, have: int, need: int, length: int) -> InputError:
    return InputError(
        f"The text {dataset!r} is too short: its {role} part gives {have * length:,} tokens and "
        f"{need * length:,} are needed; give more text or ask for fewer tokens "
        "(--profile-tokens, --search-tokens, --selection-tokens, --heldout-tokens)."
    )


def _windows(texts: Iterable[str], tokenizer: Any, length: int) -> Windows:
    """Tokenize, close each text with end-of-text, and cut into windows; the rest is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[NDArray[np.int64]] = []
    for text in texts:
        ids: list[int] = []
        for start in range(0, len(text), _BLOCK):
            part = text[start : start + _BLOCK]
            ids.extend(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
        pieces.append(np.array(ids + end, dtype=np.int64))
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    whole = len(stream) // length
    return stream[: whole * length].reshape(whole, length)


def _read(dataset: str) -> tuple[list[str], list[str], str]:
    """Return calibration texts, held-out texts, and what they are."""
    if dataset == "embedded":
        # Docstrings stand in the code as well: as prose of their own they would let one passage
        # serve two calibration roles.
        code = [d.text for d in embedded.side_documents("calibration") if d.kind == "code"]
        heldout = [d.text for d in embedded.side_documents("heldout")]
        return code, heldout, "embedded (the standard library's code and docstrings)"
    path = Path(dataset)
    if path.exists():
        texts = _read_local(path)
        return *_cut(texts), f"{path.name} (last fifth held out)"
    return _read_hub(dataset)


def _cut(texts: list[str]) -> tuple[list[str], list[str]]:
    joined = "\n".join(texts)
    cut = round(len(joined) * (1 - _HELDOUT_SHARE))
    return [joined[:cut]], [joined[cut:]]


def _read_local(path: Path) -> list[str]:
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    files = [f for f in files if f.suffix in _READERS] if path.is_dir() else files
    if not files or files[0].suffix not in _READERS:
        raise InputError(
            f"{path} is no text that can be read; give a file or folder of "
            f"{', '.join(sorted(_READERS))}."
        )
    texts: list[str] = []
    for file in files:
        if file.stat().st_size == 0:
            continue
        texts.extend(_read_file(file))
    if not any(text.strip() for text in texts):
        raise InputError(f"The text {path} is empty; give a file with text in it.")
    return texts


def _read_file(file: Path) -> list[str]:
    if file.suffix == ".txt":
        try:
            return [file.read_text(encoding="utf-8", errors="replace")]
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}).") from error
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        table = load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as {file.suffix[1:]}: {error}.") from error
    return _texts(table[_text_column(table.column_names, str(file))])


def _texts(rows: Iterable[Any]) -> list[str]:
    """Return the rows that hold text."""
    return [row for row in rows if isinstance(row, str)]


def _text_column(columns: list[str], where: str) -> str:
    for name in _TEXT_COLUMNS:
        if name in columns:
            return name
    raise InputError(
        f"{where} has no column of text; it has {', '.join(columns)}, and one of "
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
    return *_cut(_texts(splits[apart or main][column])), f"{dataset} (last fifth held out)"
