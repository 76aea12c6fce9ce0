"""Latents of MLA in few bits, in shared pages: packing a block, and a decode step over all of them.

Both run Triton on CUDA.
"""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.packed_attention import Ring
from kvtool.kernels.packed_latents import reference
from kvtool.kernels.packed_latents.reference import Blocks, fits

__all__ = ["Blocks", "fits", "pack_latents", "packed_latent_attention"]


def pack_latents(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
    """See :func:`kvtool.kernels.packed_latents.reference.pack_latents`."""
    run = reference.pack_latents
    if use_triton(ring.keys):
        from kvtool.kernels.packed_latents.triton import pack_latents as run
    run(ring, blocks, lengths)


def packed_latent_attention(
    q: Tensor, ring: Ring, blocks: Blocks, lengths: Tensor, scaling: float
) -> Tensor:
    """See :func:`kvtool.kernels.packed_latents.reference.packed_latent_attention`."""
    run = reference.packed_latent_attention
    if use_triton(q):
        from kvtool.kernels.packed_latents.triton import packed_latent_attention as run
    return run(q, ring, blocks, lengths, scaling)
