"""Planes that keep every token, most of them as integers of few bits (`kvtool/bits.py`).

The first tokens and the last are exact, in a ring. When `window` tokens have come behind N others,
these are packed as one block, from the exact numbers, and never again. Whatever the calls were that
brought the tokens, the same are packed after as many of them; in a call with several tokens, each
reads what would have been exact had it come alone.

What is stored as it is read is not rebuilt (`kernels/packed_attention`): keys behind RoPE, values,
and latents. Keys that are stored before RoPE are rebuilt and rotated a tile at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention, rotate
from kvtool.bits import Bits, Blocks, from_stored, to_stored, turn
from kvtool.codes import Positions
from kvtool.kernels.packed_attention import channel_scores, token_scores, value_sums
from kvtool.kernels.quantise import dequantise, groups_of, packed_bytes, quantise
from kvtool.plan import Plan
from kvtool.runtime.layers import Step
from kvtool.runtime.pages import Pages
from kvtool.runtime.split import DroppingHeads, NewTokens, SplitAttention, StreamingHeads
from kvtool.runtime.stores import whole_pages

_ROWS = 256  # queries whose scores are written out at once
_BLOCKS = 16  # whose keys are rebuilt at once


class PackedStore(DroppingHeads):
    """A ring of exact tokens, and planes `[B, H, blocks, ...]` of codes and of their scales.

    Attributes:
        exact: Its planes are what a token brings, in that order.
        bits: Which tokens are packed.
        tokens: That there is room for.
    """

    exact: StreamingHeads
    bits: Blocks
    dense_prompt: bool
    tokens: int

    def attend(
        self, q: Tensor, exact: Sequence[Tensor], row: int, blocks: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One softmax in fp32 over exact tokens and the first blocks of a row.

        Args:
            q: `[Q, T, D]`.
            exact: `[H, C, ·]` each.
            hidden: `[T, C + blocks · N]`, what a query must not see.

        Returns:
            `[Q, T, ·]`.
        """
        raise NotImplementedError  # pragma: no cover

    def pack(self, row: int, first: int, exact: Sequence[Tensor]) -> None:
        """Packs tokens `[H, n · N, ·]` as the blocks from `first` on."""
        raise NotImplementedError  # pragma: no cover

    def add_planes(self, part: str, bits: int, numbers: int, shape: tuple[int, ...]) -> None:
        """Planes of codes with so many bits, and of their scales, for rows of `numbers`."""
        groups, like = groups_of(numbers, self.bits.group), next(iter(self.exact.planes.values()))
        codes = like.new_empty((*shape, packed_bytes(numbers, bits)), dtype=torch.uint8)
        scales = like.new_empty((*shape, groups, 2), dtype=torch.float16)
        self.planes |= {part: codes, f"{part} scales": scales}

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

    def add_tokens(self, q: Tensor, new: Sequence[Tensor], step: Step) -> Tensor:
        """Stores new tokens `[B, H, T, ·]`; returns what queries `[B, Q, T, D]` read."""
        if step.row is not None and q.shape[2] > 1:
            return self._add_several(q, new, step.row, step.starts[0])[None]
        slots = [self.exact.slot(start) for start in step.starts]
        self.exact.write(step.row, slots, dict(zip(self.exact.planes, new, strict=True)))
        first = 0 if step.row is None else step.row
        contexts = []
        for b, n in enumerate(step.lengths):
            exact = self._exact_tokens(first + b, n, self.bits.blocks(n - 1))
            done = self.bits.blocks(n)
            if done > self.bits.blocks(n - 1):
                packed = slice(self.bits.sink, self.bits.sink + self.bits.group)
                self.pack(first + b, done - 1, [x[:, packed] for x in exact])
                exact = self._exact_tokens(first + b, n, done)
            contexts.append(self.attend(q[b], exact, first + b, done))
        return torch.stack(contexts)

    def end_prompt(self, row: int, *tokens: Tensor) -> None:
        own = slice(self.bits.sink, self._first_exact(tokens[0].shape[1]))
        self.pack(row, 0, [x[:, own] for x in tokens])
        self.exact.keep_last(row, 0, *tokens)

    def _first_exact(self, length: int) -> int:
        """The first token behind the blocks of a row with `length` tokens."""
        return self.bits.sink + self.bits.blocks(length) * self.bits.group

    def _exact_at(self, length: int, blocks: int) -> list[int]:
        """Positions of the exact tokens of a row of which so many blocks are packed."""
        sinks = range(min(self.bits.sink, length))
        return [*sinks, *range(self.bits.sink + blocks * self.bits.group, length)]

    def _exact_tokens(self, row: int, length: int, blocks: int) -> list[Tensor]:
        """What there is of them, `[H, C, ·]` each."""
        slots = [self.exact.slot(position) for position in self._exact_at(length, blocks)]
        return [plane[row][:, slots] for plane in self.exact.planes.values()]

    def _add_several(self, q: Tensor, new: Sequence[Tensor], row: int, start: int) -> Tensor:
        """As if token by token: each reads what was exact when it came. `[Q, T, ·]`."""
        size, sink, end = self.bits.group, self.bits.sink, start + q.shape[2]
        before, done = self.bits.blocks(start), self.bits.blocks(end)
        past = self._exact_tokens(row, start, before)
        exact = [torch.cat((old, own[0]), dim=1) for old, own in zip(past, new, strict=True)]
        packed = slice(sink, sink + (done - before) * size)
        self.pack(row, before, [x[:, packed] for x in exact])
        self.exact.keep_last(row, start, *(x[0] for x in new))
        device = q.device
        at = torch.tensor([*self._exact_at(start, before), *range(start, end)], device=device)
        block = torch.arange(done, device=device).repeat_interleave(size)
        contexts = []
        for begin in range(start, end, _ROWS):
            asked = range(begin, min(begin + _ROWS, end))
            blocks = torch.tensor([self.bits.blocks(p + 1) for p in asked], device=device)[:, None]
            come = at <= torch.tensor([*asked], device=device)[:, None]
            near = come & ((at < sink) | (at >= sink + blocks * size))
            hidden = ~torch.cat((near, block < blocks), dim=1)
            asking = q[0, :, begin - start : asked.stop - start]
            contexts.append(self.attend(asking, exact, row, done, hidden))
        return torch.cat(contexts, dim=1)

    def blocks_of(self, part: str, row: int, first: int, end: int) -> Sequence[Tensor]:
        """Codes `[H, blocks, ...]` and their scales."""
        return [self.planes[name][row, :, first:end] for name in (part, f"{part} scales")]

    def put_blocks(
        self, part: str, row: int, first: int, x: Tensor, bits: int, clip: float
    ) -> None:
        """Packs numbers `[H, n, lines, ·]` as the blocks from `first` on."""
        own = slice(first, first + x.shape[1])
        codes, scales = quantise(x, bits, self.bits.group, clip)
        self.planes[part][row, :, own] = codes
        self.planes[f"{part} scales"][row, :, own] = scales


