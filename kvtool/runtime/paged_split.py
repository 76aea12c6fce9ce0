"""A layer whose heads keep different parts of the past, in shared pages (see `split.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool.kernels.append import append
from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.runtime.pages import PagedHeads, Pages, PerRow, Place
from kvtool.runtime.split import BudgetedHeads, SplitStore, StreamingHeads
from kvtool.runtime.stores import KVHeads
from kvtool.runtime.streams import at_once

if TYPE_CHECKING:
    from kvtool.runtime.floats import PagedFloats
    from kvtool.runtime.packed_attention import PagedPacked


class PagedRings(PerRow, StreamingHeads):
    """Heads that keep the first tokens and the last: a ring per row."""

    def __init__(
        self, heads: KVHeads, pages: Pages, sink: int, window: int, dense_prompt: bool = False
    ) -> None:
        super().__init__(heads, pages.rows, sink, window, dense_prompt)
        self.pages = pages

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :meth:`PagedHeads.step`."""
        _, slots, _ = at.ring(self.sink, self.window)
        keys, values = self.planes["keys"], self.planes["values"]
        turned = append(k, v, cos, sin, keys, values, slots, q)
        assert turned is not None
        return self.read_step(turned, at, out)

    def read_step(self, q: Tensor, at: Place, out: Tensor | None = None) -> Tensor:
        """See :meth:`PagedHeads.read_step`."""
        table, _, lengths = at.ring(self.sink, self.window)
        keys, values = self.planes["keys"], self.planes["values"]
        return paged_decode_attention(
            q, keys, values, lengths, self.scaling, table, out=out, sink_logits=self.sink_logits
        )[0]


class PagedSplit(SplitStore):
    """Heads in pages, and streaming heads in rings."""

    full: PagedHeads | PagedPacked | PagedFloats
    streaming: PagedRings | None

    def __init__(
        self,
        full: PagedHeads | PagedPacked | PagedFloats,
        streaming: PagedRings | None,
        budgeted: BudgetedHeads | None = None,
    ) -> None:
        super().__init__(full, streaming, budgeted)
        self.both_sink_logits: Tensor | None = None
        if type(full) is PagedHeads and streaming is not None and full.sink_logits is not None:
            assert streaming.sink_logits is not None
            self.both_sink_logits = torch.cat((full.sink_logits, streaming.sink_logits))

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
        if type(self.full) is PagedHeads:
            return self._step_both(self.full, streaming, q, k, v, cos, sin, at)
        asked = there * (q.shape[1] // k.shape[1])
        out = q.new_empty((*q.shape[:2], v.shape[-1]))
        at.ring(streaming.sink, streaming.window)  # here, as packed heads may read the same
        at_once(
            q.device,
            lambda: streaming.step(
                q[:, asked:], k[:, there:], v[:, there:], cos, sin, at, out[:, asked:]
            ),
            lambda: self.step_pages(
                q[:, :asked], k[:, :there], v[:, :there], cos, sin, at, out[:, :asked]
            ),
        )
        return out

    def _step_both(
        self, full: PagedHeads, streaming: PagedRings,
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
    ) -> Tensor:  # fmt: skip
        """Pages and rings in the same launches."""
        sink, window = streaming.sink, streaming.window
        places, slots, _ = at.ring(sink, window)
        keys, values, _ = full.stored()
        rings = streaming.planes["keys"], streaming.planes["values"]
        turned = append(k, v, cos, sin, keys, values, at.slots, q, rings=(*rings, slots))
        assert turned is not None
        lengths = at.beside_ring(keys.shape[1], k.shape[1], sink, window)
        return paged_decode_attention(
            turned, keys, values, lengths, full.scaling, at.table,
            sink_logits=self.both_sink_logits, rings=(*rings, places[:, 0]),
        )[0]  # fmt: skip

    def read_step(self, q: Tensor, at: Place) -> Tensor:
        """See :meth:`PagedHeads.read_step`."""
        read: Tensor = self.lender.read_step(q, at)
        return read

    def step_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Of the heads in pages."""
        return self.full.step(q, k, v, cos, sin, at, out)
