"""Merges parts in one launch: a program per row and query head."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import dependent_launch, gdc_wait


def merge(parts: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """See `reference.py`."""
    rows, heads, width = parts[0].shape
    out = torch.empty((rows, heads, width), dtype=parts[0].dtype, device=parts[0].device)
    if out.numel():
        _merge_parts[(rows * heads,)](
            tuple(parts), *zip(*(x.stride() for x in parts), strict=True),
            tuple(masses), *zip(*(x.stride() for x in masses), strict=True),
            out, heads, COUNT=len(parts), WIDTH=width, BLOCK=triton.next_power_of_2(width),
            num_warps=1, **dependent_launch(out.device),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _merge_parts(
    parts, part_rows, part_heads, part_columns, masses, mass_rows, mass_heads, out, heads,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    top, whole, total = -float("inf"), 0.0, tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(COUNT):
        mass = tl.load(masses[i] + row * mass_rows[i] + head * mass_heads[i]).to(tl.float32)
        at = parts[i] + row * part_rows[i] + head * part_heads[i]
        part = tl.load(at + column * part_columns[i], column < WIDTH, 0.0).to(tl.float32)
        new_top = tl.maximum(top, mass)
        # Parts without any token come first: -inf - -inf would be NaN.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        share, shrink = tl.exp(mass - safe_top), tl.exp(top - safe_top)
        total = total * shrink + part * share
        whole = whole * shrink + share
        top = new_top
    at = out + tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(at, (total / whole).to(out.dtype.element_ty), column < WIDTH)
