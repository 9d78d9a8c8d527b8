"""Progress bars of long jobs, on standard error: `progress_bar` for any job, `tracked` for a loop.

A bar that is not shown prints nothing and costs nothing. Bars that are open together, nested or in threads, stand
below one another in one display.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

T = TypeVar("T")

SPEED_SECONDS = 600
"""The time remaining follows the speed over so many seconds: one step of a job may take a minute."""

_lock = RLock()
_displays: list[Progress] = []
"""The display of the bars that are open: one, or none."""
_open_bars = 0


class Bar:
    """A bar that is open; `advance` moves it. One that is not shown does nothing."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None):
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Move the bar by `steps`; `note` replaces the text at its end."""
        if self._progress is not None and self._task is not None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=steps, **fields)


@contextmanager
def progress_bar(description: str, total: int | None = None, shown: bool = True, done: int = 0) -> Iterator[Bar]:
    """Show a bar with the job's description, steps done of `total`, and the time remaining, until the context ends.

    `total` None: how many steps there will be is not known. `done`: steps that an earlier run has made. With
    `shown=False` nothing is printed.

    >>> with progress_bar("measuring", total=3, shown=False) as bar:
    ...     for _ in range(3):
    ...         bar.advance(note="KL 0.1")
    """
    if not shown:
        yield Bar()
        return
    progress = _open_display()
    try:
        task = progress.add_task(description, total=total, completed=done, note="")
        yield Bar(progress, task)
    finally:
        _close_display()


def tracked(
    items: Iterable[T], description: str, total: int | None = None, shown: bool = True, done: int = 0
) -> Iterator[T]:
    """Yield the items, with a bar that moves by one for each; `total` None takes their length where they have one.

    >>> [n * n for n in tracked(range(3), "squares", shown=False)]
    [0, 1, 4]
    """
    total = len(items) + done if total is None and hasattr(items, "__len__") else total  # pyright: ignore
    with progress_bar(description, total, shown, done) as bar:
        for item in items:
            yield item
            bar.advance()


def announce(text: str, shown: bool = True) -> None:
    """Print text on standard error, above the bars that are open: what a job will do and how long it takes."""
    if shown:
        with _lock:
            console = _displays[0].console if _displays else _console()
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _open_display() -> Progress:
    """The display of all open bars; the first bar starts it."""
    global _open_bars
    with _lock:
        if not _displays:
            progress = _new_display()
            progress.start()
            _displays.append(progress)
        _open_bars += 1
        return _displays[0]


def _close_display() -> None:
    """The last bar to close ends the display."""
    global _open_bars
    with _lock:
        _open_bars -= 1
        if not _open_bars:
            _displays.pop().stop()


def _new_display() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # Redirected, what a program prints while a bar is open would go to standard error, also where a file reads it.
    redirect = sys.stdout.isatty()
    return Progress(*columns, console=_console(), speed_estimate_period=SPEED_SECONDS, redirect_stdout=redirect)
