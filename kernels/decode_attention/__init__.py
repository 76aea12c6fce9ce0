"""One new query per row against cached keys and values.

:func:`paged_decode_attention` reads paged memory by lengths that lie on the device, and runs
Triton on CUDA. :func:`decode_attention` reads contiguous rows by lengths known to the host, and
:func:`decode_attention_e4m3` one in fp8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.kernels.decode_attention import reference
from kvtool.kernels.decode_attention.e4m3 import decode_attention_e4m3, widen
from kvtool.kernels.decode_attention.reference import decode_attention
from kvtool.kernels.dispatch import use_triton

__all__ = [
    "decode_attention",
    "decode_attention_e4m3",
    "merge",
    "paged_decode_attention",
    "reads_e4m3",
    "widen",
]


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


def reads_e4m3(device: torch.device) -> bool:
    """Whether Triton's kernels know the type on a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def merge(parts: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """See :func:`kvtool.kernels.decode_attention.reference.merge`."""
    run = reference.merge
    if use_triton(parts[0]):
        from kvtool.kernels.decode_attention.merge_triton import merge as run
    return run(parts, masses)
