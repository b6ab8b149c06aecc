"""What the command line shows besides its results: progress with time left, messages, errors; on stderr."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

SECONDS_BETWEEN_LINES = 15.0
UNEXPECTED = "An error of kalm, not of yours. `kalm --traceback ...` (or KALM_TRACEBACK=1) shows where."


class Watcher(Protocol):
    """Be told how far a task is: what is done of a total, and a note beside it."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


def say(message: str) -> None:
    """Print a message for people on stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a result for programs on stdout; raises ValueError on NaN, which JSON cannot hold."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


def print_table(table: Any) -> None:
    """Print a rich table on stdout; where stdout is no terminal it is not cut to eighty columns."""
    console = Console(file=sys.stdout)
    console.print(table) if console.is_terminal else Console(file=sys.stdout, width=120).print(table)


def report_failure(error: BaseException, *, expected: bool, with_traceback: bool) -> None:
    """Print an error as one message; its traceback only where it was asked for."""
    if with_traceback:
        say("".join(traceback.format_exception(error)).rstrip())
    if expected:
        say(f"kalm: {error}")
    else:
        say(f"kalm: {type(error).__name__}: {error}" + ("" if with_traceback else f"\n{UNEXPECTED}"))


@contextmanager
def show_progress(title: str) -> Iterator[Watcher]:
    """Show how far a task is: a bar in a terminal, elsewhere a line now and then.

    Yields a function of (done, total, note) to be called as often as one likes.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines_now_and_then(title, clock=time.monotonic)
        return
    columns = [
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # What does not fit is cut off here.
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    ]
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None, note="")

        def watch(done: int, total: int, note: str = "", /) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield watch


def lines_now_and_then(title: str, *, clock: Callable[[], float]) -> Watcher:
    """Return a watcher that prints the time left every fifteen seconds; shorter tasks are silent."""
    last = clock()
    first: tuple[int, float] | None = None
    before = 0

    def watch(done: int, total: int, note: str = "", /) -> None:
        nonlocal last, first, before
        now = clock()
        # What came before the first call (loading a model, steps of a resumed training) says nothing about the speed.
        # Nor does what came before a new task that begins from 0, as the next run of an ablation.
        first = (done, now) if first is None or done < before else first
        before = done
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        since = done - first[0]
        left = f", {format_seconds((total - done) * (now - first[1]) / since)} left" if since else ""
        say(f"{title} {done}/{total}{left}" + (f", {note}" if note else ""))

    return watch


def format_seconds(seconds: float) -> str:
    """Write a duration as h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
