"""How long pieces of work say how far they are."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`report(stage, done, total)`: `done` of `total` steps of a stage are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""
