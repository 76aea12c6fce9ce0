"""Thin factors of blocks in plain torch: the contract (GEAR, arXiv 2403.05527).

A block X [N, D] is nearly U Wᵀ with U [N, r] and W [D, r], and products with it are two thin ones:

    q Xᵀ ≈ (q W) Uᵀ,     p X ≈ (p U) Wᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 3
"""Of power iteration, as many as GEAR's code makes."""


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of blocks, by power iteration on r vectors together.

    A sweep sets U = X W and W = Xᵀ U; in the last, both are orthonormal before they are multiplied.
    The start is drawn, but the same for every block: what is found depends on the block alone.

    Args:
        x: `[..., N, D]` fp32.
        rank: r.

    Returns:
        U `[..., N, r]` and W `[..., D, r]`, fp16.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(x.shape[-1], rank, generator=generator).to(x).expand(*x.shape[:-2], -1, -1)
    for _ in range(SWEEPS - 1):
        w = x.mT @ (x @ w)
    u = torch.linalg.qr(x @ torch.linalg.qr(w).Q).Q
    return u.half(), (x.mT @ u).half()


def low_rank_scores(q: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Queries against blocks.

    Args:
        q: `[H, n, D]` fp32.
        u: `[H, blocks, N, r]`, w: `[H, blocks, D, r]`, fp16.

    Returns:
        `[H, n, blocks · N]` fp32.
    """
    thin = torch.matmul(q[:, None], w.float())  # [H, blocks, n, r]
    return torch.matmul(thin, u.float().mT).transpose(1, 2).flatten(2)


def low_rank_sums(weights: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Tokens of blocks, summed with weights.

    Args:
        weights: `[H, n, blocks · N]` fp32.
        u: `[H, blocks, N, r]`, w: `[H, blocks, D, r]`, fp16.

    Returns:
        `[H, n, D]` fp32.
    """
    by_block = weights.unflatten(-1, u.shape[1:3]).transpose(1, 2)  # [H, blocks, n, N]
    thin = torch.matmul(by_block, u.float())  # [H, blocks, n, r]
    sums: Tensor = torch.matmul(thin, w.float().mT).sum(dim=1)
    return sums
