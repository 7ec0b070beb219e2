"""Tables of examples: local files and folders, or a data set of the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmpq.errors import InputError, first_line

Row = dict[str, Any]

_SUFFIXES: Final = (".conll", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
_HELDOUT_SHARE: Final = 0.2
_BARE: Final = ("sentence", "label")
_SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("valid", "dev", "val"),
}
_UNREADABLE: Final = (
    *(OSError, ValueError, EOFError, zlib.error, csv.Error, RecursionError),
    *(KeyError, TypeError, AttributeError),
)
"""What reading raises; the last three where objects of SQuAD's layout lack something."""
_UNKNOWN_LABELS: Final = ({-1}, {None})
"""Labels of test sets that keep theirs, as GLUE's."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Rows for calibration and rows held out, each a mapping from column to value.

    Attributes:
        calibration: For profile, search and selection.
        heldout: For what is reported.
        source: What the data is, in words.
        classes: Column → the names of its numbered classes, where the data set tells them.
    """

    calibration: list[Row]
    heldout: list[Row]
    source: str
    classes: Mapping[str, Sequence[str]]

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(dict.fromkeys(name for row in self.calibration[:100] for name in row))


def read_tables(dataset: str) -> Tables:
    """Read a task's data.

    Of a folder or a data set with a test or validation split that split is held out, the first of
    them that has its labels; of anything else the last fifth. Files are told apart by their names:
    one that holds ``train``, ``test``, ``valid``, ``val`` or ``dev``.

    Args:
        dataset: A file or folder (.csv, .tsv, .jsonl, .json, .parquet, CoNLL's columns as .conll
            or .txt, each also with .gz), or a hub name, with a configuration after a colon
            (``"glue:sst2"``).

    Raises:
        InputError: If it cannot be read, or holds no rows.
    """
    if dataset == "embedded":
        raise InputError(
            "--task needs examples of that task; give --dataset, a local file or folder, or a hub "
            "name."
        )
    if not os.path.exists(dataset):
        return _from_hub(dataset)
    path = Path(dataset)
    files = sorted(f for f in path.iterdir() if _kind(f)) if path.is_dir() else [path]
    if not files or not all(_kind(file) for file in files):
        raise InputError(
            f"{path} is no table that can be read; give a file or folder of "
            f"{', '.join(_SUFFIXES)}, or one of these with .gz."
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.name), []).append(file)
    if path.is_dir() and len(by_split) > 1:
        splits = {
            name: [row for file in some for row in _read(file)] for name, some in by_split.items()
        }
        return _of_splits(splits, path.name, {})
    rows = [row for file in files for row in _read(file)]
    return _cut(rows, path.name, {})


def _split_of(name: str) -> str:
    words = name.lower()
    return next((s for s, signs in _SPLITS.items() if any(x in words for x in signs)), "train")


def _kind(file: Path) -> str | None:
    name = file.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _of_splits(
    splits: Mapping[str, list[Row]], name: str, classes: Mapping[str, Sequence[str]]
) -> Tables:
    apart = next((s for s in ("test", "validation") if s in splits and _labelled(splits[s])), None)
    main = next((s for s in ("train", "validation") if s in splits and s != apart), None)
    if apart is None or main is None:
        only = apart or main or next(iter(splits))
        return _cut(splits[only], name, classes)
    calibration, heldout = _filled(splits[main], name), _filled(splits[apart], name)
    return Tables(calibration, heldout, f"{name} ({apart} held out)", classes)


def _labelled(rows: Sequence[Row]) -> bool:
    """Return whether no column of labels is empty or -1 throughout."""
    columns = {name for row in rows[:1] for name in row}
    values = [{row[c] for row in rows if _plain(row.get(c))} for c in columns]
    return bool(rows) and not any(found in _UNKNOWN_LABELS for found in values)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _cut(rows: list[Row], name: str, classes: Mapping[str, Sequence[str]]) -> Tables:
    cut = round(len(_filled(rows, name)) * (1 - _HELDOUT_SHARE))
    return Tables(rows[:cut], rows[cut:], f"{name} (last fifth held out)", classes)


def _filled(rows: list[Row], name: str) -> list[Row]:
    if len(rows) < 2:
        raise InputError(f"The data {name} holds {len(rows)} examples; give 2 or more.")
    return rows


