"""What a person watching sees: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Reporter(Protocol):
    """Where the training loop tells how it goes."""

    def line(self, text: str) -> None:
        """One line that stays."""

    def epoch(self, number: int, total: int, steps: int, done: int) -> None:
        """An epoch begins, with `done` of its `steps` already behind it."""

    def step(self) -> None:
        """One more optimiser step was sent to the device."""

    def note(self, text: str) -> None:
        """The latest numbers, shown beside the bar."""


class Silent:
    """Tells nobody."""

    def line(self, text: str) -> None: ...

    def epoch(self, number: int, total: int, steps: int, done: int) -> None: ...

    def step(self) -> None: ...

    def note(self, text: str) -> None: ...


class Lines(Silent):
    """Plain lines on standard error, for logs and notebooks."""

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar:
    """A progress bar on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def epoch(self, number: int, total: int, steps: int, done: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            f"epoch {number}/{total}", total=steps, completed=done, note=""
        )

    def step(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def note(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def reporter(show: bool | None) -> Iterator[Reporter]:
    """A bar on a terminal, lines elsewhere; nothing at all where `show` is False."""
    if show is False:
        yield Silent()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)
