"""The same in one launch, for few rows: each is in registers once, a vector load per thread."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.rms_norm import reference
from kvtool.kernels.tiles import (
    dependent_launch,
    gdc_wait,
    load_columns,
    lying_together,
    store_columns,
)

_WIDEST = 16384
"""Numbers of a row that fit the registers of a program."""
_MOST = 2**24
"""Numbers that are few: with more, torch's kernel is as good."""
_TILE = 1024  # numbers of a program that takes several rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.py`."""
    if x.shape[-1] > _WIDEST or x.numel() > _MOST:
        return reference.rms_norm(x, weight, eps)
    return _launch(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.py`."""
    if x.shape[-1] > _WIDEST or x.numel() > _MOST:
        return reference.add_rms_norm(x, other, weight, eps)
    return _launch(x, other, weight, eps)


def _launch(x: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    x, inner, outer_stride, inner_stride = _even_rows(lying_together(x))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    both = x if other is None else torch.empty_like(out)
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    if rows:
        together = max(1, _TILE // block)
        _rms_norm[(triton.cdiv(rows, together),)](
            x, None if other is None else other.contiguous(), weight, both, out,
            rows, inner, outer_stride, inner_stride, eps,
            WIDTH=width, BLOCK=block, ROWS=together, ADDED=other is not None,
            num_warps=min(16, max(1, together * block // 256)),
            **dependent_launch(x.device),
            enable_fp_fusion=True,
        )  # fmt: skip
    return both, out


def _even_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Row r begins at `r // inner * outer_stride + r % inner * inner_stride`.

    Such are the heads of a projection; of anything else a copy is made.

    Returns:
        `x` or the copy, and these three.
    """
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        elif size > 1:
            axes.append((size, stride))
    if len(axes) > 2:
        return x.contiguous(), 1, x.shape[-1], 0
    if len(axes) < 2:
        return x, 1, axes[0][1] if axes else 0, 0
    return x, axes[1][0], axes[0][1], axes[1][1]


@triton.jit
def _rms_norm(
    x_ptr, other_ptr, weight_ptr, sum_ptr, out_ptr,
    rows, inner, outer_stride, inner_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < rows
    weight = tl.load(weight_ptr + column, column < WIDTH, 0.0).to(tl.float32)
    if PDL:  # what was launched before this may still be at work
        gdc_wait()
    starts = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x = load_columns(x_ptr, starts, column, there, WIDTH, WIDTH == BLOCK)
    at = row.to(tl.int64) * WIDTH
    if ADDED:
        other = load_columns(other_ptr, at, column, there, WIDTH, WIDTH == BLOCK)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        store_columns(sum_ptr, at, column, there, WIDTH, x)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    y = x * scale[:, None] * weight[None, :]
    store_columns(out_ptr, at, column, there, WIDTH, y.to(out_ptr.dtype.element_ty))