def _from_hub(dataset: str) -> Tables:
    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    try:
        loaded = load_dataset(name, configuration or None)
    except Exception as error:
        raise InputError(
            f"There is no file {dataset!r}, and the hub has not delivered a data set of that name "
            f"({first_line(error)}); give a local file or folder, or a hub name with a network at "
            "hand."
        ) from error
    features = next(iter(loaded.values())).features
    splits = {str(split): [_opened(row) for row in rows] for split, rows in loaded.items()}
    return _of_splits(splits, dataset, _classes(features))


def _classes(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the names of numbered classes, of single values or of lists of them."""
    from datasets import ClassLabel

    found = {}
    for column, feature in features.items():
        inner = vars(feature).get("feature", feature)
        if isinstance(inner, ClassLabel):
            found[column] = inner.names
    return found


def _opened(row: Mapping[str, Any]) -> Row:
    """Return a row with what its ``translation`` holds as columns of its own, as on the hub."""
    inner = row.get("translation")
    return {**row, **inner} if isinstance(inner, Mapping) else dict(row)


def _read(file: Path) -> list[Row]:
    kind = _kind(file)
    try:
        data = file.read_bytes()
        if file.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        if kind == ".parquet":
            import pandas as pd

            table = pd.read_parquet(io.BytesIO(data))
            return [_opened(_listed(row)) for row in table.to_dict("records")]
        text = data.decode("utf-8-sig")
        if kind in (".csv", ".tsv"):
            return _separated(text, "\t" if kind == ".tsv" else ",")
        if kind in (".conll", ".txt"):
            return _conll(text, file)
        return _json(text, by_line=kind == ".jsonl")
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"{file} cannot be read as {kind} ({first_line(error)}); correct it, or leave it out."
        ) from error


def _listed(row: Mapping[Any, Any]) -> Row:
    """Return a row with arrays as lists, inside mappings too."""
    return {str(name): _as_list(value) for name, value in row.items()}


def _as_list(value: Any) -> Any:
    import numpy as np

    if isinstance(value, Mapping):
        return _listed(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


def _separated(text: str, separator: str) -> list[Row]:
    """Read a table; one of two columns without a header is taken as sentence and label.

    It has none where the second name is a number, as labels of such tables are.
    """
    source = io.StringIO(text, newline="")
    lines = (
        csv.reader(source, delimiter=separator, quoting=csv.QUOTE_NONE)
        if separator == "\t"
        else csv.reader(source, delimiter=separator)
    )
    rows = [row for row in lines if row]
    if not rows:
        return []
    bare = len(rows[0]) == 2 and rows[0][1].strip().isdecimal()
    names = list(_BARE) if bare else rows[0]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns, the first has {len(names)}")
    return [dict(zip(names, row, strict=True)) for row in (rows if bare else rows[1:])]


def _conll(text: str, file: Path) -> list[Row]:
    """Read sentences apart by blank lines: a word first and its tag last on each line."""
    rows: list[Row] = []
    words: list[str] = []
    tags: list[str] = []
    for line in [*text.splitlines(), ""]:
        parts = line.split("\t") if "\t" in line else line.split()
        parts = [part.strip() for part in parts if part.strip()]
        if parts and parts[0].startswith("-DOCSTART-"):
            continue
        if not parts:
            if words:
                rows.append({"tokens": words, "ner_tags": tags})
            words, tags = [], []
        elif len(parts) == 1:
            raise InputError(
                f"{file} has a line without a tag ({line[:40]!r}); give a word and its tag on "
                "each line, and a blank line after each sentence."
            )
        else:
            words.append(parts[0])
            tags.append(parts[-1])
    return rows


def _json(text: str, *, by_line: bool) -> list[Row]:
    """Read rows; of SQuAD's own layout every question is one."""
    try:
        whole = None if by_line else json.loads(text)
    except json.JSONDecodeError:  # many a .json holds one object a line
        by_line = True
    if by_line:
        whole = [json.loads(line) for line in text.split("\n") if line.strip()]
    if "\\ud" in text.lower():
        json.dumps(whole, ensure_ascii=False).encode()  # half a surrogate pair is no text
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = [
            {
                "question": asked["question"],
                "context": part["context"],
                "answers": asked["answers"],
            }
            for article in whole["data"]
            for part in article.get("paragraphs", ())
            for asked in part["qas"]
        ] or whole["data"]
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise ValueError("it holds no list of objects")
    return [_opened(row) for row in whole]
