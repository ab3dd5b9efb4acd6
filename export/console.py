"""Terminal output of a compile: notes and progress bars with rates on standard error, tables on standard output."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from runtime.errors import open_streams

open_streams()
PLAIN_WIDTH = 140  # columns, if the output is not a terminal with a width of its own

console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PLAIN_WIDTH)
output = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else PLAIN_WIDTH)


class Bar:
    """One running progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def advance(self, amount: int, note: str = "") -> None:
        """Add finished work, in the bar's unit; a bar over steps shows the note behind it."""
        self._progress.update(self._task, advance=amount, description=note)


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar over `total` bytes, with bytes per second."""
    columns = (TextColumn(f"{title:<24}"), BarColumn(32), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total)


@contextmanager
def step_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar over `total` steps, with the elapsed time."""
    columns = (
        TextColumn(f"{title:<24}"),
        BarColumn(32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total)
