"""A layer whose heads keep different parts of the past, in shared pages (see `split.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from kvtool.kernels.append import append
from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.runtime.pages import PagedHeads, PerRow, Place
from kvtool.runtime.split import SplitStore, StreamingHeads

if TYPE_CHECKING:
    from kvtool.runtime.packed import PagedPacked


T = TypeVar("T")
_beside: dict[torch.device, torch.cuda.Stream] = {}


def at_once(device: torch.device, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
    """What two calls give that do not need each other; CUDA may run them at the same time.

    In a CUDA graph they become two branches.
    """
    if device.type != "cuda":
        return one(), other()
    own = torch.cuda.current_stream(device)
    if device not in _beside:
        _beside[device] = torch.cuda.Stream(device)
    beside = _beside[device]
    # Memory of one stream is used on the other only between the two waits, so none of it is given
    # to somebody else too early.
    beside.wait_stream(own)
    with torch.cuda.stream(beside):
        first = one()
    second = other()
    own.wait_stream(beside)
    return first, second


class PagedRings(PerRow, StreamingHeads):
    """Heads that keep the first tokens and the last: a ring per row."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place) -> Tensor:
        """See :meth:`PagedHeads.step`."""
        table, slots, lengths = at.ring(self.sink, self.window)
        keys, values = self.planes["keys"], self.planes["values"]
        turned = append(k, v, cos, sin, keys, values, slots, q)
        assert turned is not None
        return paged_decode_attention(turned, keys, values, lengths, self.scaling, table)[0]


class PagedSplit(SplitStore):
    """Heads in pages, and streaming heads in rings."""

    full: PagedHeads | PagedPacked
    streaming: PagedRings | None

    @property
    def page_bytes(self) -> int:
        """Of the full heads."""
        return self.full.page_bytes

    @property
    def row_bytes(self) -> int:
        """Of the streaming heads, and of what packed heads keep exactly."""
        return self.full.row_bytes + (self.streaming.row_bytes if self.streaming else 0)

    def grow(self) -> None:
        """Takes as many pages and rows as there are now."""
        self.full.grow()
        if self.streaming:
            self.streaming.grow()

    def step(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place) -> Tensor:
        """See :meth:`PagedHeads.step`."""
        streaming = self.streaming
        if streaming is None:
            return self.step_pages(q, k, v, cos, sin, at)
        there = k.shape[1] - streaming.kv_heads  # heads in pages come first
        if not there:
            return streaming.step(q, k, v, cos, sin, at)
        asked = there * (q.shape[1] // k.shape[1])
        near, far = at_once(
            q.device,
            lambda: streaming.step(q[:, asked:], k[:, there:], v[:, there:], cos, sin, at),
            lambda: self.step_pages(q[:, :asked], k[:, :there], v[:, :there], cos, sin, at),
        )
        return torch.cat((far, near), dim=1)

    def step_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place
    ) -> Tensor:
        """Of the heads in pages."""
        return self.full.step(q, k, v, cos, sin, at)
