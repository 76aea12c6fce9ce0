"""Layers without keys and values of their own, which read those of an earlier layer."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from kvtool.attention import BorrowingAttention
from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.rope import Rope, rotate
from kvtool.runtime.layers import RuntimeAttention, Step
from kvtool.runtime.pages import PagedStore, Pages, Place
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
        layout = self.stages.layout
        assert layout.reads is not None
        lender: Any = step.stores[layout.reads]
        if step.place is not None:
            return self._step(q[:, :, 0], lender, step.place)[:, :, None]
        if layout.reads in step.seen:
            assert layout.sliding_window is not None
            keys, values = step.seen[layout.reads]
            window = layout.sliding_window
            return streaming_attention(q, keys, values, 0, window, layout.scaling, step.starts[0])
        context: Tensor = lender.attend(q, step.row, step.lengths, layout.scaling)
        return context

    def _step(self, q: Tensor, lender: Any, at: Place) -> Tensor:
        """The same of one token per row in a paged memory, `[B, Q, D]`."""
        layout, table, lengths = self.stages.layout, at.table, at.lengths
        if layout.sliding_window is not None:
            lender = lender.streaming
            table, _, lengths = at.ring(0, layout.sliding_window)
        keys, values = lender.planes["keys"], lender.planes["values"]
        return paged_decode_attention(q, keys, values, lengths, layout.scaling, table)[0]
