"""Heads that keep every token in e4m3, a byte per number, by a static scale each (`kvtool/fp8.py`).

That is the fp8 cache of other engines: a token is stored when it comes, and everything is read from
there, the newest token included. A plan may have the last tokens read as they were instead, from a
ring beside it; and a prompt that is read densely sees its own keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention, causal_attention
from kvtool.fp8 import encode
from kvtool.kernels.append import append
from kvtool.kernels.decode_attention import (
    decode_attention_e4m3,
    merge,
    paged_decode_attention,
    reads_e4m3,
    widen,
)
from kvtool.kernels.sink_logits import attention
from kvtool.plan import Plan
from kvtool.rope import Rope
from kvtool.runtime.dropping import DroppingHeads
from kvtool.runtime.head_pages import HeadPages
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.paged_split import PagedRings, PagedSplit
from kvtool.runtime.pages import PagedHeads, Pages, Place
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import PAGE, KVHeads, Seen, Store
from kvtool.runtime.streams import at_once

Scales = tuple[Tensor, Tensor]
"""`[H]` fp32 each, of keys and of values."""

_ROWS = 256  # queries with a mask of their own


class FloatHeads(DroppingHeads):
    """Heads that keep every token. Planes hold bytes, as not all of torch knows the type.

    Args:
        window: Tokens that lie in a ring, too, and are read from there; 0 for none.
        dense_prompt: Whether a prompt reads its own keys and values before they are stored.
    """

    scales: Scales

    def __init__(
        self, heads: KVHeads, rows: int, capacity: int, scales: Scales, window: int,
        dense_prompt: bool,
    ) -> None:  # fmt: skip
        super().__init__(heads, dense_prompt)
        self.planes = heads.planes(rows, capacity, torch.uint8)
        if window:
            self.exact = StreamingHeads(heads, rows, 0, window)
        self.scales = scales

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        seen = None if step.row is None else self.seen_later(new, step)
        self.put(step.row, step.starts, new.k, new.v)
        if self.exact:
            rows = range(len(step.starts)) if step.row is None else [step.row]
            for b, (row, start) in enumerate(zip(rows, step.starts, strict=True)):
                self.exact.keep_last(row, start, new.k[b], new.v[b])
        return self.lend_later(new.q, step, seen)

    def seen_later(self, new: NewTokens, step: Step) -> Seen | None:
        return self.exact.seen_later(new, step) if self.exact else None

    def lend_later(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        rows = range(len(q)) if step.row is None else [step.row]
        return torch.cat([
            self._read_codes(asked, row, end)
            if self.exact is None
            else self._read_both(asked, seen or self.exact.newest(row, end), row, end)
            for asked, row, end in zip(q.split(1), rows, step.lengths, strict=True)
        ])  # fmt: skip

    def put(self, row: int | None, starts: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Stores keys and values `[B, H, T, D]` in e4m3, see :meth:`Store.write`."""
        named = zip(self.planes, (k, v), self.scales, strict=True)
        codes = {name: encode(x, s[:, None, None]).view(torch.uint8) for name, x, s in named}
        self.write(row, starts, codes)

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        self.put(row, [0], keys[None], values[None])
        if self.exact:
            self.exact.keep_last(row, 0, keys, values)

    def _codes(self, row: int, end: int) -> list[Tensor]:
        """Keys and values of the first tokens of a row, `[1, H, S, D]` bytes."""
        return [self.gather(name, row, 0, end) for name in self.planes]

    def _numbers(self, row: int, end: int, like: Tensor) -> list[Tensor]:
        """The same as they are read, in the dtype of `like`."""
        pairs = zip(self._codes(row, end), self.scales, strict=True)
        return [(widen(codes) * s[:, None, None]).to(like.dtype) for codes, s in pairs]

    def _read_codes(self, q: Tensor, row: int, end: int) -> Tensor:
        """What the last tokens of a row of `end` read, `[1, Q, T, D]`: all from the codes."""
        if q.shape[2] == 1:
            keys, values = (x[0] for x in self._codes(row, end))
            return decode_attention_e4m3(
                q[0, :, 0], keys, values, self.scaling, self.scales, self.sink_logits
            )[None, :, None]
        keys, values = self._numbers(row, end, q)
        return causal_attention(q, keys, values, self.scaling, sink_logits=self.sink_logits)

    def _read_both(self, q: Tensor, near: Seen, row: int, end: int) -> Tensor:
        """The same where each query reads the last tokens, with its own, as they were."""
        assert self.exact is not None
        window, start = self.exact.window, end - q.shape[2]
        if end - start == 1:
            keys, values = (x[0] for x in self._codes(row, max(0, end - window)))
            last = near[0][0, :, -window:], near[1][0, :, -window:]
            return decode_attention_e4m3(
                q[0, :, 0], keys, values, self.scaling, self.scales, self.sink_logits, last
            )[None, :, None]
        far = self._numbers(row, max(0, end - window), q)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(near, far, strict=True))
        count, device = near[0].shape[2], q.device
        at = torch.cat((torch.arange(end - count, end), torch.arange(far[0].shape[2]))).to(device)
        is_near = torch.arange(len(at), device=device) < count
        parts = []
        for begin in range(start, end, _ROWS):
            asked = torch.arange(begin, min(begin + _ROWS, end), device=device)
            distance = asked[:, None] - at
            seen = (distance >= 0) & ((distance < window) == is_near)
            own = q[:, :, begin - start :][:, :, : len(asked)]
            parts.append(attention(own, keys, values, seen, self.scaling, self.sink_logits))
        return torch.cat(parts, dim=2)


