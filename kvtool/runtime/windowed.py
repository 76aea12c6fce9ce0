"""Layers with a sliding window: they keep the last tokens, and no more."""

from __future__ import annotations

from kvtool.attention import GroupedQueryAttention
from kvtool.rope import Rope
from kvtool.runtime.layers import GroupedAttention
from kvtool.runtime.paged_split import PagedRings, PagedSplit
from kvtool.runtime.pages import PagedHeads, Pages
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import KVHeads
from kvtool.windows import WindowPlan


class WindowedHeads(StreamingHeads):
    """A ring of no first tokens, as long as the window, that is allocated as it fills."""

    def __init__(self, heads: KVHeads, rows: int, capacity: int, window: int) -> None:
        super().__init__(heads, rows, 0, 0)
        self.window = window
        self.resize(capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    def resize(self, capacity: int) -> None:
        self._capacity = capacity
        super().resize(min(capacity, self.window))  # until then, a position lies in its own slot


class WindowedAttention(GroupedAttention):
    """Grouped-query attention of a layer with a sliding window."""

    window: WindowPlan

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope) -> None:
        super().__init__(stages, index, rope)
        window = WindowPlan.of(stages.layout)
        assert window is not None
        self.window = window

    def new_store(self, rows: int, capacity: int) -> WindowedHeads:
        return WindowedHeads(self.heads(), rows, capacity, self.window.window)

    def new_paged_store(self, pages: Pages) -> PagedSplit:
        rings = PagedRings(self.heads(), pages, 0, self.window.window)
        return PagedSplit(PagedHeads(self.heads(0, 0), pages), rings)
