"""Heads that keep every token in e4m3, a byte per number, by a static scale each (`kvtool/fp8.py`).

That is the fp8 cache of other engines: a token is stored when it comes, and everything is read from
there, the newest token included. With a prompt that is read densely, prompts are an exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention, causal_attention
from kvtool.fp8 import encode
from kvtool.kernels.decode_attention import decode_attention_e4m3, reads_e4m3, widen
from kvtool.plan import Plan
from kvtool.runtime.head_pages import HeadPages
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.paged_split import PagedSplit
from kvtool.runtime.pages import PagedHeads, Pages
from kvtool.runtime.split import DroppingHeads
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import Store, whole_pages

Scales = tuple[Tensor, Tensor]
"""`[H]` fp32 each, of keys and of values."""


class FloatHeads(DroppingHeads):
    """Heads that keep every token. Planes hold bytes, as not all of torch knows the type.

    Args:
        dense_prompt: Whether a prompt reads its own keys and values before they are stored.
        sink_logits: `[Q]`, of the query heads that read them; see `kernels/sink_logits`.
    """

    scales: Scales

    def __init__(
        self, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor, scaling: float,
        scales: Scales, dense_prompt: bool, sink_logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        shape = (rows, heads, capacity, head_dim)
        self.planes = {
            name: like.new_empty(shape, dtype=torch.uint8) for name in ("keys", "values")
        }
        self.scaling, self.scales = scaling, scales
        self.dense_prompt, self.sink_logits = dense_prompt, sink_logits

    def grown(self, length: int) -> int:
        return whole_pages(super().grown(length))

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        self.put(step.row, step.starts, new.k, new.v)
        rows = range(len(step.starts)) if step.row is None else [step.row]
        parts = zip(new.q.split(1), rows, step.lengths, strict=True)
        return torch.cat([self.read(q, row, length) for q, row, length in parts])

    def put(self, row: int | None, starts: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Stores keys and values `[B, H, T, D]`, see :meth:`Store.write`."""
        named = zip(self.planes, (k, v), self.scales, strict=True)
        codes = {name: encode(x, s[:, None, None]).view(torch.uint8) for name, x, s in named}
        self.write(row, starts, codes)

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        self.put(row, [0], keys[None], values[None])

    def read(self, q: Tensor, row: int, length: int) -> Tensor:
        """Attention of the newest tokens of one row, `[1, Q, T, D]`, over everything stored."""
        codes = [self.gather(name, row, 0, length) for name in self.planes]  # [1, H, S, D]
        if q.shape[2] == 1:
            keys, values = (x[0] for x in codes)
            return decode_attention_e4m3(
                q[0, :, 0], keys, values, self.scaling, self.scales, self.sink_logits
            )[None, :, None]
        keys, values = (
            (widen(x) * s[:, None, None]).to(q.dtype)
            for x, s in zip(codes, self.scales, strict=True)
        )
        return causal_attention(q, keys, values, self.scaling, sink_logits=self.sink_logits)


class PagedFloats(FloatHeads, PagedHeads):
    """The same in shared pages."""

    def __init__(
        self, pages: Pages, heads: int, head_dim: int, like: Tensor, scaling: float,
        scales: Scales, dense_prompt: bool, sink_logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        codes = like.new_empty(0, dtype=torch.uint8)
        PagedHeads.__init__(self, pages, heads, head_dim, codes, scaling, sink_logits)
        self.scales, self.dense_prompt = scales, dense_prompt

    def stored(self) -> tuple[Tensor, Tensor, Scales]:
        keys, values = (plane.view(torch.float8_e4m3fn) for plane in self.planes.values())
        return keys, values, self.scales


class FloatAttention(SplitAttention):
    """Grouped-query attention whose full heads lie in e4m3; others are as in any split store."""

    def __init__(
        self, stages: GroupedQueryAttention, index: int, inv_freq: Tensor, scale: float, plan: Plan
    ) -> None:
        super().__init__(stages, index, inv_freq, scale, plan)
        assert self.layer.scales is not None
        keys, values = (
            torch.tensor([scales[head] for head in self.full], device=stages.qkv.weight.device)
            for scales in (self.layer.scales.keys, self.layer.scales.values)
        )
        self.scales = keys, values

    @property
    def all_full(self) -> bool:
        """Whether no head streams or has a budget: then the full heads are the whole store."""
        return self.counts[0] == self.stages.layout.kv_heads

    def new_store(self, rows: int, capacity: int) -> Store:
        return (
            self.new_full_heads(rows, capacity)
            if self.all_full
            else super().new_store(rows, capacity)
        )

    def new_full_heads(self, rows: int, capacity: int) -> FloatHeads:
        layout, like = self.stages.layout, self.stages.qkv.weight
        return FloatHeads(
            rows, self.counts[0], capacity, layout.head_dim, like, layout.scaling, self.scales,
            self.prefill == "dense", self.full_sink_logits,
        )  # fmt: skip

    def new_paged_store(self, pages: Pages) -> PagedFloats | PagedSplit | None:
        layout, like = self.stages.layout, self.stages.qkv.weight
        if isinstance(pages, HeadPages) or not reads_e4m3(like.device):
            return None
        full = PagedFloats(
            pages, self.counts[0], layout.head_dim, like, layout.scaling, self.scales,
            self.prefill == "dense", self.full_sink_logits,
        )  # fmt: skip
        return full if self.all_full else PagedSplit(full, self.new_paged_rings(pages))
