"""What every ablation is made of: tables, verdicts and a picture, and the files they become.

A table is printed in plain columns of at most 80 characters, and written as Markdown; both show
the same cells. A verdict is an answer (yes, no, or where) with the figures that it rests on.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.report import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH: Final = 80
"""Columns of a terminal."""

KEPT: Final = Path(__file__).parent / "results"
FOLDER: Final = "ablations"
"""In :data:`KEPT`, what this benchmark writes."""


@dataclass(frozen=True)
class Table:
    """A table of words: the first column names, the others are figures.

    Attributes:
        title: What it shows.
        head: Names of the columns; that of the first may be empty.
        rows: Cells, as many as the head has.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def plain(self) -> str:
        """Return it in plain columns; a line is never longer than :data:`WIDTH`."""
        widths = [
            max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))
        ]
        assert sum(widths) + 2 * (len(widths) - 1) <= WIDTH, f"{self.title} is too wide"

        def line(row: Sequence[str]) -> str:
            first, *others = zip(row, widths, strict=True)
            cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        title = textwrap.wrap(self.title, WIDTH)
        return "\n".join([*title, line(self.head), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        """Return it as Markdown, under its title."""
        lines = [
            "| " + " | ".join(self.head) + " |",
            "| --- |" + " ---: |" * (len(self.head) - 1),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return f"{self.title}:\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """An answer to one question.

    Attributes:
        question: What is asked.
        answer: ``"yes"``, ``"no"``, or a few words that say where.
        because: The figures, one sentence.
    """

    question: str
    answer: str
    because: str

    def markdown(self) -> str:
        """Return it as an item of a list."""
        return f"- {self.question} **{self.answer}**: {self.because}"

    def plain(self) -> str:
        """Return it as an item of a list, wrapped."""
        text = f"- {self.question} {self.answer.upper()}: {self.because}"
        return textwrap.fill(text.replace("`", ""), WIDTH, subsequent_indent="  ")


@dataclass(frozen=True)
class Ablation:
    """One ablation, ready to be shown.

    Attributes:
        name: What it is asked for by.
        title: A heading.
        about: What was run, a paragraph.
        tables: The figures.
        verdicts: What follows from them.
        draw: Makes the picture.
    """

    name: str
    title: str
    about: str
    tables: tuple[Table, ...]
    verdicts: tuple[Verdict, ...]
    draw: Callable[[], Figure]

    def plain(self) -> str:
        """Return it for the terminal."""
        parts = [
            self.title,
            textwrap.fill(self.about.replace("`", ""), WIDTH),
            *(table.plain() for table in self.tables),
            "\n".join(verdict.plain() for verdict in self.verdicts),
        ]
        return "\n\n".join(parts)

    def markdown(self, pictures: str = "") -> str:
        """Return it as a section.

        Args:
            pictures: What the picture's path begins with.
        """
        parts = [
            f"## {self.title}",
            f"`python benchmarks/ablations.py {self.name}`. {self.about}",
            "\n".join(verdict.markdown() for verdict in self.verdicts),
            f"![{self.title}]({pictures}{self.name}.png)",
            *(table.markdown() for table in self.tables),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write its section and its picture."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(folder / f"{self.name}.md", self.markdown().encode())
        save_figure(self.draw(), folder / f"{self.name}.png")


def read_table(path: Path, *, made_by: str) -> pd.DataFrame:
    """Return a kept table of figures.

    Args:
        path: A CSV file.
        made_by: The command that makes it.

    Raises:
        InputError: If it is not there.
    """
    _refuse_missing(path, made_by)
    return pd.read_csv(path)


def read_json(path: Path, *, made_by: str) -> Any:
    """Return kept figures; see :func:`read_table`."""
    _refuse_missing(path, made_by)
    return json.loads(path.read_text(encoding="utf-8"))


def _refuse_missing(path: Path, made_by: str) -> None:
    if not path.is_file():
        raise InputError(f"There are no figures at {path}; make them with: {made_by}.")


def percent(value: float, digits: int = 1) -> str:
    """Return a share as a signed percentage, without its sign where it rounds to nothing."""
    text = f"{100 * value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def listed(words: Sequence[str]) -> str:
    """Return words with commas between them, and "and" before the last."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
