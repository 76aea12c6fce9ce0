"""Heads that keep every token, most of them as integers of few bits (`kvtool/bits.py`).

The first tokens and the last are exact, in a ring. When `window` tokens have come behind N others,
these are packed as one block, from the exact numbers, and never again. Whatever the calls were that
brought the tokens, the same are packed after as many of them; in a call with several tokens, each
reads what would have been exact had it come alone.

Keys that are stored after RoPE are read as they are (`kernels/packed_attention`): nothing of the
past is rebuilt. Keys that are stored before it are rebuilt and rotated a tile at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention, rotate
from kvtool.bits import Bits, from_stored, to_stored, turn
from kvtool.codes import Positions
from kvtool.kernels.append import append
from kvtool.kernels.packed_attention import (
    Blocks,
    Ring,
    channel_scores,
    fits,
    pack_blocks,
    packed_attention,
    token_scores,
    value_sums,
)
from kvtool.kernels.quantise import dequantise, groups_of, packed_bytes, quantise
from kvtool.plan import Plan
from kvtool.runtime.layers import Step
from kvtool.runtime.pages import Pages, Place, enlarge
from kvtool.runtime.split import (
    DroppingHeads,
    NewTokens,
    PagedRings,
    PagedSplit,
    SplitAttention,
    StreamingHeads,
)
from kvtool.runtime.stores import PAGE, whole_pages

_ROWS = 256  # queries whose scores are written out at once
_BLOCKS = 16  # whose keys are rebuilt at once


class PackedHeads(DroppingHeads):
    """A ring of exact tokens, and planes `[B, H, blocks, ...]` of codes and of their scales.

    A block has a row per channel with N numbers of keys whose scales are per channel, and else a
    row per token with D numbers.

    Args:
        order: `[H, D]`, the order of the channels of keys; None for their own.
        positions: RoPE in fp32.
    """

    def __init__(
        self, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor, scaling: float,
        bits: Bits, order: Tensor | None, positions: Positions, dense_prompt: bool,
    ) -> None:  # fmt: skip
        self.exact = self.new_exact(rows, heads, head_dim, like, scaling, bits)
        self.bits, self.scaling, self.dense_prompt = bits, scaling, dense_prompt
        self.head_dim, self.order, self.positions = head_dim, order, positions
        self.tokens = capacity
        size = bits.group
        key_block = (head_dim, size) if bits.axis == "channel" else (size, head_dim)
        self.planes = {}
        for part, width, (lines, numbers) in (
            ("keys", bits.keys, key_block),
            ("values", bits.values, (size, head_dim)),
        ):
            shape = (rows, heads, bits.blocks(capacity), lines)
            groups = groups_of(numbers, size)
            codes = like.new_empty((*shape, packed_bytes(numbers, width)), dtype=torch.uint8)
            scales = like.new_empty((*shape, groups, 2), dtype=torch.float16)
            self.planes |= {part: codes, f"{part} scales": scales}

    def new_exact(
        self, rows: int, heads: int, head_dim: int, like: Tensor, scaling: float, bits: Bits
    ) -> StreamingHeads:
        """An empty ring."""
        return StreamingHeads(
            rows, heads, bits.sink, bits.ring, head_dim, like, scaling, dense_prompt=False
        )

    @property
    def allocated_bytes(self) -> int:
        return super().allocated_bytes + self.exact.allocated_bytes

    @property
    def capacity(self) -> int:
        return self.tokens

    def grown(self, length: int) -> int:
        return whole_pages(super().grown(length))

    def resize(self, capacity: int) -> None:
        self.tokens, blocks = capacity, self.bits.blocks(capacity)
        for name, plane in self.planes.items():
            other = plane.new_empty((*plane.shape[:2], blocks, *plane.shape[3:]))
            kept = min(blocks, plane.shape[2])
            other[:, :, :kept] = plane[:, :, :kept]
            self.planes[name] = other

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return stored - self.bits.ring <= self._first_exact(length)

    def snapshot(self, row: int) -> list[Tensor]:
        return self.exact.snapshot(row)

    def restore(self, row: int, saved: list[Tensor]) -> None:
        self.exact.restore(row, saved)

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        if step.row is not None and new.q.shape[2] > 1:
            return self._add_several(new, step.row, step.starts[0])[None]
        slots = [self.exact.slot(start) for start in step.starts]
        self.exact.write(step.row, slots, {"keys": new.k, "values": new.v})
        first = 0 if step.row is None else step.row
        contexts = []
        for b, n in enumerate(step.lengths):
            keys, values = self._exact_tokens(first + b, n, self.bits.blocks(n - 1))
            done = self.bits.blocks(n)
            if done > self.bits.blocks(n - 1):
                packed = slice(self.bits.sink, self.bits.sink + self.bits.group)
                self._pack(first + b, done - 1, keys[:, packed], values[:, packed])
                keys, values = self._exact_tokens(first + b, n, done)
            contexts.append(self._attend(new.q[b], keys, values, first + b, done))
        return torch.stack(contexts)

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        first, end = self.bits.sink, self._first_exact(keys.shape[1])
        self._pack(row, 0, keys[:, first:end], values[:, first:end])
        self.exact.keep_last(row, 0, keys, values)

    def _first_exact(self, length: int) -> int:
        """The first token behind the blocks of a row with `length` tokens."""
        return self.bits.sink + self.bits.blocks(length) * self.bits.group

    def _exact_at(self, length: int, blocks: int) -> list[int]:
        """Positions of the exact tokens of a row of which so many blocks are packed."""
        sinks = range(min(self.bits.sink, length))
        return [*sinks, *range(self.bits.sink + blocks * self.bits.group, length)]

    def _exact_tokens(self, row: int, length: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Their keys and values `[H, C, D]`."""
        slots = [self.exact.slot(position) for position in self._exact_at(length, blocks)]
        planes = self.exact.planes
        return planes["keys"][row][:, slots], planes["values"][row][:, slots]

    def _add_several(self, new: NewTokens, row: int, start: int) -> Tensor:
        """As if token by token: each reads what was exact when it came. `[Q, T, D]`."""
        size, sink, end = self.bits.group, self.bits.sink, start + new.q.shape[2]
        before, done = self.bits.blocks(start), self.bits.blocks(end)
        keys, values = (
            torch.cat((past, fresh[0]), dim=1)
            for past, fresh in zip(
                self._exact_tokens(row, start, before), (new.k, new.v), strict=True
            )
        )
        packed = slice(sink, sink + (done - before) * size)
        self._pack(row, before, keys[:, packed], values[:, packed])
        self.exact.keep_last(row, start, new.k[0], new.v[0])
        device = keys.device
        at = torch.tensor([*self._exact_at(start, before), *range(start, end)], device=device)
        block = torch.arange(done, device=device).repeat_interleave(size)
        contexts = []
        for begin in range(start, end, _ROWS):
            asked = range(begin, min(begin + _ROWS, end))
            blocks = torch.tensor([self.bits.blocks(p + 1) for p in asked], device=device)[:, None]
            come = at <= torch.tensor([*asked], device=device)[:, None]
            near = come & ((at < sink) | (at >= sink + blocks * size))
            hidden = ~torch.cat((near, block < blocks), dim=1)
            q = new.q[0, :, begin - start : asked.stop - start]
            contexts.append(self._attend(q, keys, values, row, done, hidden))
        return torch.cat(contexts, dim=1)

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, row: int, blocks: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One softmax in fp32 over exact tokens and the first blocks of a row.

        Args:
            q: `[Q, T, D]`.
            keys, values: `[H, C, D]`, exact.
            hidden: `[T, C + blocks · N]`, what a query must not see.

        Returns:
            `[Q, T, D]`.
        """
        heads, exact = keys.shape[:2]
        grouped = (q.float() * self.scaling).unflatten(0, (heads, -1))  # [H, g, T, D]
        flat = grouped.flatten(1, 2)
        scores = torch.matmul(flat, keys.float().mT)
        if blocks:
            scores = torch.cat((scores, self._scores(flat, row, blocks)), dim=-1)
        if hidden is not None:
            split = scores.unflatten(1, grouped.shape[1:3])
            scores = split.masked_fill(hidden, -torch.inf).flatten(1, 2)
        weights = torch.softmax(scores, dim=-1)
        context = torch.matmul(weights[..., :exact], values.float())
        if blocks:
            codes, scales = (x.flatten(1, 2) for x in self._blocks("values", row, 0, blocks))
            far = value_sums(
                weights[..., exact:], codes, scales, self.head_dim, self.bits.values,
                self.bits.group,
            )  # fmt: skip
            context += far if self.bits.hadamard == "none" else turn(far)
        found: Tensor = context.unflatten(1, grouped.shape[1:3]).flatten(0, 1).to(q.dtype)
        return found

    def _scores(self, q: Tensor, row: int, blocks: int) -> Tensor:
        """Queries `[H, n, D]` fp32 against packed keys, `[H, n, blocks · N]`."""
        bits = self.bits
        if bits.kind == "unrotated":
            parts = [
                torch.matmul(q, self._rebuilt(row, first, min(first + _BLOCKS, blocks)).mT)
                for first in range(0, blocks, _BLOCKS)
            ]
            return torch.cat(parts, dim=-1)
        codes, scales = self._blocks("keys", row, 0, blocks)
        turned = to_stored(q, bits, self.order)
        if bits.axis == "channel":
            return channel_scores(turned, codes, scales[..., 0, :], bits.keys, bits.group)
        return token_scores(
            turned, codes.flatten(1, 2), scales.flatten(1, 2), bits.keys, bits.group
        )

    def _rebuilt(self, row: int, first: int, end: int) -> Tensor:
        """Rotated keys `[H, (end - first) · N, D]` fp32 of blocks that hold unrotated ones."""
        bits = self.bits
        codes, scales = self._blocks("keys", row, first, end)
        per_channel = bits.axis == "channel"
        width = bits.group if per_channel else self.head_dim
        stored = dequantise(codes, scales, width, bits.keys, bits.group)
        keys = from_stored((stored.mT if per_channel else stored).flatten(1, 2), bits, self.order)
        start = bits.sink + first * bits.group
        cos, sin = self.positions.tables(start, start + keys.shape[1])
        return rotate(keys, cos, sin)

    def _pack(self, row: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Packs rotated keys and values `[H, n · N, D]` as the blocks from `first` on."""
        bits = self.bits
        count = keys.shape[1] // bits.group
        if not count:
            return
        keys, values = keys.float(), values.float()
        if bits.kind == "unrotated":
            start = bits.sink + first * bits.group
            cos, sin = self.positions.tables(start, start + keys.shape[1])
            keys = rotate(keys, cos, -sin) / self.positions.rope.scale**2
        keys = to_stored(keys, bits, self.order).unflatten(1, (count, -1))  # [H, n, N, D]
        values = values if bits.hadamard == "none" else turn(values)
        for part, x, width, clip in (
            ("keys", keys.mT if bits.axis == "channel" else keys, bits.keys, bits.key_clip),
            ("values", values.unflatten(1, (count, -1)), bits.values, bits.value_clip),
        ):
            own = slice(first, first + count)
            for name, packed in zip(
                (part, f"{part} scales"), quantise(x, width, bits.group, clip), strict=True
            ):
                self._write_blocks(name, row, own, packed)

    def _blocks(self, part: str, row: int, first: int, end: int) -> Sequence[Tensor]:
        """Codes `[H, blocks, ...]` and their scales."""
        return [self._read_blocks(name, row, first, end) for name in (part, f"{part} scales")]

    def _read_blocks(self, name: str, row: int, first: int, end: int) -> Tensor:
        return self.planes[name][row, :, first:end]

    def _write_blocks(self, name: str, row: int, own: slice, packed: Tensor) -> None:
        self.planes[name][row, :, own] = packed


