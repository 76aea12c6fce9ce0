"""Latents in few bits in shared pages, in plain torch: the contract of a decode step over them.

Rings, blocks and pages are those of packed heads (`kernels/packed_attention/paged.py`), with one
head: its keys are a latent of r numbers and a rotated shared key of d_r, and its values are the
first r numbers of the keys. Each number has its own bits, and per block of N tokens a scale and a
minimum. Numbers of a latent with equal bits lie side by side, everywhere, and so do those of a
shared key.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.kernels.packed_attention.paged import PAGE, Ring, packed_blocks, ring_slots
from kvtool.kernels.quantise import dequantise, quantise

WIDEST = 512
"""Numbers of a latent, which a kernel sums up for all query heads at once."""


class Blocks(NamedTuple):
    """Packed tokens (`kernels/quantise`), by width.

    Attributes:
        codes: `[P, 1, 64 / N, n, ·]` uint8 of each width, a block's N tokens of a number packed
            side by side. Numbers of the latent lie in front of those of the shared key.
        scales: `[P, 1, 64 / N, n, 1, 2]` fp16 of each.
        bits: The widths.
        values: How many numbers of the latent have each.
        table: `[B, pages]` int32, in which pages a row's tokens lie.
    """

    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    bits: tuple[int, ...]
    values: tuple[int, ...]
    table: Tensor

    @property
    def size(self) -> int:
        """N."""
        return PAGE // self.codes[0].shape[2]

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of each width."""
        return tuple(codes.shape[3] for codes in self.codes)

    @property
    def places(self) -> tuple[list[range], list[range]]:
        """Where those of each width lie in the latent, and in the shared key behind it."""
        behind = [count - own for count, own in zip(self.counts, self.values, strict=True)]
        ends = list(accumulate((*self.values, *behind), initial=0))
        found = [range(*ends) for ends in pairwise(ends)]
        return found[: len(behind)], found[len(behind) :]

    @property
    def numbers(self) -> list[list[int]]:
        """The same of each width together."""
        return [[*own, *behind] for own, behind in zip(*self.places, strict=True)]

    def at(self, row: int, block: int) -> tuple[int, int]:
        """In which page a block lies, and where there."""
        each = PAGE // self.size
        return int(self.table[row, block // each]), block % each


def fits(rank: int, size: int) -> bool:
    """Whether there is a kernel for latents of r = `rank` numbers and blocks of N = `size`."""
    return size <= PAGE and rank <= WIDEST


def pack_latents(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
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
        page, within = blocks.at(b, done - 1)
        x = ring.keys[int(ring.rows[b]), 0, ring_slots(ring, own, size)].float().mT  # [R, N]
        for part, numbers in enumerate(blocks.numbers):
            codes, scales = quantise(x[numbers], blocks.bits[part], size)
            blocks.codes[part][page, 0, within] = codes
            blocks.scales[part][page, 0, within] = scales


def packed_latent_attention(
    q: Tensor, ring: Ring, blocks: Blocks, lengths: Tensor, scaling: float
) -> Tensor:
    """One absorbed query per row and head over everything the row keeps: one softmax over exact and
    packed tokens, of which the first r numbers are the values.

    Args:
        q: `[B, Q, r + d_r]`.
        lengths: `[B]` int32.

    Returns:
        `[B, Q, r]`; zeros of rows without a token.
    """
    size, rank = blocks.size, ring.values.shape[-1]
    out = q.new_zeros((*q.shape[:2], rank))
    for b, length in enumerate(lengths.tolist()):
        if not length:
            continue
        done = packed_blocks(length, ring, size)
        exact = [*range(min(ring.sink, length)), *range(ring.sink + done * size, length)]
        near = ring.keys[int(ring.rows[b]), 0, ring_slots(ring, exact, size)].float()
        far = near.new_empty((done, size, q.shape[-1]))
        for block in range(done):
            page, within = blocks.at(b, block)
            for part, numbers in enumerate(blocks.numbers):
                codes = blocks.codes[part][page, 0, within]
                scales = blocks.scales[part][page, 0, within]
                found = dequantise(codes, scales, size, blocks.bits[part], size)  # [n, N]
                far[block, :, numbers] = found.mT
        x = torch.cat((near, far.flatten(0, 1)))  # [S, R]
        weights = torch.softmax(scaling * q[b].float() @ x.T, dim=-1)
        out[b] = (weights @ x[:, :rank]).to(q.dtype)
    return out
