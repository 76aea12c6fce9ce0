"""Attention over heads that keep different parts of the past."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.plan import Plan
from kvtool.rope import Rope
from kvtool.runtime.head_pages import (
    BudgetedHeadsInPages,
    FullHeadsInPages,
    HeadPages,
    PagedByHead,
)
from kvtool.runtime.layers import GroupedAttention
from kvtool.runtime.paged_split import PagedRings, PagedSplit
from kvtool.runtime.pages import PagedHeads, Pages
from kvtool.runtime.selection import Selector, selector
from kvtool.runtime.split import BudgetedHeads, FullHeads, SplitStore, StreamingHeads
from kvtool.runtime.stores import Store

if TYPE_CHECKING:
    from kvtool.runtime.floats import FloatHeads, PagedFloats
    from kvtool.runtime.packed import PackedHeads


class SplitAttention(GroupedAttention):
    """Grouped-query attention over a split store; the KV heads of `stages` get its order."""

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope, plan: Plan) -> None:
        super().__init__(stages, index, rope)
        self.layer, self.prefill, self.policy = plan.layers[index], plan.prefill, plan.policy
        streaming = [head for head, streams in enumerate(self.layer.streaming) if streams]
        budgeted = [head for head, n in enumerate(self.layer.budgets) if n is not None]
        full = self.layer.full_heads
        stages.reorder_kv_heads(full + budgeted + streaming)
        self.full, self.counts = full, (len(full), len(streaming))
        self.budgets = [n for n in self.layer.budgets if n is not None]

    @property
    def full_sink_logits(self) -> Tensor | None:
        """Logits beside the scores of the full heads; see `kernels/sink_logits`."""
        return self.stages.sink_logits_of(0, self.counts[0])

    @property
    def budgeted_sink_logits(self) -> Tensor | None:
        """Those of the budgeted heads."""
        return self.stages.sink_logits_of(self.counts[0], len(self.budgets))

    @property
    def streaming_sink_logits(self) -> Tensor | None:
        """Those of the streaming heads."""
        return self.stages.sink_logits_of(self.counts[0] + len(self.budgets), self.counts[1])

    def new_store(self, rows: int, capacity: int) -> Store:
        layout, like, layer = self.stages.layout, self.stages.qkv.weight, self.layer
        streaming, size, scaling = self.counts[1], layout.head_dim, layout.scaling
        ring = tails = None
        if streaming:
            ring = StreamingHeads(
                rows, streaming, layer.sink, layer.window, size, like, scaling,
                dense_prompt=self.prefill == "dense", sink_logits=self.streaming_sink_logits,
            )  # fmt: skip
        if self.budgets:
            tails = BudgetedHeads(
                rows,
                self.budgets,
                size,
                like,
                scaling,
                self._new_selector,
                self.budgeted_sink_logits,
            )
        return SplitStore(self.new_full_heads(rows, capacity), ring, tails)

    def new_full_heads(self, rows: int, capacity: int) -> FullHeads | PackedHeads | FloatHeads:
        """Empty planes of those heads that keep every token."""
        layout, like = self.stages.layout, self.stages.qkv.weight
        return FullHeads(
            rows,
            self.counts[0],
            capacity,
            layout.head_dim,
            like,
            layout.scaling,
            self.full_sink_logits,
        )

    @property
    def paged_budgets(self) -> list[int | None]:
        """Of the heads that have pages: tokens of a prompt that they keep, `None` for all."""
        return [*[None] * self.counts[0], *self.budgets]

    def new_paged_store(self, pages: Pages) -> PagedSplit | PagedFloats | None:
        layout, like = self.stages.layout, self.stages.qkv.weight
        rings = self.new_paged_rings(pages)
        if isinstance(pages, HeadPages):
            return self._by_head(pages, rings)
        if self.budgets:
            return None
        heads, size, logits = self.counts[0], layout.head_dim, self.full_sink_logits
        full = PagedHeads(pages, heads, size, like, layout.scaling, logits)
        return PagedSplit(full, rings)

    def _by_head(self, pages: HeadPages, rings: PagedRings | None) -> PagedByHead:
        layout, like = self.stages.layout, self.stages.qkv.weight
        lists = range(len(pages.owned[0]))[pages.layers[self.layer_index]]
        own, others = lists[: self.counts[0]], lists[self.counts[0] :]
        full = FullHeadsInPages(pages, own, layout.scaling, self.full_sink_logits)
        budgeted = None
        if others:
            budgeted = BudgetedHeadsInPages(
                pages, others, self.budgets, like, layout.scaling, self._new_selector,
                self.budgeted_sink_logits,
            )  # fmt: skip
        logits = self.stages.sink_logits_of(0, len(lists))
        return PagedByHead(pages, self.layer_index, full, budgeted, rings, logits)

    def new_paged_rings(self, pages: Pages) -> PagedRings | None:
        """Of the streaming heads, where there are any."""
        layout, like, layer = self.stages.layout, self.stages.qkv.weight, self.layer
        if not self.counts[1]:
            return None
        return PagedRings(
            pages, self.counts[1], layer.sink, layer.window, layout.head_dim, like,
            layout.scaling, dense_prompt=self.prefill == "dense",
            sink_logits=self.streaming_sink_logits,
        )  # fmt: skip

    def _new_selector(self) -> Selector:
        assert self.policy is not None
        scaling, logits = self.stages.layout.scaling, self.budgeted_sink_logits
        return selector(self.policy, scaling, self.rope, logits)
