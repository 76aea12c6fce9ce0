"""Attention over packed keys and values in plain torch: the contract, and the CPU path.

A stored number is x̂ = m + s · code (`kernels/quantise`). With keys that share s and m per channel
within a block of tokens,

    q · k̂_t = Σ_c (q_c s_c) code_tc + q · m,

and with values that share them within groups of channels of a token,

    Σ_t p_t v̂_tc = Σ_t (p_t s_t) code_tc + p · m.

So queries and probabilities are scaled, of which there are few, and the codes are multiplied as
they are. They are converted to float a tile of tokens at a time; no number of the past is ever
rebuilt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.kernels.quantise import unpack

TILE = 2048
"""Tokens whose codes are converted together: they stay in the cache of the processor."""


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
        numbers = unpack(some, tokens, bits).float()  # [H, blocks, D, N]
        scores = torch.matmul(q[:, None] * s[:, :, None], numbers)
        scores += torch.matmul(m, q.mT)[..., None]  # [H, blocks, n, 1]
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
        numbers = unpack(some, q.shape[-1], bits).float()  # [H, S, D]
        scores = q.new_zeros((*q.shape[:2], some.shape[1]))
        for j, piece in enumerate(q.split(group, dim=-1)):
            channels = slice(j * group, j * group + piece.shape[-1])
            scores += torch.matmul(piece, numbers[..., channels].mT) * s[:, None, :, j]
            scores += piece.sum(dim=-1, keepdim=True) * m[:, None, :, j]
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
        numbers = unpack(some, width, bits).float()  # [H, S, D]
        for j, piece in enumerate(sums.split(group, dim=-1)):
            channels = slice(j * group, j * group + piece.shape[-1])
            piece += torch.matmul(p * s[:, None, :, j], numbers[..., channels])
            piece += torch.matmul(p, m[..., j, None])
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
        numbers = unpack(some, tokens, bits).float()  # [H, blocks, D, N]
        by_block = p.unflatten(2, (-1, tokens)).transpose(1, 2)  # [H, blocks, n, N]
        sums += (torch.matmul(by_block, numbers.mT) * s[:, :, None]).sum(dim=1)
        sums += torch.matmul(by_block.sum(dim=-1).mT, m)
    return sums
