"""The same in one launch: a program per KV head, block of its rows and block of columns.

Rows are the query heads of a KV head in all sequences. A batched product of torch's wants them side
by side, which takes a copy before it and one behind it, or a copy of the weight per sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import (
    dependent_launch,
    dot,
    gdc_wait,
    lying_together,
    precision,
    processors,
)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.py`."""
    x, weight = lying_together(x), lying_together(weight)
    batch, queries, inner = x.shape
    heads, _, width = weight.shape
    group = queries // heads
    out = torch.empty((batch, queries, width), dtype=x.dtype, device=x.device)
    rows = batch * group
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    blocks_m, block_n = triton.cdiv(rows, block_m), 64
    while block_n > 16 and 2 * heads * blocks_m * triton.cdiv(width, block_n) < processors(
        x.device
    ):
        block_n //= 2
    if out.numel():
        _grouped_linear[(heads, triton.cdiv(width, block_n), blocks_m)](
            x, weight, bias, out, rows, group, width, *x.stride()[:2], *weight.stride()[:2],
            0 if bias is None else bias.stride(0), out.stride(0), INNER=inner,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, PRECISION=precision(x.dtype),
            num_warps=4, num_stages=4, **dependent_launch(x.device),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _grouped_linear(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, group, width,
    x_row, x_head, weight_head, weight_row, bias_head, out_row,
    INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_K)
    sequence, query = (member // group).to(tl.int64), head * group + member % group
    x_ptr += sequence[:, None] * x_row + query[:, None] * x_head + within
    weight_ptr += head.to(tl.int64) * weight_head + within[:, None] * weight_row + column
    there, used = (member < rows)[:, None], (column < width)[None, :]
    if PDL:
        gdc_wait()
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, INNER, BLOCK_K):
        left = within < INNER - at
        x = tl.load(x_ptr + at, there & left[None, :], 0.0)
        weight = tl.load(weight_ptr + at * weight_row, used & left[:, None], 0.0)
        y = dot(x, weight, y, PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + head * bias_head + column, column < width, 0.0).to(tl.float32)
    to = out_ptr + sequence[:, None] * out_row + query[:, None] * width + column
    tl.store(to, y.to(out_ptr.dtype.element_ty), there & used)
