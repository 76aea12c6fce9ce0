"""Layers without keys and values of their own, which read those of an earlier layer."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from kvtool.attention import BorrowingAttention
from kvtool.rope import Rope, rotate
from kvtool.runtime.layers import RuntimeAttention, Step
from kvtool.runtime.pages import PagedStore, Pages
from kvtool.runtime.stores import Store


class EmptyStore(Store):
    """What a layer keeps that reads another's: nothing."""

    def __init__(self) -> None:
        self.planes = {}

    @property
    def capacity(self) -> int:
        """Any number of tokens."""
        return sys.maxsize

    def resize(self, capacity: int) -> None:
        """Nothing grows."""


class SharedAttention(RuntimeAttention):
    """Queries of this layer over the keys and values that an earlier one has stored in the step.

    Args:
        rope: Of this layer, which is the other's, too.
    """

    def __init__(self, stages: BorrowingAttention, index: int, rope: Rope) -> None:
        super().__init__()
        self.stages, self.layer_index = stages, index
        self.rope = rope

    def new_store(self, rows: int, capacity: int) -> EmptyStore:
        return EmptyStore()

    def new_paged_store(self, pages: Pages) -> PagedStore:
        return PagedStore(pages, {}, self.stages.qkv.weight)

    def attention(self, hidden: Tensor, step: Step, store: Any) -> Tensor:
        cos, sin = (table[:, None] for table in step.tables[self.table])
        q = rotate(self.stages.queries(hidden), cos, sin)
        return self.stages.output(self.read(q, step), hidden)

    def read(self, q: Tensor, step: Step) -> Tensor:
        """What rotated queries `[B, Q, T, D]` read, `[B, Q, T, D]`."""
        reads = self.stages.layout.reads
        assert reads is not None
        lender: Any = step.stores[reads]
        if step.place is not None:
            read: Tensor = lender.read_step(q[:, :, 0], step.place)
            return read[:, :, None]
        context: Tensor = lender.lend(q, step, step.seen.get(reads))
        return context
