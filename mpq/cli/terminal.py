"""What a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mpq.diagnose import Facts, findings
from mpq.errors import MpqError, folded, printable
from mpq.processes import leading
from mpq.report.grid import Grid, counted


class Tell(Protocol):
    """What `bars` yields."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """So much of a phase is done; the note stands after its bar."""


stdout = Console(highlight=False)
"""Results: tables, and nothing else where `--json` is set."""
stderr = Console(stderr=True, highlight=False)
"""Progress, and which files were chosen."""


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that tells what is being done; nothing where stderr is no terminal."""
    if not stderr.is_terminal:
        yield lambda _: None
        return
    with stderr.status("") as line:
        yield lambda text: line.update(escape(text))


@contextmanager
def bars() -> Iterator[Tell]:
    """Progress bars on stderr; nothing where stderr is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(escape(phase), total=total, note="")
            progress.update(tasks[phase], completed=done, total=total, note=escape(note))

        yield tell


@contextmanager
def rephrased(text: str, other: str) -> Iterator[None]:
    """Errors say `other` where shared code says `text`, for a command that has other options."""
    try:
        yield
    except MpqError as error:
        raise type(error)(str(error).replace(text, other)) from error


def say(text: str) -> None:
    """One line on stderr: what was chosen, what was written. The leading process speaks."""
    if leading():
        _print(stderr, text)


def show(text: str) -> None:
    """A line of the result on stdout."""
    _print(stdout, text)


def _print(console: Console, text: str) -> None:
    """Text, on a terminal broken between words where that ends; in a pipe it stays whole."""
    shown = printable(text)
    shown = folded(shown, console.width) if console.is_terminal else shown
    console.print(shown, markup=False, soft_wrap=True)


class Notes(logging.Handler):
    """What is logged, said above the progress bars if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        say(f"note: {self.format(record)}")


def hint(folder: Path) -> None:
    """Say that a run has findings, if it has."""
    found = findings(Facts.of(folder)).findings
    if found:
        say(f"{counted(len(found), 'finding')}: mpq diagnose {folder}")


def result(as_json: bool, content: object, *shown: Grid | str) -> None:
    """The result on stdout: `content` as JSON (a text that is JSON as it is), or what is shown."""
    if as_json:
        click.echo(content if isinstance(content, str) else json.dumps(content))
        return
    for one in shown:
        show(one) if isinstance(one, str) else stdout.print(one)
