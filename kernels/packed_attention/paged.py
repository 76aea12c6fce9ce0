"""Packed heads in pages, in plain torch: the contract of what a decode step does with them.

A row keeps its first `sink` tokens and its last ones exactly, in a ring; all between them lie in
blocks of N tokens, packed in the row's pages. Token t >= sink has the offset o = t - sink: in the
ring it lies at sink + o mod (window + N), and its block is number o // N. A page that rows share
holds the 64 / N blocks of 64 tokens; one that is a row's own may hold any number of them. A row of
n tokens has max(0, n - sink - window) // N blocks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.kernels.hadamard import turn
from kvtool.kernels.quantise import dequantise, quantise
from kvtool.kernels.sink_logits import softmax

PAGE = 64
"""Tokens of a page."""

WIDEST = 512
"""Numbers of a head, whose sums a kernel keeps in registers."""


class Ring(NamedTuple):
    """Exact tokens.

    Attributes:
        keys, values: `[R, H, sink + window + N, D]`; keys after RoPE. Values may be the first
            numbers of the keys.
        rows: `[B]`, which of the R rings is a row's.
        sink, window: Tokens that stay exact: the first, and at least so many of the last.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    sink: int
    window: int


class Blocks(NamedTuple):
    """Packed tokens (`kernels/quantise`): keys with scales per channel, values with one per token.

    Attributes:
        keys: `[P, H, b, D, ·]` uint8 with b blocks of a page, a block's N tokens of a channel
            packed side by side. Triton's kernels take pages of 64 / N blocks.
        key_scales: `[P, H, b, D, 1, 2]` fp16.
        values: `[P, H, b, N, ·]` uint8, the D channels of a token packed side by side.
        value_scales: `[P, H, b, N, groups, 2]` fp16, for each N channels.
        table: `[B, pages]` int32, in which pages a row's tokens lie.
        key_bits, value_bits: Of a number.
        key_clip, value_clip: Share of a range that codes are spread over.
        turned: Whether values are stored behind a Hadamard transform, which those of the ring are
            not. Triton's kernels take none: there both are (`runtime/packed_attention.py`).
    """

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor
    table: Tensor
    key_bits: int
    value_bits: int
    key_clip: float = 1.0
    value_clip: float = 1.0
    turned: bool = False

    @property
    def size(self) -> int:
        """N."""
        return self.values.shape[3]

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As kernels address them: without gaps."""
        planes = self.keys, self.key_scales, self.values, self.value_scales
        assert all(plane.is_contiguous() for plane in planes)
        return planes

    def at(self, row: int, block: int) -> tuple[int, int]:
        """In which page a block lies, and where there."""
        each = self.keys.shape[2]
        return int(self.table[row, block // each]), block % each


def pieces_of(width: int, bits: int, group: int) -> list[range]:
    """In what pieces a kernel takes `width` numbers of a line: each in one field of the bytes, and
    in one group.
    """
    field = width // (4 if bits == 3 else 8 // bits)
    borders = {*range(0, width, field), *range(0, width, group), width}
    return [range(*ends) for ends in pairwise(sorted(borders))]


def fits(width: int, key_bits: int, value_bits: int, size: int) -> bool:
    """Whether there is a kernel for heads of this size and blocks of N = `size` tokens."""
    run = size * (2 if key_bits == 3 else key_bits) // 8
    return size <= PAGE and run >= 16 and width % 8 == 0 and width <= WIDEST


def packed_blocks(length: int, ring: Ring, size: int) -> int:
    """Blocks of a row with so many tokens."""
    return max(0, length - ring.sink - ring.window) // size


def pack_blocks(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
    """Packs a block of every row whose newest token has made one more complete.

    Args:
        lengths: `[B]` int32, tokens with the newest one, which lies in the ring.
    """
    size = blocks.size
    for b, length in enumerate(lengths.tolist()):
        done = packed_blocks(length, ring, size)
        if done == packed_blocks(length - 1, ring, size):
            continue
        own = range(ring.sink + (done - 1) * size, ring.sink + done * size)
        slots = ring_slots(ring, own, size)
        row = int(ring.rows[b])
        page, within = blocks.at(b, done - 1)
        keys, values = (x[row][:, slots].float() for x in (ring.keys, ring.values))  # [H, N, D]
        values = turn(values) if blocks.turned else values
        codes, scales = quantise(keys.mT, blocks.key_bits, size, blocks.key_clip)
        blocks.keys[page, :, within], blocks.key_scales[page, :, within] = codes, scales
        codes, scales = quantise(values, blocks.value_bits, size, blocks.value_clip)
        blocks.values[page, :, within], blocks.value_scales[page, :, within] = codes, scales


def packed_attention(
    q: Tensor,
    ring: Ring,
    blocks: Blocks,
    lengths: Tensor,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """One query per row over everything it keeps: one softmax over exact and packed tokens.

    Args:
        q: `[B, Q, D]` after RoPE; query heads lie by KV head.
        lengths: `[B]` int32.
        sink_logits: `[Q]`, a logit of each head that joins the softmax (`kernels/sink_logits`).

    Returns:
        `[B, Q, D]`; zeros of rows without a token.
    """
    heads, width, size = ring.keys.shape[1], q.shape[-1], blocks.size
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        done = packed_blocks(length, ring, size)
        exact = [*range(min(ring.sink, length)), *range(ring.sink + done * size, length)]
        slots, row = ring_slots(ring, exact, size), int(ring.rows[b])
        keys = [ring.keys[row][:, slots].float()]
        values = [ring.values[row][:, slots].float()]
        for block in range(done):
            page, within = blocks.at(b, block)
            codes, scales = blocks.keys[page, :, within], blocks.key_scales[page, :, within]
            keys.append(dequantise(codes, scales, size, blocks.key_bits, size).mT)
            codes, scales = blocks.values[page, :, within], blocks.value_scales[page, :, within]
            read = dequantise(codes, scales, width, blocks.value_bits, size)
            values.append(turn(read) if blocks.turned else read)
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)  # [H, n, D]
        if length:
            grouped = q[b].float().unflatten(0, (heads, -1)) * scaling
            weights = softmax(torch.matmul(grouped, k.mT), sink_logits)
            out[b] = torch.matmul(weights, v).flatten(0, 1).to(q.dtype)
    return out


def ring_slots(ring: Ring, positions: range | list[int], size: int) -> list[int]:
    """Where tokens lie in the ring."""
    room = ring.window + size
    return [p if p < ring.sink else ring.sink + (p - ring.sink) % room for p in positions]
