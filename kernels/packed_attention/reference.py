"""Attention over packed keys and values in plain torch: the contract, and the CPU path.

A stored number is x̂ = m + s · code (`kernels/quantise`). With keys that share s and m per channel
within a block of tokens,

    q · k̂_t = Σ_c (q_c s_c) code_tc + q · m,

and with values that share them within groups of channels of a token,

    Σ_t p_t v̂_tc = Σ_t (p_t s_t) code_tc + p · m.

So queries and probabilities are scaled, of which there are few, and the codes are multiplied as
they are: a field of every byte after the other, as float, a tile of tokens at a time. No number of
the past is ever rebuilt, and no field put beside its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvtool.kernels.quantise import packed_bytes

TILE = 4096
"""Tokens whose codes are converted together: they stay in the cache of the processor."""


def fields(
    packed: Tensor, width: int, bits: int, group: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """The codes of `width` channels as numbers, in pieces which sum up to them.

    Args:
        packed: `[..., ·]` uint8.
        group: Channels that share a scale.

    Yields:
        Channels, in which group they are, and numbers `[..., channels]` fp32 to be added there. A
        piece is one field of all bytes, or what of it lies in one group. Codes of 3 bits are two
        such numbers, of either plane.
    """
    planes = [(packed, bits, 0)]
    if bits == 3:
        low = packed_bytes(width, 2)
        planes = [(packed[..., :low], 2, 0), (packed[..., low:], 1, 2)]
    for plane, each, worth in planes:
        size = plane.shape[-1]
        for index in range(8 // each):
            start, end = index * size, min(width, (index + 1) * size)
            numbers = _field(plane, index, each).float()
            if worth:
                numbers *= 2**worth
            while start < end:
                j = start // group
                last = min(end, (j + 1) * group)
                yield (
                    slice(start, last),
                    j,
                    numbers[..., start - index * size :][..., : last - start],
                )
                start = last


def _field(plane: Tensor, index: int, bits: int) -> Tensor:
    """The bits of every byte, counted from the lowest, uint8."""
    if bits == 8:
        return plane
    mask = 2**bits - 1
    places = (plane.shape[-1], plane.storage_offset(), *plane.stride()[:-1])
    if all(n % 4 == 0 for n in places):  # four bytes at once: torch shifts single ones slowly
        plane, mask = plane.view(torch.int32), mask * 0x01010101
    field = (plane >> (bits * index)).bitwise_and_(mask) if index else plane & mask
    return field.view(torch.uint8)


def channel_scores(q: Tensor, codes: Tensor, scales: Tensor, bits: int, tokens: int) -> Tensor:
    """Queries against keys whose scales are per channel and block.

    Args:
        q: `[H, n, D]` fp32.
        codes: `[H, blocks, D, ·]` uint8, a block's N = `tokens` packed side by side.
        scales: `[H, blocks, D, 2]` fp16: scale, minimum.

    Returns:
        `[H, n, blocks · N]` fp32, not scaled.
    """
    at_once = max(1, TILE // tokens)
    parts = []
    for some, own in zip(codes.split(at_once, 1), scales.split(at_once, 1), strict=True):
        s, m = own.float().unbind(dim=-1)  # [H, blocks, D]
        scaled = q[:, None] * s[:, :, None]
        scores = torch.matmul(m, q.mT)[..., None].repeat(1, 1, 1, tokens)  # [H, blocks, n, N]
        for at, _, numbers in fields(some, tokens, bits, tokens):
            scores[..., at] += torch.matmul(scaled, numbers)
        parts.append(scores.transpose(1, 2).flatten(2))
    return torch.cat(parts, dim=-1)


def token_scores(q: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """Queries against keys whose scales are per token, for each `group` channels of it.

    Args:
        q: `[H, n, D]` fp32.
        codes: `[H, S, ·]` uint8, the D channels of a token packed side by side.
        scales: `[H, S, groups, 2]` fp16.

    Returns:
        `[H, n, S]` fp32, not scaled.
    """
    parts = []
    for some, own in zip(codes.split(TILE, 1), scales.split(TILE, 1), strict=True):
        s, m = own.float().unbind(dim=-1)  # [H, S, groups]
        sums = torch.stack([piece.sum(dim=-1) for piece in q.split(group, dim=-1)], dim=-1)
        scores = torch.matmul(sums, m.mT)
        for at, j, numbers in fields(some, q.shape[-1], bits, group):
            scores += torch.matmul(q[..., at], numbers.mT) * s[:, None, :, j]
        parts.append(scores)
    return torch.cat(parts, dim=-1)


def value_sums(
    weights: Tensor, codes: Tensor, scales: Tensor, width: int, bits: int, group: int
) -> Tensor:
    """Values summed with weights, which need not sum to 1.

    Args:
        weights: `[H, n, S]` fp32.
        codes: `[H, S, ·]` uint8, the D = `width` channels of a token packed side by side.
        scales: `[H, S, groups, 2]` fp16, for each `group` channels.

    Returns:
        `[H, n, D]` fp32.
    """
    sums = weights.new_zeros((*weights.shape[:2], width))
    tiles = (weights.split(TILE, 2), codes.split(TILE, 1), scales.split(TILE, 1))
    for p, some, own in zip(*tiles, strict=True):
        s, m = own.float().unbind(dim=-1)  # [H, S, groups]
        scaled = [p * s[:, None, :, j] for j in range(s.shape[-1])]
        shifts = torch.matmul(p, m)
        sums += shifts.repeat_interleave(group, dim=-1)[..., :width]
        for at, j, numbers in fields(some, width, bits, group):
            sums[..., at] += torch.matmul(scaled[j], numbers)
    return sums


def channel_sums(weights: Tensor, codes: Tensor, scales: Tensor, bits: int, tokens: int) -> Tensor:
    """Values whose scales are per channel and block, summed with weights.

    With p of the tokens of a block, Σ_t p_t v̂_tc = s_c Σ_t p_t code_tc + m_c Σ_t p_t.

    Args:
        weights: `[H, n, blocks · N]` fp32.
        codes: `[H, blocks, D, ·]` uint8, a block's N = `tokens` packed side by side.
        scales: `[H, blocks, D, 2]` fp16: scale, minimum.

    Returns:
        `[H, n, D]` fp32.
    """
    at_once = max(1, TILE // tokens)
    sums = weights.new_zeros((*weights.shape[:2], codes.shape[2]))
    tiles = (weights.split(at_once * tokens, 2), codes.split(at_once, 1), scales.split(at_once, 1))
    for p, some, own in zip(*tiles, strict=True):
        s, m = own.float().unbind(dim=-1)  # [H, blocks, D]
        by_block = p.unflatten(2, (-1, tokens)).transpose(1, 2)  # [H, blocks, n, N]
        for at, _, numbers in fields(some, tokens, bits, tokens):  # [H, blocks, D, tokens]
            sums += (torch.matmul(by_block[..., at], numbers.mT) * s[:, :, None]).sum(dim=1)
        sums += torch.matmul(by_block.sum(dim=-1).mT, m)
    return sums
