"""Layers with a sliding window: they keep the last tokens, and no more."""

from __future__ import annotations

from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.rope import Rope
from kvtool.runtime.layers import GroupedAttention
from kvtool.runtime.paged_split import PagedRings, PagedSplit
from kvtool.runtime.pages import PagedHeads, Pages
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import Store
from kvtool.windows import WindowPlan


class WindowedHeads(StreamingHeads):
    """A ring of no first tokens, as long as the window, that is allocated as it fills."""

    def __init__(
        self, rows: int, heads: int, capacity: int, window: int, head_dim: int, like: Tensor,
        scaling: float, sink_logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        nothing = like.new_empty((rows, heads, 0, head_dim))
        self.planes = {"keys": nothing, "values": nothing}
        self.sink, self.window, self.scaling, self.dense_prompt = 0, window, scaling, False
        self.sink_logits = sink_logits
        self.resize(capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    def resize(self, capacity: int) -> None:
        self._capacity = capacity
        super().resize(min(capacity, self.window))  # until then, a position lies in its own slot

    def copy_prefix(self, source: Store, length: int) -> None:
        """Nothing: later tokens have overwritten it."""

    def keep_prefix(self, capacity: int) -> None:
        self.resize(0)


class WindowedAttention(GroupedAttention):
    """Grouped-query attention of a layer with a sliding window."""

    window: WindowPlan

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope) -> None:
        super().__init__(stages, index, rope)
        window = WindowPlan.of(stages.layout)
        assert window is not None
        self.window = window

    def new_store(self, rows: int, capacity: int) -> WindowedHeads:
        layout, like = self.stages.layout, self.stages.qkv.weight
        heads, size, scaling = layout.kv_heads, layout.head_dim, layout.scaling
        return WindowedHeads(
            rows, heads, capacity, self.window.window, size, like, scaling, self.stages.sink_logits
        )

    def new_paged_store(self, pages: Pages) -> PagedSplit:
        layout, like = self.stages.layout, self.stages.qkv.weight
        heads, size, scaling = layout.kv_heads, layout.head_dim, layout.scaling
        rings = PagedRings(
            pages, heads, 0, self.window.window, size, like, scaling, dense_prompt=False,
            sink_logits=self.stages.sink_logits,
        )  # fmt: skip
        return PagedSplit(PagedHeads(pages, 0, size, like, scaling), rings)
