"""Thin factors of blocks in plain torch: the contract (GEAR, arXiv 2403.05527).

A block X [N, D] is nearly Uᵀ W with U [r, N] and W [r, D], and products with it are two thin ones:

    q Xᵀ ≈ (q Wᵀ) U,     p X ≈ (p Uᵀ) W.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 3
"""Of power iteration, as many as GEAR's code makes."""

_LARGEST = 65504.0  # of fp16


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of blocks, by power iteration on r vectors together.

    A sweep sets Uᵀ = X Wᵀ and Wᵀ = Xᵀ Uᵀ; in the last, both are orthonormal before X is applied.
    The start is drawn, but the same for every block: what is found depends on the block alone.

    Args:
        x: `[..., N, D]` fp32.
        rank: r.

    Returns:
        U `[..., r, N]` and W `[..., r, D]`, fp16.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(x.shape[-1], rank, generator=generator).to(x).expand(*x.shape[:-2], -1, -1)
    for _ in range(SWEEPS - 1):
        w = x.mT @ (x @ w)
    u = torch.linalg.qr(x @ torch.linalg.qr(w).Q).Q
    return u.mT.half(), (u.mT @ x).clamp(-_LARGEST, _LARGEST).half()


def low_rank_scores(q: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Queries against blocks.

    Args:
        q: `[H, n, D]` fp32.
        u: `[H, blocks, r, N]`, w: `[H, blocks, r, D]`, fp16.

    Returns:
        `[H, n, blocks · N]` fp32.
    """
    thin = torch.matmul(q, w.float().flatten(1, 2).mT).unflatten(-1, w.shape[1:3])
    tokens = u.float()
    scores: Tensor = thin.new_zeros((*thin.shape[:3], u.shape[-1]))  # [H, n, blocks, N]
    for i in range(u.shape[2]):  # products of r numbers are too small for a matrix product
        scores.addcmul_(thin[..., i, None], tokens[:, None, :, i])
    return scores.flatten(2)


def low_rank_sums(weights: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Tokens of blocks, summed with weights.

    Args:
        weights: `[H, n, blocks · N]` fp32.
        u: `[H, blocks, r, N]`, w: `[H, blocks, r, D]`, fp16.

    Returns:
        `[H, n, D]` fp32.
    """
    by_block = weights.unflatten(-1, (u.shape[1], u.shape[3])).transpose(1, 2)
    thin = torch.matmul(by_block, u.float().mT).transpose(1, 2)  # [H, n, blocks, r]
    sums: Tensor = torch.matmul(thin.flatten(2), w.float().flatten(1, 2))
    return sums
