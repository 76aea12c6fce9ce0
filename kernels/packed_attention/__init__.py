"""Attention that reads packed integers: scales are folded into queries and probabilities.

What ends in `scores` and `sums` reads the blocks of one row in plain torch. :func:`pack_blocks` and
:func:`packed_attention` are a decode step of many rows, and run Triton on CUDA; the second runs C
on a processor.
"""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.packed_attention import native, paged
from kvtool.kernels.packed_attention.native import fits_sizes
from kvtool.kernels.packed_attention.paged import Blocks, Ring, fits
from kvtool.kernels.packed_attention.reference import (
    channel_scores,
    channel_sums,
    token_scores,
    value_sums,
)

__all__ = [
    "Blocks",
    "Ring",
    "channel_scores",
    "channel_sums",
    "fits",
    "fits_sizes",
    "pack_blocks",
    "packed_attention",
    "token_scores",
    "value_sums",
]


def pack_blocks(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
    """Packs what has become a block with the newest token of each row; see `paged.py`."""
    run = paged.pack_blocks
    if use_triton(ring.keys):
        from kvtool.kernels.packed_attention.pack_triton import pack_blocks as run
    run(ring, blocks, lengths)


def packed_attention(
    q: Tensor,
    ring: Ring,
    blocks: Blocks,
    lengths: Tensor,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """One query per row over all that it keeps; see `paged.py`."""
    run = paged.packed_attention
    if use_triton(q):
        from kvtool.kernels.packed_attention.triton import packed_attention as run
    elif native.fits(q, ring, blocks, sink_logits):
        run = native.packed_attention
    return run(q, ring, blocks, lengths, scaling, sink_logits)
