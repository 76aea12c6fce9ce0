"""Tables of many numbers, as they are shown on a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def narrow_table(title: str, words: Sequence[str], numbers: Sequence[str], **more: Any) -> Table:
    """A table of many columns without lines between them, so that a terminal of 80 has room.

    Where there is less, cells break: a number that was cut would be another number.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0, **more
    )
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def with_plan(facts: Mapping[str, Any] | None) -> str:
    """The name of the plan that a model was measured with, as a title goes on with it."""
    file = None if facts is None else facts.get("file")
    return f" with {Path(file).name}" if file else ""


def margin(error: float) -> str:
    """A standard error in two digits, and all those before the point."""
    return f"{error:.2g}" if error < 99.5 else f"{error:.0f}"
