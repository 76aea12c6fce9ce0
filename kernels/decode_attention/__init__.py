"""One new query per row against cached keys and values.

:func:`paged_decode_attention` reads paged memory by lengths that lie on the device, and runs
Triton on CUDA. :func:`decode_attention` reads contiguous rows by lengths known to the host.
"""

from collections.abc import Sequence

from torch import Tensor

from kvtool.kernels.decode_attention import reference
from kvtool.kernels.decode_attention.reference import decode_attention
from kvtool.kernels.dispatch import use_triton

__all__ = ["decode_attention", "merge", "paged_decode_attention"]


def paged_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor | int,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.decode_attention.reference.paged_decode_attention`."""
    run = reference.paged_decode_attention
    if use_triton(q):
        from kvtool.kernels.decode_attention.triton import paged_decode_attention as run
    return run(q, keys, values, lengths, scaling, table, first, bias, out, sink_logits, scales)


def merge(parts: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """See :func:`kvtool.kernels.decode_attention.reference.merge`."""
    run = reference.merge
    if use_triton(parts[0]):
        from kvtool.kernels.decode_attention.merge_triton import merge as run
    return run(parts, masses)
