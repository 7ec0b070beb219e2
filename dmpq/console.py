"""What the commands share on the terminal: quiet libraries, and a bar per stage."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

from dmpq.errors import InputError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from dmpq.session import Progress


BAD_INPUT: Final = 2
"""Exit code of a command that was asked for what cannot be."""
INTERRUPTED: Final = 130
"""Exit code of a command that Ctrl-C ended, as shells count it."""
MOST_GIGABYTES: Final = 1e9
"""What sizes on a command line may be; floats overflow where more is counted in bytes."""


def refuse(reason: object) -> int:
    """Print what was wrong on standard error, as one line; returns the exit code."""
    text = "".join(c if c.isprintable() else " " for c in str(reason))
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return BAD_INPUT


def exit_code(work: Callable[[], int], *, memory: str, interrupted: str = "") -> int:
    """Return the exit code of a command's work, and refuse in one line what cannot be done.

    Args:
        work: Returns the exit code where nothing is wrong.
        memory: What to ask less of where memory runs out.
        interrupted: What to say after Ctrl-C.
    """
    try:
        return work()
    except InputError as error:
        return refuse(error)
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        return refuse(f"{error.strerror or first_line(error)}{where}; mend this, and try again.")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return refuse(f"There is not enough memory ({first_line(error)}); {memory}.")
    except KeyboardInterrupt:
        if interrupted:
            plain_console().print(interrupted)
        return INTERRUPTED


class CommandParser(argparse.ArgumentParser):
    """Refuses a command line as everything else is refused: one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print what was wrong with the command line, and exit."""
        self.exit(refuse(f"{message}; --help lists every option."))


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that shows text as it is: names may hold brackets and colons."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal without µ is no reason to fail
    # In a notebook as well: rich's own display there flushes the stream that it captures.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, force_jupyter=False)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of the way."""
    import datasets
    import transformers

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Show one bar per stage of the run."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("  {task.description:<34}"), BarColumn(20), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            kind = stage.partition(",")[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(stage, total=total)
            bars.update(tasks[kind], description=stage, completed=done)

        yield show
