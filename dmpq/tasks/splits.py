"""A task's examples in disjoint roles: profile, search, selection, held-out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from dmpq.data import Draw, TokenRequest
from dmpq.errors import InputError
from dmpq.moe import TextModel
from dmpq.tasks.choices import MultipleChoice
from dmpq.tasks.classification import Classification
from dmpq.tasks.columns import renamed
from dmpq.tasks.entities import TokenClassification
from dmpq.tasks.examples import Encoder, Example, Examples, Task
from dmpq.tasks.questions import QuestionAnswering
from dmpq.tasks.tables import Row, Tables, read_tables
from dmpq.tasks.translation import Translation

TASKS: Final[Mapping[str, Any]] = {
    kind.name: kind
    for kind in (
        Classification,
        TokenClassification,
        QuestionAnswering,
        Translation,
        MultipleChoice,
    )
}
"""Every task by name."""


@dataclass(frozen=True, eq=False)
class TaskSplits:
    """Disjoint examples; the roles are those of :class:`dmpq.data.Splits`.

    Attributes:
        profile: For the experts' statistics and sensitivities.
        search: For the search's evaluations.
        selection: For the final choice among candidates.
        heldout: For what is reported.
        source: What the examples are, in words.
        drawn: The examples of ``profile``, each a window of one.
    """

    profile: Examples
    search: Examples
    selection: Examples
    heldout: Examples
    source: str
    drawn: Draw


def encoder_of(moe: TextModel, tokenizer: Any, *, longest: int | None) -> Encoder:
    """Return what encoding needs of a model.

    Args:
        moe: The model.
        tokenizer: Its tokenizer.
        longest: Tokens that an example may have; ``None`` for the model's own limit.

    Raises:
        InputError: If the tokenizer cannot say where its tokens stand, cannot pad, or knows
            languages and not which of them to translate into.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {moe.name} cannot tell where in a text its tokens stand; give the "
            "model a fast one (tokenizer.json)."
        )
    if pad_of(moe, tokenizer) is None:
        raise InputError(
            f"The tokenizer of {moe.name} has no token for padding; set pad_token in its "
            "tokenizer_config.json."
        )
    config = moe.model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = [one for one in (limit, longest) if one is not None]
    return Encoder(
        tokenizer,
        {str(name): int(number) for name, number in config.label2id.items()},
        int(config.num_labels),
        min(known) if known else 2**31,
        **({} if not config.is_encoder_decoder else _decoding(moe, tokenizer)),
    )


def _decoding(moe: TextModel, tokenizer: Any) -> dict[str, Any]:
    """Return how the texts of an encoder-decoder begin.

    A tokenizer of many languages, as NLLB's, tells the one to translate into by ``tgt_lang``, and
    every translation begins with that language's token (arXiv 2207.04672, section 6.1).
    """
    language = getattr(tokenizer, "tgt_lang", "")
    generates = moe.model.can_generate()  # one with a head of classes does not
    given = moe.model.generation_config.forced_bos_token_id if generates else None
    if language:
        given = tokenizer.convert_tokens_to_ids(language)
    elif language is None and given is None:
        raise InputError(
            f"The tokenizer of {moe.name} knows languages, and does not say which of them to "
            'translate into; set src_lang and tgt_lang ("deu_Latn") in its tokenizer_config.json.'
        )
    return {"start": moe.decoder_start, "forced": () if given is None else (given,)}


def pad_of(moe: TextModel, tokenizer: Any) -> int | None:
    """Return the padding token: the model's, else the tokenizer's, which the model then takes.

    A model for sequence classification finds the last token of a text by it.
    """
    config = moe.model.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    found: int | None = config.pad_token_id
    return found


def load_task_splits(
    name: str,
    dataset: str,
    moe: TextModel,
    tokenizer: Any,
    *,
    tokens: TokenRequest,
    seed: int,
    length: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    taken: Draw | None = None,
) -> TaskSplits:
    """Return examples for every role.

    Calibration examples are drawn at random by ``seed``. Data sets of tasks are small: where one
    has fewer tokens than all roles ask for, each gets its share of what there is. Held-out
    examples are always the same, all of them or the first of a fixed random order.

    Args:
        name: Of the task.
        dataset: As in :func:`dmpq.tasks.tables.read_tables`.
        moe: The model, with the task's head.
        tokenizer: Its tokenizer.
        tokens: Number of tokens per role.
        seed: Draws the calibration examples.
        length: Tokens that an example may have; ``None`` for the model's own limit.
        text_column: Of the texts; ``None`` for the usual names.
        label_column: Of the labels; ``None`` for the usual names.
        taken: What an earlier draw from the same data has used; no role gets any of it.

    Raises:
        InputError: If the data cannot be read, or does not suit the model.
    """
    read = encode_tables(
        name,
        read_tables(dataset),
        moe,
        tokenizer,
        dataset=dataset,
        length=length,
        text_column=text_column,
        label_column=label_column,
    )
    task, pad, pool, rest = read.task, read.pad, read.calibration, read.heldout
    digest = hashlib.sha256(Examples(task, tuple(pool), pad).identity()[1]).hexdigest()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pool))
    if taken is not None and taken.stream == digest:
        order = order[~np.isin(order, taken.windows)]
    asked = (tokens.profile, tokens.search, tokens.selection)
    roles = _dealt([pool[i].tokens for i in order], asked)
    parts = [order[start:end] for start, end in roles]
    for role, part, wanted in zip(("profile", "search", "selection"), parts, asked, strict=True):
        if wanted and not len(part):
            raise InputError(
                f"The data {dataset!r} has too few calibration examples ({len(order)}) to give "
                f"the {role} any; give more."
            )
    fixed = np.random.default_rng(0).permutation(len(rest))
    ((_, end),) = _dealt([rest[i].tokens for i in fixed], (tokens.heldout,))
    heldout = [rest[i] for i in np.sort(fixed[:end])]
    profile, search, selection, held = (
        Examples(task, tuple(some), pad)
        for some in (*([pool[i] for i in part] for part in parts), heldout)
    )
    return TaskSplits(
        profile=profile,
        search=search,
        selection=selection,
        heldout=held,
        source=f"{read.source}; examples: {len(profile):,} profile, {len(search):,} search, "
        f"{len(selection):,} selection, {len(held):,} held-out",
        drawn=Draw(digest, 1, tuple(sorted(parts[0].tolist()))),
    )