class PagedFloats(FloatHeads, PagedHeads):
    """The same in shared pages, and the ring in a place per row."""

    exact: PagedRings | None = None

    def __init__(
        self, heads: KVHeads, pages: Pages, scales: Scales, window: int, dense_prompt: bool
    ) -> None:
        super().__init__(heads, pages.count, PAGE, scales, 0, dense_prompt)
        self.pages = pages
        if window:
            self.exact = PagedRings(heads, pages, 0, window)

    @property
    def row_bytes(self) -> int:
        return self.exact.row_bytes if self.exact else 0

    def grow(self) -> None:
        super().grow()
        if self.exact:
            self.exact.grow()

    def stored(self) -> tuple[Tensor, Tensor, Scales]:
        keys, values = (plane.view(torch.float8_e4m3fn) for plane in self.planes.values())
        return keys, values, self.scales

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if self.exact is not None:
            _, slots, _ = at.ring(self.exact.sink, self.exact.window)
            exact = self.exact.planes
            append(k, v, cos, sin, exact["keys"], exact["values"], slots)
        return super().step(q, k, v, cos, sin, at, out)

    def read_step(self, q: Tensor, at: Place, out: Tensor | None = None) -> Tensor:
        if self.exact is None:
            return super().read_step(q, at, out)
        ring, (keys, values, scales) = self.exact, self.stored()
        table, _, lengths = at.ring(ring.sink, ring.window)
        exact, before = (ring.planes["keys"], ring.planes["values"]), at.before(ring.window)
        (near, near_mass), (far, far_mass) = at_once(
            q.device,
            lambda: paged_decode_attention(
                q, *exact, lengths, self.scaling, table, sink_logits=self.sink_logits
            ),
            lambda: paged_decode_attention(
                q, keys, values, before, self.scaling, at.table, scales=scales
            ),
        )  # fmt: skip
        read = merge((near, far), (near_mass, far_mass))
        return read if out is None else out.copy_(read)


class FloatAttention(SplitAttention):
    """Grouped-query attention whose full heads lie in e4m3; others are as in any split store."""

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope, plan: Plan) -> None:
        super().__init__(stages, index, rope, plan)
        planned, device = self.layer.scales, stages.qkv.weight.device
        assert planned is not None
        keys, values = (
            torch.tensor([scales[head] for head in self.full], dtype=torch.float32, device=device)
            for scales in (planned.keys, planned.values)
        )
        self.scales, self.exact = (keys, values), planned.window

    @property
    def all_full(self) -> bool:
        """Whether no head streams or has a budget: then the full heads are the whole store."""
        return self.counts[0] == self.stages.layout.kv_heads

    def new_store(self, rows: int, capacity: int) -> Store:
        if self.all_full:
            return self.new_full_heads(rows, capacity)
        return super().new_store(rows, capacity)

    def new_full_heads(self, rows: int, capacity: int) -> FloatHeads:
        dense_prompt = self.prefill == "dense"
        return FloatHeads(self.full_heads, rows, capacity, self.scales, self.exact, dense_prompt)

    def new_paged_store(self, pages: Pages) -> PagedFloats | PagedSplit | None:
        heads, dense_prompt = self.full_heads, self.prefill == "dense"
        if isinstance(pages, HeadPages) or not reads_e4m3(heads.like.device):
            return None
        full = PagedFloats(heads, pages, self.scales, self.exact, dense_prompt)
        return full if self.all_full else PagedSplit(full, self.new_paged_rings(pages))
