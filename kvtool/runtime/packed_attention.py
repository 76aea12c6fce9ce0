"""Packed heads (`packed.py`) in shared pages, and the attention whose full heads are packed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.bits import Bits, Factors
from kvtool.codes import Positions
from kvtool.kernels.append import append
from kvtool.kernels.hadamard import turn
from kvtool.kernels.packed_attention import fits, pack_blocks, packed_attention
from kvtool.plan import Plan
from kvtool.runtime.head_pages import HeadPages
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.packed import PackedHeads
from kvtool.runtime.packed_store import PagedBlocks
from kvtool.runtime.paged_split import PagedSplit
from kvtool.runtime.pages import Pages, Place
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import PAGE, KVHeads, Seen


class PagedPacked(PagedBlocks, PackedHeads):
    """Packed heads in shared pages.

    Values behind a Hadamard transform lie so in the ring as well: one softmax then sums up both,
    and its result is turned back.
    """

    def __init__(
        self, heads: KVHeads, pages: Pages, bits: Bits, positions: Positions, dense_prompt: bool
    ) -> None:
        self.pages, self.turned = pages, bits.hadamard == "values"
        room, bits = bits.sink + bits.window + PAGE, replace(bits, hadamard="none")
        super().__init__(heads, pages.count, room, bits, None, positions, dense_prompt)
        self.fused = False  # steps of pages come to `step`

    def new_exact(self, rows: int, bits: Bits) -> StreamingHeads:
        return super().new_exact(self.pages.rows, bits)

    @classmethod
    def possible(cls, bits: Bits, head_dim: int) -> bool:
        """Whether Triton's kernel reads such blocks."""
        return cls.read_as_stored(bits) and fits(head_dim, bits.keys, bits.values, bits.group)

    def add(self, new: NewTokens, step: Step) -> Tensor:
        if not self.turned:
            return super().add(new, step)
        return turn(super().add(new._replace(v=turn(new.v)), step))

    def seen_by(self, new: NewTokens, step: Step) -> Seen | None:
        return super().seen_by(new._replace(v=turn(new.v)) if self.turned else new, step)

    def lend(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        read = super().lend(q, step, seen)
        return turn(read) if self.turned else read

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :meth:`PagedHeads.step`."""
        ring, blocks = self.stored(at.rows, at.table)
        _, slots, _ = at.ring(self.bits.sink, self.bits.ring)
        values = turn(v) if self.turned else v
        asked = append(k, values, cos, sin, ring.keys, ring.values, slots, q)
        assert asked is not None
        pack_blocks(ring, blocks, at.lengths)
        return self.read_step(asked, at, out)

    def read_step(self, q: Tensor, at: Place, out: Tensor | None = None) -> Tensor:
        """See :meth:`PagedHeads.read_step`."""
        ring, blocks = self.stored(at.rows, at.table)
        context = packed_attention(q, ring, blocks, at.lengths, self.scaling, self.sink_logits)
        context = turn(context) if self.turned else context
        return context if out is None else out.copy_(context)


class PackedAttention(SplitAttention):
    """Grouped-query attention whose full heads are packed; the others are as in any split store."""

    def __init__(
        self, stages: GroupedQueryAttention, index: int, plan: Plan, positions: Positions
    ) -> None:
        super().__init__(stages, index, positions.rope, plan)
        assert self.layer.bits is not None
        self.bits, self.positions = self.layer.bits, positions
        order = self.bits.order
        self.order = None
        if order is not None and self.full:
            own = [order[head] for head in self.full]
            self.order = torch.tensor(own, device=positions.like.device)
        self.balances = self._balance(self.bits.key_balance), self._balance(self.bits.value_balance)

    def new_full_heads(self, rows: int, capacity: int) -> PackedHeads:
        return PackedHeads(
            self.full_heads, rows, capacity, self.bits, self.order, self.positions,
            self.prefill == "dense", self.balances,
        )  # fmt: skip

    def new_paged_store(self, pages: Pages) -> PagedSplit | None:
        heads, dense_prompt = self.full_heads, self.prefill == "dense"
        if isinstance(pages, HeadPages) or not PagedPacked.possible(self.bits, heads.head_dim):
            return None
        full = PagedPacked(heads, pages, self.bits, self.positions, dense_prompt)
        return PagedSplit(full, self.new_paged_rings(pages))

    def _balance(self, factors: Factors | None) -> Tensor | None:
        """`[H, 1, D]` of the full heads."""
        if factors is None or not self.full:
            return None
        own = [factors[head] for head in self.full]
        return torch.tensor(own, device=self.positions.like.device)[:, None]