class PagedPacked(PackedHeads):
    """The ring per row, and planes `[pages, H, blocks of a page, ...]`.

    Values behind a Hadamard transform lie so in the ring as well: one softmax then sums up both,
    and its result is turned back.
    """

    exact: PagedRings

    def __init__(
        self, pages: Pages, heads: int, head_dim: int, like: Tensor, scaling: float, bits: Bits,
        positions: Positions, dense_prompt: bool,
    ) -> None:  # fmt: skip
        self.pages, self.turned = pages, bits.hadamard == "values"
        super().__init__(
            pages.count, heads, bits.sink + bits.window + PAGE, head_dim, like, scaling,
            replace(bits, hadamard="none"), None, positions, dense_prompt,
        )  # fmt: skip

    def new_exact(
        self, rows: int, heads: int, head_dim: int, like: Tensor, scaling: float, bits: Bits
    ) -> PagedRings:
        ring = PagedRings(
            self.pages.rows, heads, bits.sink, bits.ring, head_dim, like, scaling,
            dense_prompt=False,
        )  # fmt: skip
        ring.pages = self.pages
        return ring

    @staticmethod
    def possible(bits: Bits, head_dim: int) -> bool:
        """Whether a kernel reads such blocks."""
        read_as_stored = bits.kind == "rotated" and bits.axis == "channel"
        plain = bits.hadamard != "both" and bits.order is None
        return read_as_stored and plain and fits(head_dim, bits.keys, bits.values, bits.group)

    @property
    def page_bytes(self) -> int:
        """Of a page's blocks."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    @property
    def row_bytes(self) -> int:
        """Of a ring."""
        return self.exact.row_bytes

    @property
    def capacity(self) -> int:
        return (self.pages.count - 1) * PAGE

    def grow(self) -> None:
        """Takes as many pages and rows as there are now."""
        enlarge(self.planes, self.pages.count)
        self.exact.grow()

    def add(self, new: NewTokens, step: Step) -> Tensor:
        if not self.turned:
            return super().add(new, step)
        return turn(super().add(new._replace(v=turn(new.v)), step))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place) -> Tensor:
        """See :meth:`PagedHeads.step`."""
        bits, planes = self.bits, self.planes
        keys, values = self.exact.planes["keys"], self.exact.planes["values"]
        _, slots, _ = at.ring(bits.sink, bits.ring)
        asked = append(k, turn(v) if self.turned else v, cos, sin, keys, values, slots, q)
        assert asked is not None
        ring = Ring(keys, values, at.rows, bits.sink, bits.window)
        blocks = Blocks(
            planes["keys"], planes["keys scales"], planes["values"], planes["values scales"],
            at.table, bits.keys, bits.values, bits.key_clip, bits.value_clip,
        )  # fmt: skip
        pack_blocks(ring, blocks, at.lengths)
        context = packed_attention(asked, ring, blocks, at.lengths, self.scaling)
        return turn(context) if self.turned else context

    def _at(self, row: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Pages in which blocks of a row lie, and where there."""
        table = self.pages.table[row]
        block = torch.arange(first, end, device=table.device)
        each = PAGE // self.bits.group
        return table[block // each].long(), block % each

    def _read_blocks(self, name: str, row: int, first: int, end: int) -> Tensor:
        page, within = self._at(row, first, end)
        return self.planes[name].movedim(1, 2)[page, within].movedim(0, 1)

    def _write_blocks(self, name: str, row: int, own: slice, packed: Tensor) -> None:
        page, within = self._at(row, own.start, own.stop)
        self.planes[name].movedim(1, 2)[page, within] = packed.movedim(0, 1)


class PackedAttention(SplitAttention):
    """Grouped-query attention whose full heads are packed; the others are as in any split store."""

    def __init__(
        self, stages: GroupedQueryAttention, index: int, plan: Plan, positions: Positions
    ) -> None:
        rope = positions.rope
        super().__init__(stages, index, rope.inv_freq, rope.scale, plan)
        assert self.layer.bits is not None
        self.bits, self.positions = self.layer.bits, positions
        order = self.bits.order
        self.order = None
        if order is not None and self.full:
            own = [order[head] for head in self.full]
            self.order = torch.tensor(own, device=positions.like.device)

    def new_full_heads(self, rows: int, capacity: int) -> PackedHeads:
        layout, like = self.stages.layout, self.stages.qkv.weight
        return PackedHeads(
            rows, self.counts[0], capacity, layout.head_dim, like, layout.scaling, self.bits,
            self.order, self.positions, dense_prompt=self.prefill == "dense",
        )  # fmt: skip

    def new_paged_store(self, pages: Pages) -> PagedSplit | None:
        layout, like = self.stages.layout, self.stages.qkv.weight
        if self.budgets or not PagedPacked.possible(self.bits, layout.head_dim):
            return None
        full = PagedPacked(
            pages, self.counts[0], layout.head_dim, like, layout.scaling, self.bits,
            self.positions, dense_prompt=self.prefill == "dense",
        )  # fmt: skip
        return PagedSplit(full, self.new_paged_rings(pages))
