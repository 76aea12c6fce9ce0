"""Sparse tokens in plain torch: the contract (Mustafar, arXiv 2505.22913).

Of the D numbers of a token the c of largest magnitude are kept as they are, and the others are 0.
Of equal ones the first are kept, so that every token has exactly c: bytes are known beforehand,
and a token is found without an offset. A bitmap of D bits says which they are: bit j of byte i is
channel 8 i + j, and as many numbers lie before a channel's own as bits before its own are set.

Mustafar keeps what reaches the magnitude of the (sD)-th smallest: one number more, and all of equal
ones; and it fills up with zeros, to a multiple of 8 in every 64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4096
"""Tokens that are dense at once while they are read."""

_LARGEST = 65504.0  # of fp16


def bitmap_bytes(width: int) -> int:
    """Of a token's bitmap."""
    return -(-width // 8)


def sparse_bytes(width: int, kept: int) -> int:
    """Of a token of `width` channels."""
    return bitmap_bytes(width) + 2 * kept


def compress(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Keeps the largest numbers of each token.

    Args:
        x: `[..., D]`, any float dtype. What fp16 does not hold is stored as ±65504.
        kept: c, 1 to D.

    Returns:
        Bitmap, uint8 `[..., ⌈D / 8⌉]`; numbers, fp16 `[..., c]`, in the order of their channels.
    """
    ranked = x.abs().argsort(dim=-1, descending=True, stable=True)
    channels = ranked[..., :kept].sort(dim=-1).values
    mask = torch.zeros_like(x, dtype=torch.uint8).scatter_(-1, channels, 1)
    mask = F.pad(mask, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bitmap = (mask << _places(x)).sum(dim=-1, dtype=torch.uint8)
    return bitmap, x.gather(-1, channels).float().clamp(-_LARGEST, _LARGEST).half()


def decompress(bitmap: Tensor, numbers: Tensor, width: int) -> Tensor:
    """What :func:`compress` keeps of D = `width` channels, fp32 `[..., D]`."""
    mask = ((bitmap[..., None] >> _places(bitmap)) & 1).bool().flatten(-2)[..., :width]
    dense = torch.zeros(mask.shape, device=mask.device)
    return dense.masked_scatter_(mask, numbers.float())


def sparse_sums(weights: Tensor, bitmap: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Tokens summed with weights, a tile of them dense at a time.

    Args:
        weights: `[H, n, S]` fp32.
        bitmap: `[H, S, ⌈D / 8⌉]` uint8.
        numbers: `[H, S, c]` fp16.
        width: D.

    Returns:
        `[H, n, D]` fp32.
    """
    sums = weights.new_zeros((*weights.shape[:2], width))
    tiles = (weights.split(TILE, 2), bitmap.split(TILE, 1), numbers.split(TILE, 1))
    for p, where, some in zip(*tiles, strict=True):
        sums += torch.matmul(p, decompress(where, some, width))
    return sums


def _places(like: Tensor) -> Tensor:
    """Of the bits of a byte."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)
