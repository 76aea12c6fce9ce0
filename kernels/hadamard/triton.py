"""The transform in Triton: a tile of rows per program, all stages in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.hadamard.reference import stages

_TILE = 4096  # numbers per program: 32 per thread


def hadamard(x: Tensor) -> Tensor:
    """See `reference.py`; fp64 is added up in fp32."""
    width = x.shape[-1]
    count = stages(width)
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // width
    block = _TILE // width
    if rows:
        _hadamard[(triton.cdiv(rows, block),)](
            x, out, rows, width**-0.5, WIDTH=width, STAGES=count, BLOCK=block, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _hadamard(
    x_ptr,
    out_ptr,
    rows,
    scale,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)
    there = (row < rows)[:, None]
    x = tl.load(x_ptr + at, there, 0.0).to(tl.float32)
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, (BLOCK, WIDTH // 2, 2)))
        turned = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
        x = tl.reshape(turned, (BLOCK, WIDTH))
    tl.store(out_ptr + at, (x * scale).to(out_ptr.dtype.element_ty), there)
