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
    """See :func:`kvtool.kernels.rebuild_attention.reference.rebuild_decode_attention`."""
    run = reference.rebuild_decode_attention
    if use_triton(q):
        from kvtool.kernels.rebuild_attention.triton import rebuild_decode_attention as run
    return run(q, codes, decoder, values, cos, sin, lengths, scaling, table, first, mean)
