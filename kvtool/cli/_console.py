"""Where words go: results on stdout, progress on stderr, and nothing but text when nobody looks."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from kvtool.errors import UsageError
from kvtool.progress import Progress, silent

# A pipe or a log file has no width; rich would assume 80 columns and break table rows there.
_PIPE_WIDTH = 120


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()  # None: the shell has closed it
    return Console(
        stderr=stderr,
        width=None if is_terminal else _PIPE_WIDTH,
        soft_wrap=stderr and not is_terminal,  # sentences alone go there: a line each in a log
        # Said outright: rich would take FORCE_COLOR, which CI systems set, for a terminal.
        force_terminal=is_terminal,
        highlight=False,
        markup=False,
    )


def counted(count: int, noun: str) -> str:
    """Such as `1 layer` and `2 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def stdin() -> TextIO:
    """Raises UsageError where the shell has closed it."""
    if sys.stdin is None:
        raise UsageError("stdin is closed, and the text is read from there")
    return sys.stdin


out = _console(stderr=False)
err = _console(stderr=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Yields the function that a long piece of work calls to say how far it is.

    On a terminal: a live bar per stage with elapsed seconds. Elsewhere, and if `quiet`: nothing.
    """
    if _is_live() and not quiet:
        with _bars() as report:
            yield report
    else:
        yield silent


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[None]:
    """Says what is going on during work that cannot say how far it is."""
    if _is_live() and not quiet:
        with err.status(what):
            yield
    else:
        yield


def _is_live() -> bool:
    return err.is_terminal and not err.is_dumb_terminal


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def emit(result: dict[str, Any], json: bool, table: Table | None = None) -> None:
    """Prints a command's result on stdout: one JSON object for machines, or a table for people."""
    if json:
        sys.stdout.write(dump_json(result) + "\n")
        sys.stdout.flush()
    elif table is not None:
        out.print(table)


def dump_json(value: Any) -> str:
    """JSON that every parser reads: numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
