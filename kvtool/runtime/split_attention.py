"""Attention over heads that keep different parts of the past."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from kvtool.runtime.stores import KVHeads, Store

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
        self.full, self.counts = full, (len(full), len(budgeted), len(streaming))
        self.budgets = [n for n in self.layer.budgets if n is not None]

    @property
    def full_heads(self) -> KVHeads:
        """The first of them in the order of `stages`."""
        return self.heads(0, self.counts[0])

    @property
    def budgeted_heads(self) -> KVHeads:
        """Those behind them."""
        return self.heads(self.counts[0], self.counts[1])

    @property
    def streaming_heads(self) -> KVHeads:
        """The last."""
        return self.heads(self.counts[0] + self.counts[1], self.counts[2])

    def new_store(self, rows: int, capacity: int) -> Store:
        sink, window, dense_prompt = self.layer.sink, self.layer.window, self.prefill == "dense"
        ring = tails = None
        if self.counts[2]:
            ring = StreamingHeads(self.streaming_heads, rows, sink, window, dense_prompt)
        if self.budgets:
            tails = BudgetedHeads(self.budgeted_heads, rows, self.budgets, self._new_selector)
        return SplitStore(self.new_full_heads(rows, capacity), ring, tails)

    def new_full_heads(self, rows: int, capacity: int) -> FullHeads | PackedHeads | FloatHeads:
        """Empty planes of those heads that keep every token."""
        return FullHeads(self.full_heads, rows, capacity)

    @property
    def paged_budgets(self) -> list[int | None]:
        """Of the heads that have pages: tokens of a prompt that they keep, `None` for all."""
        return [*[None] * self.counts[0], *self.budgets]

    def new_paged_store(self, pages: Pages) -> PagedSplit | PagedFloats | None:
        rings = self.new_paged_rings(pages)
        if isinstance(pages, HeadPages):
            return self._by_head(pages, rings)
        if self.budgets:
            return None
        return PagedSplit(PagedHeads(self.full_heads, pages), rings)

    def _by_head(self, pages: HeadPages, rings: PagedRings | None) -> PagedByHead:
        lists = range(len(pages.owned[0]))[pages.layers[self.layer_index]]
        own, others = lists[: self.counts[0]], lists[self.counts[0] :]
        full = FullHeadsInPages(self.full_heads, pages, own)
        budgeted = None
        if others:
            budgeted = BudgetedHeadsInPages(
                self.budgeted_heads, pages, others, self.budgets, self._new_selector
            )
        logits = self.stages.sink_logits_of(0, len(lists))
        return PagedByHead(pages, self.layer_index, full, budgeted, rings, logits)

    def new_paged_rings(self, pages: Pages) -> PagedRings | None:
        """Of the streaming heads, where there are any."""
        if not self.counts[2]:
            return None
        sink, window, dense_prompt = self.layer.sink, self.layer.window, self.prefill == "dense"
        return PagedRings(self.streaming_heads, pages, sink, window, dense_prompt)

    def _new_selector(self) -> Selector:
        assert self.policy is not None
        heads = self.budgeted_heads
        return selector(self.policy, heads.scaling, self.rope, heads.sink_logits)
