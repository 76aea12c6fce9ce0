"""Heads that keep every token and read few of them (`kvtool/sparse.py`).

Their keys lie with the label channels first, in the order of each head, and queries come in the
same order: q·k is a sum over channels and does not change. So the labels of all tokens are a view
of the keys, and nothing is kept twice.

A prompt is read densely. Each token behind it is read by itself, also where several come at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.kernels.sparse_reading import sparse_attention
from kvtool.plan import Plan
from kvtool.rope import Rope
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.pages import Pages
from kvtool.runtime.split import FullHeads
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import KVHeads, Store
from kvtool.sparse import SparseReading


class SparseHeads(FullHeads):
    """Heads that keep every token and read few.

    Args:
        order: `[H, D]`, the channels of each head as they lie, labels first.
        group: Query heads of each.
    """

    def __init__(
        self, heads: KVHeads, rows: int, capacity: int, reading: SparseReading, order: Tensor,
        group: int,
    ) -> None:  # fmt: skip
        super().__init__(heads, rows, capacity)
        self.reading = reading
        # A step is bound by the calls it makes: these are all that putting in order takes.
        self.of_keys, self.of_queries = order[:, None], order.repeat_interleave(group, 0)[:, None]

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        q = new.q.gather(-1, self.of_queries.expand(new.q.shape))
        k = self.ordered(new.k)
        self.write(step.row, step.starts, {"keys": k, "values": new.v})
        if step.prompt is not None:
            return self.attend(q, step.row, step.lengths)
        rows = range(len(q)) if step.row is None else [step.row]
        parts = [
            torch.stack([self.read(q[b, :, i], row, start + i + 1) for i in range(q.shape[2])], 1)
            for b, (row, start) in enumerate(zip(rows, step.starts, strict=True))
        ]
        return torch.stack(parts)

    def ordered(self, keys: Tensor) -> Tensor:
        """Keys `[B, H, T, D]` with their channels as they lie."""
        return keys.gather(-1, self.of_keys.expand(keys.shape))

    def read(self, q: Tensor, row: int, length: int) -> Tensor:
        """What the last of so many tokens of a row reads, `[Q, D]`."""
        reading = self.reading
        if length <= reading.tokens:
            return self.attend(q[None, :, None], row, [length])[0, :, 0]
        keys, values = (plane[row] for plane in self.planes.values())
        return sparse_attention(
            q, keys, values, length, reading.labels, reading.tokens, reading.sink, reading.window,
            self.scaling, self.sink_logits,
        )  # fmt: skip

    @staticmethod
    def add_together(stores: Sequence[FullHeads], new: NewTokens, step: Step) -> Tensor:
        return Store.add_together(stores, new, step)


class SparseAttention(SplitAttention):
    """Grouped-query attention whose full heads are read sparsely; the others are as in any split
    store.
    """

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope, plan: Plan) -> None:
        super().__init__(stages, index, rope, plan)
        assert self.layer.sparse is not None
        self.reading = self.layer.sparse
        orders = self.reading.orders(stages.layout.head_dim)
        own = [orders[head] for head in self.full]
        self.order = torch.tensor(own, device=stages.qkv.weight.device)

    def new_full_heads(self, rows: int, capacity: int) -> SparseHeads:
        layout = self.stages.layout
        group = layout.heads // layout.kv_heads
        return SparseHeads(self.full_heads, rows, capacity, self.reading, self.order, group)

    def new_paged_store(self, pages: Pages) -> None:
        """There is none: no kernel reads pages by labels yet."""
        return None
