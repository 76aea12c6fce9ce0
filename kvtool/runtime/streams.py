"""Work that a GPU may do at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_beside: dict[torch.device, torch.cuda.Stream] = {}


def at_once(device: torch.device, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
    """What two calls give that do not need each other; CUDA may run them at the same time.

    In a CUDA graph they become two branches. Neither may write what the other reads, and that goes
    for what is computed once and kept, too: who needs it in both has it computed before.

    Args:
        one: Runs on a stream of its own.
        other: Runs on the caller's.
    """
    if device.type != "cuda":
        return one(), other()
    own = torch.cuda.current_stream(device)
    if device not in _beside:
        _beside[device] = torch.cuda.Stream(device)
    beside = _beside[device]
    # What the other stream allocates is read on the caller's behind the second wait, and taken
    # again no sooner than in the next call, which begins by waiting for the caller: always the
    # same one, as steps are recorded one after the other. What it reads of the caller's is held by
    # `one`, hence not taken again before the second wait.
    beside.wait_stream(own)
    with torch.cuda.stream(beside):
        first = one()
    second = other()
    own.wait_stream(beside)
    return first, second
