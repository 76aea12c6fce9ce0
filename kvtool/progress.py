"""What long pieces of work tell: how far they are, and how much memory they took."""

import sys
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`report(stage, done, total)`: `done` of `total` steps of a stage are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
