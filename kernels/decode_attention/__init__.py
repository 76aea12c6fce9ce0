"""One new query per row against cached keys and values.

:func:`paged_decode_attention` reads paged memory by lengths that lie on the device, and runs
Triton on CUDA. :func:`decode_attention` reads contiguous rows by lengths known to the host,
:func:`decode_rows` such that lie apart, and :func:`decode_attention_e4m3` one in fp8: they run C on
a processor, which reads any runs of tokens (:func:`decode_runs`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.kernels.decode_attention import e4m3, reference
from kvtool.kernels.decode_attention.e4m3 import widen
from kvtool.kernels.decode_attention.native import Run, decode_runs, fits
from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.native import learns

__all__ = [
    "Run",
    "decode_attention",
    "decode_attention_e4m3",
    "decode_rows",
    "decode_runs",
    "fits",
    "merge",
    "paged_decode_attention",
    "reads_e4m3",
    "widen",
]


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """See :func:`kvtool.kernels.decode_attention.reference.decode_attention`."""
    if not fits(q, keys, values) or learns(sink_logits):
        return reference.decode_attention(q, keys, values, lengths, scaling, sink_logits)
    read = [[Run(k, v, n)] for k, v, n in zip(keys, values, lengths, strict=True)]
    return decode_runs(q, read, keys.shape[1], scaling, sink_logits)[0]


def decode_rows(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[int],
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The same with a tensor `[1, H, ·, D]` for each row's keys and values."""
    alike = zip(keys, values, strict=True)
    if all(fits(q, k, v) for k, v in alike) and not learns(sink_logits):
        read = [[Run(k[0], v[0], n)] for k, v, n in zip(keys, values, lengths, strict=True)]
        return decode_runs(q, read, keys[0].shape[1], scaling, sink_logits)[0]
    rows = zip(q.split(1), keys, values, lengths, strict=True)
    contract = reference.decode_attention
    return torch.cat([contract(x, k, v, [n], scaling, sink_logits) for x, k, v, n in rows])


def decode_attention_e4m3(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    scales: tuple[Tensor, Tensor],
    sink_logits: Tensor | None = None,
    exact: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See :func:`kvtool.kernels.decode_attention.e4m3.decode_attention_e4m3`."""
    reads = fits(q, keys, values, e4m3=True) and (exact is None or fits(q, *exact))
    if not reads or learns(sink_logits, *scales):
        return e4m3.decode_attention_e4m3(q, keys, values, scaling, scales, sink_logits, exact)
    own = scales[0].float().contiguous(), scales[1].float().contiguous()
    runs = [Run(keys, values, keys.shape[1], scales=own)]
    if exact is not None:
        runs.append(Run(*exact, exact[0].shape[1]))
    return decode_runs(q[None], [runs], keys.shape[0], scaling, sink_logits)[0][0]


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
    rings: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.decode_attention.reference.paged_decode_attention`."""
    run = reference.paged_decode_attention
    if use_triton(q):
        from kvtool.kernels.decode_attention.triton import paged_decode_attention as run
    return run(
        q, keys, values, lengths, scaling, table, first, bias, out, sink_logits, scales, rings
    )  # fmt: skip


def reads_e4m3(device: torch.device) -> bool:
    """Whether Triton's kernels know the type on a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def merge(parts: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """See :func:`kvtool.kernels.decode_attention.reference.merge`."""
    run = reference.merge
    if use_triton(parts[0]):
        from kvtool.kernels.decode_attention.merge_triton import merge as run
    return run(parts, masses)
