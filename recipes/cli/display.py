"""What a command shows: text for people, or one JSON document for programs, never both on one stream.

Without --json, results go to standard output and progress to standard error. With --json, standard output holds
exactly one JSON document, the command's result, and everything said on the way goes to standard error. Whatever comes
from a file or a model is made printable first (`printable`).

A live bar is drawn only where nothing else writes on its terminal: if standard output is piped away, as in `| tee`,
the lines that come back would be glued to it. While it is drawn, what is said goes above it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .printable import printable

WIDE = 100_000  # columns of a table that is written to a file: nothing is folded there


class _Console(Console):
    """A console whose reader may go, as in `qlorag train ... | head`: the rest is dropped, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """Where a command writes.

    as_json: keep standard output for the result alone.
    draws:   whether a live bar is drawn.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # Text is shown as it is: neither [brackets] nor :names: in a path or an answer mean anything.
        self.progress_console = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        plain = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for console in (self.progress_console, plain):
            if not console.is_terminal:
                console.width = WIDE
        self.console = self.progress_console if as_json else plain
        self.draws = self.progress_console.is_terminal and self.console.is_terminal
        self._bar: Progress | None = None

    def say(self, text: object = "", *, style: str | None = None) -> None:
        """One line or more of plain text; nothing in it is markup."""
        console = self.console if self._bar is None else self._bar.console
        console.print(text if isinstance(text, Text) else printable(str(text)), style=style)

    def aside(self, text: object) -> None:
        """What is no part of the result, on standard error: `qlorag generate > answer.txt` keeps it out."""
        self.progress_console.print(printable(str(text)))

    def piece(self, text: str) -> None:
        """Part of a line, shown at once: streaming."""
        stream = sys.stderr if self.as_json else sys.stdout
        stream.write(printable(text))
        stream.flush()

    def heading(self, text: str) -> None:
        """A line that opens a section."""
        self.say()
        self.say(text, style="bold")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """A table; numbers are given as formatted strings. Nothing is cut: what is too wide is folded on a terminal."""
        # `Text`, since a table reads markup in plain strings whatever its console says.
        heading = None if title is None else Text(printable(title), style="bold")
        table = Table(title=heading, title_justify="left", header_style="bold")
        for column in columns:
            table.add_column(Text(printable(column)), overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self.console.print(table, soft_wrap=False)

    def result(self, value: dict[str, Any]) -> None:
        """The command's result; printed only with --json."""
        if self.as_json:
            text = json.dumps(value, ensure_ascii=False, indent=2)
            print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))

    @contextlib.contextmanager
    def progress(self, *extra: TextColumn) -> Iterator[Progress]:
        """A progress bar on standard error, to which tasks are added; nothing where no bar is drawn."""
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            *extra,
            TimeRemainingColumn(),
            console=self.progress_console,
            disable=not self.draws,
        )
        with bar:
            self._bar = bar if self.draws else None
            try:
                yield bar
            finally:
                self._bar = None

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int | None], None]]:
        """A progress bar that is moved by calls with (how many are done, of how many)."""
        with self.progress() as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


def size(n: float) -> str:
    """Bytes for people: 1.2 GB, 55.1 MB (powers of ten, as disks and mlx-lm count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n:.0f} B"


def count(n: float) -> str:
    """A number for people: 134.5 M, 2.4 M, 812."""
    for unit, scale in ((" G", 1e9), (" M", 1e6), (" k", 1e4)):
        if abs(n) >= scale:
            return f"{n / (1e3 if unit == ' k' else scale):.1f}{unit}"
    return f"{n:.0f}"