@dataclass(frozen=True, eq=False)
class EncodedTables:
    """A task's data as a model reads it.

    Attributes:
        task: Of the examples.
        pad: Id of the padding token.
        calibration: Examples to learn or to search by.
        heldout: Examples that are reported on.
        source: What the data is, in words.
    """

    task: Task
    pad: int
    calibration: list[Example]
    heldout: list[Example]
    source: str


def encode_tables(
    name: str,
    tables: Tables,
    moe: TextModel,
    tokenizer: Any,
    *,
    dataset: str,
    length: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> EncodedTables:
    """Return all examples of a task's data.

    Args:
        name: Of the task.
        tables: The data.
        moe: The model, with the task's head.
        tokenizer: Its tokenizer.
        dataset: What to call the data in errors.
        length: As for :func:`load_task_splits`.
        text_column: As for :func:`load_task_splits`.
        label_column: As for :func:`load_task_splits`.

    Raises:
        InputError: If the data does not suit the model.
    """
    task: Task = TASKS[name](encoder_of(moe, tokenizer, longest=length))
    pad = pad_of(moe, tokenizer)
    assert pad is not None
    columns = task.columns(tables.columns, text=text_column, label=label_column, where=dataset)
    return EncodedTables(
        task,
        pad,
        _encoded(task, tables.calibration, columns, tables),
        _encoded(task, tables.heldout, columns, tables),
        tables.source,
    )


def label_names(
    name: str,
    tables: Tables,
    *,
    dataset: str,
    text_column: str | None = None,
    label_column: str | None = None,
) -> tuple[str, ...]:
    """Return the classes that a task's data has, in order: what a new head is made for.

    Numbered classes have the names that the data set gives them; others are sorted.

    Args:
        name: Of the task, one with a head of classes.
        tables: The data.
        dataset: What to call it in errors.
        text_column: As for :func:`load_task_splits`.
        label_column: As for :func:`load_task_splits`.

    Raises:
        InputError: If there is no such column, or there are fewer than two classes.
    """
    bare: Task = TASKS[name](Encoder(None, {}, 0, 0))
    columns = bare.columns(tables.columns, text=text_column, label=label_column, where=dataset)
    column = columns["tags" if "tags" in columns else "label"]
    if column in tables.classes:
        return tuple(tables.classes[column])
    values = [row[column] for row in (*tables.calibration, *tables.heldout)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if any(one is None or (isinstance(one, float) and math.isnan(one)) for one in flat):
        raise InputError(
            f"The column {column!r} of {dataset} lacks a label in some rows; fill them in, leave "
            "those rows out, or name another column with --label-column."
        )
    names = {str(one).strip() for one in flat}
    if len(names) < 2:
        raise InputError(
            f"The column {column!r} of {dataset} holds one class alone ({', '.join(names)}); give "
            "data with two or more, or name another with --label-column."
        )
    return tuple(sorted(names, key=_by_number))


def _by_number(name: str) -> tuple[int, str]:
    """Return what sorts classes: numbers by value, names after them by letters."""
    return (int(name), "") if name.isdecimal() else (2**31, name)


def _dealt(lengths: Sequence[int], asked: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last-plus-one example of each role, in turn.

    Args:
        lengths: Tokens of each example.
        asked: Tokens of each role; shrunk to the same share each where there are not so many.
    """
    have, want = sum(lengths), sum(asked)
    share = min(1.0, have / want) if want else 1.0
    ends = np.cumsum([0, *lengths])
    bounds = [int(np.searchsorted(ends, share * upto)) for upto in np.cumsum([0, *asked])]
    bounds = [min(bound, len(lengths)) for bound in bounds]
    return list(pairwise(bounds))


def _encoded(
    task: Task, rows: Sequence[Row], columns: Mapping[str, str], tables: Tables
) -> list[Example]:
    names = {
        purpose: tables.classes[column]
        for purpose, column in columns.items()
        if column in tables.classes and set(tables.classes[column]) <= set(task.encoder.labels)
    }
    return [task.encode(_spoken(renamed(row, columns), names)) for row in rows]


def _spoken(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a row with the names of its numbered classes, which the model's head has too."""
    for purpose, known in names.items():
        value = row[purpose]
        row[purpose] = [known[one] for one in value] if isinstance(value, list) else known[value]
    return row
