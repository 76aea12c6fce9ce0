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

    Triton runs where it was seen to be right on a GPU: as Triton 3.6 assembles it a rank of 200 was
    not, see the README.
    """
    run = reference.rebuild_decode_attention
    rank = codes.shape[-1]
    if use_triton(q) and (rank <= 128 or rank % 64 == 0):
        from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention as run
    return run(q, codes, decoder, values, cos, sin, lengths, scaling, table, first, mean)