class PackedHeads(PackedStore):
    """Heads that keep every token.

    A block has a row per channel with N numbers of keys whose scales are per channel, and else a
    row per token with D numbers.

    Args:
        order: `[H, D]`, the order of the channels of keys; None for their own.
        positions: RoPE in fp32.
    """

    bits: Bits

    def __init__(
        self, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor, scaling: float,
        bits: Bits, order: Tensor | None, positions: Positions, dense_prompt: bool,
    ) -> None:  # fmt: skip
        self.exact = StreamingHeads(
            rows, heads, bits.sink, bits.ring, head_dim, like, scaling, dense_prompt=False
        )
        self.bits, self.scaling, self.dense_prompt = bits, scaling, dense_prompt
        self.head_dim, self.order, self.positions = head_dim, order, positions
        self.tokens, self.planes = capacity, {}
        size, room = bits.group, (rows, heads, bits.blocks(capacity))
        lines, numbers = (head_dim, size) if bits.axis == "channel" else (size, head_dim)
        self.add_planes("keys", bits.keys, numbers, (*room, lines))
        self.add_planes("values", bits.values, head_dim, (*room, size))

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        return self.add_tokens(new.q, (new.k, new.v), step)

    def attend(
        self, q: Tensor, exact: Sequence[Tensor], row: int, blocks: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        keys, values = exact
        heads, near = keys.shape[:2]
        grouped = (q.float() * self.scaling).unflatten(0, (heads, -1))  # [H, g, T, D]
        flat = grouped.flatten(1, 2)
        scores = torch.matmul(flat, keys.float().mT)
        if blocks:
            scores = torch.cat((scores, self._scores(flat, row, blocks)), dim=-1)
        if hidden is not None:
            split = scores.unflatten(1, grouped.shape[1:3])
            scores = split.masked_fill(hidden, -torch.inf).flatten(1, 2)
        weights = torch.softmax(scores, dim=-1)
        context = torch.matmul(weights[..., :near], values.float())
        if blocks:
            codes, scales = (x.flatten(1, 2) for x in self.blocks_of("values", row, 0, blocks))
            far = value_sums(
                weights[..., near:], codes, scales, self.head_dim, self.bits.values,
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
        codes, scales = self.blocks_of("keys", row, 0, blocks)
        turned = to_stored(q, bits, self.order)
        if bits.axis == "channel":
            return channel_scores(turned, codes, scales[..., 0, :], bits.keys, bits.group)
        return token_scores(
            turned, codes.flatten(1, 2), scales.flatten(1, 2), bits.keys, bits.group
        )

    def _rebuilt(self, row: int, first: int, end: int) -> Tensor:
        """Rotated keys `[H, (end - first) · N, D]` fp32 of blocks that hold unrotated ones."""
        bits = self.bits
        codes, scales = self.blocks_of("keys", row, first, end)
        per_channel = bits.axis == "channel"
        width = bits.group if per_channel else self.head_dim
        stored = dequantise(codes, scales, width, bits.keys, bits.group)
        keys = from_stored((stored.mT if per_channel else stored).flatten(1, 2), bits, self.order)
        start = bits.sink + first * bits.group
        cos, sin = self.positions.tables(start, start + keys.shape[1])
        return rotate(keys, cos, sin)

    def pack(self, row: int, first: int, exact: Sequence[Tensor]) -> None:
        bits = self.bits
        keys, values = (x.float() for x in exact)
        count = keys.shape[1] // bits.group
        if not count:
            return
        if bits.kind == "unrotated":
            start = bits.sink + first * bits.group
            cos, sin = self.positions.tables(start, start + keys.shape[1])
            keys = rotate(keys, cos, -sin) / self.positions.rope.scale**2
        keys = to_stored(keys, bits, self.order).unflatten(1, (count, -1))  # [H, n, N, D]
        values = values if bits.hadamard == "none" else turn(values)
        keys = keys.mT if bits.axis == "channel" else keys
        self.put_blocks("keys", row, first, keys, bits.keys, bits.key_clip)
        values = values.unflatten(1, (count, -1))
        self.put_blocks("values", row, first, values, bits.values, bits.value_clip)


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

    def new_paged_store(self, pages: Pages) -> None:
        """None: packed planes are not in shared pages."""
