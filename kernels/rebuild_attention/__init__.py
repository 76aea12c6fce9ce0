"""One new query per row against keys that are rebuilt from codes and rotated when they are read."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.rebuild_attention import reference

__all__ = ["rebuild_decode_attention"]


def rebuild_decode_attention(
    q: Tensor,
    codes: Tensor,
    decoder: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.rebuild_attention.reference.rebuild_decode_attention`.

    Where an old assembler makes machine code of them, not all ranks have a kernel, see the README.
    """
    run = reference.rebuild_decode_attention
    if use_triton(q) and _assembles(q, codes.shape[-1]):
        from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention as run
    return run(q, codes, decoder, values, cos, sin, lengths, scaling, table, first, mean)


def _assembles(q: Tensor, rank: int) -> bool:
    """Whether the kernel of a rank can be trusted; by an old ptxas a rank of 200 came out wrong."""
    from kvtool.kernels.tiles import has_sound_assembler

    return rank <= 128 or rank % 64 == 0 or has_sound_assembler(q.device)
