"""The same in one launch: a piece of a row per program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import dependent_launch, gdc_wait

_BLOCK = 1024  # numbers per program: a vector load of each half per thread


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.py`."""
    width = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    rows, blocks = out.numel() // max(1, width), triton.cdiv(width, _BLOCK)
    if rows:
        _swiglu[(rows * blocks,)](
            gate_up, out, width, blocks, BLOCK=_BLOCK, num_warps=4,
            **dependent_launch(out.device),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, width, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PDL:
        gdc_wait()
    gate_up_ptr += row * 2 * width
    gate = tl.load(gate_up_ptr + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + column, inside, 0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), inside)
