"""What long pieces of work tell: how far they are, and how much memory they took."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

Progress = Callable[[str, int, int], None]
"""`report(stage, done, total)`: `done` of `total` steps of a stage are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


def telling(report: Progress, stage: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items, telling of each when it is dealt with."""
    report(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(stage, done, total)


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
