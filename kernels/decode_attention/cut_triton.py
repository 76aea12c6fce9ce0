"""How the work of attention over stored tokens is shared, and its parts put together.

As in LeanAttention (arXiv 2405.10480): the tokens of all rows and KV heads are cut into items of
about the same size, as many as keep the device busy. The first stage, which every kernel has of its
own, gives each item a softmax of its own; the second, here, merges the items of a row and head by
their log-sum-exp. Both derive the same cut from the lengths on the device. So one launch fits any
lengths, and can be recorded in a CUDA graph.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import gdc_wait, has_dependent_launch, load_columns, processors

_LOG2_E = tl.constexpr(math.log2(math.e))


class Config(NamedTuple):
    """How the work is cut and run.

    Attributes:
        block_n: Tokens of a tile.
        least: Tiles of an item at least: fewer would not pay for its part in the merge.
        items: Work items to aim at, per multiprocessor.
        warps, stages: Of an item's program. Two of the stages go to finding the page.
        heads: Query heads in a program's products, where they are not to follow the group: more
            are several programs, fewer are filled up with zeros (wgmma takes 64 rows).
        tokens_first: Whether tokens and channels are the rows of products, and heads the columns,
            of which 8 are enough.
    """

    block_n: int
    least: int
    items: int
    warps: int
    stages: int
    heads: int | None = None
    tokens_first: bool = False


@triton.jit
def _cut(
    lengths, stride_row, stride_head, rows, heads, first_tile, items,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Per row and head `[SLOTS]`: its tokens, tiles and items, and the items up to its last."""
    slot = tl.arange(0, SLOTS)
    row, head = slot // heads, slot % heads
    tokens = tl.load(
        lengths + row * stride_row + head * stride_head, mask=slot < rows * heads, other=0
    )
    tiles = tl.maximum(tl.cdiv(tokens, BLOCK_N) - first_tile, 0)
    shared = tl.maximum(items - rows * heads, (items + 1) // 2)
    size = tl.maximum(tl.cdiv(tl.sum(tiles), shared), LEAST)
    counts = tl.cdiv(tiles, size)
    return tokens, tiles, counts, tl.cumsum(counts)


@triton.jit
def _pick(x, slot, SLOTS: tl.constexpr):
    """`x[slot]` of a vector."""
    return tl.sum(tl.where(tl.arange(0, SLOTS) == slot, x, 0))


@triton.jit
def find_item(
    item, lengths, stride_row, stride_head, rows, heads, first_tile, items,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Whether there is an item of that number; its row, its head, its length, its tiles."""
    tokens, tiles, counts, ends = _cut(
        lengths, stride_row, stride_head, rows, heads, first_tile, items, BLOCK_N, LEAST, SLOTS
    )
    slot = tl.sum((ends <= item).to(tl.int32))
    count = _pick(counts, slot, SLOTS)
    own = item - (_pick(ends, slot, SLOTS) - count)
    size = tl.cdiv(_pick(tiles, slot, SLOTS), tl.maximum(count, 1))
    length = _pick(tokens, slot, SLOTS)
    begin = first_tile + own * size
    end = tl.minimum(begin + size, tl.cdiv(length, BLOCK_N))
    return item < tl.sum(counts), slot // heads, (slot % heads).to(tl.int64), length, begin, end


@triton.jit
def _merge(
    parts, part_lse, lengths, sink_logits, out, lse, stride_sink, stride_ob, stride_oh,
    stride_row, stride_head, rows, heads, group, first_tile, items,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    slot, member = tl.program_id(0), tl.program_id(1)
    _, _, counts, ends = _cut(
        lengths, stride_row, stride_head, rows, heads, first_tile, items, BLOCK_N, LEAST, SLOTS
    )
    count = _pick(counts, slot, SLOTS)
    begin = _pick(ends, slot, SLOTS) - count
    if PDL:
        gdc_wait()
    top = -float("inf")
    if sink_logits is not None:
        own = slot // heads * stride_sink + slot % heads * group + member
        sink = tl.load(sink_logits + own).to(tl.float32) * _LOG2_E
        top = sink
    for at in range(0, count, BLOCK):
        item = at + tl.arange(0, BLOCK)
        one = (begin + item).to(tl.int64) * group + member
        top = tl.maximum(top, tl.max(tl.load(part_lse + one, item < count, -float("inf"))))
    safe_top = tl.where(top == -float("inf"), 0.0, top)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mass, total = 0.0, tl.zeros((COLUMNS,), tl.float32)
    if sink_logits is not None:  # one more part: a mass without a value
        mass = tl.exp2(sink - safe_top)
    for at in range(0, count, BLOCK):
        item = at + tl.arange(0, BLOCK)
        one = (begin + item).to(tl.int64) * group + member
        weight = tl.exp2(tl.load(part_lse + one, item < count, -float("inf")) - safe_top)
        x = load_columns(parts, one * WIDTH, columns, item < count, WIDTH, WIDTH % COLUMNS == 0)
        mass += tl.sum(weight)
        total += tl.sum(weight[:, None] * x, 0)
    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    one = slot.to(tl.int64) * group + member  # [B, Q]: query heads lie by KV head
    result = (total / safe_mass).to(out.dtype.element_ty)
    at = (slot // heads).to(tl.int64) * stride_ob + (slot % heads * group + member) * stride_oh
    tl.store(out + at + columns, result, mask=columns < WIDTH)
    if tl.program_id(2) == 0:
        tl.store(lse + one, (top + tl.log2(safe_mass)) / _LOG2_E)


class Cut:
    """The work of one call and the memory of its parts.

    Args:
        out: `[B, Q, Dv]`, where the result goes; its last axis lies together.
        lengths: `[B]` or `[B, H]` int32.
        heads: H.
        tokens: That a row can have at most.
    """

    def __init__(
        self, out: Tensor, lengths: Tensor, heads: int, first: int, config: Config, tokens: int
    ) -> None:
        rows, query_heads, width = out.shape
        self.out, self.lengths, self.config = out, lengths, config
        self.rows, self.heads, self.group = rows, heads, query_heads // heads
        self.first, self.items = first, config.items * processors(out.device)
        most = rows * heads * -(-tokens // (config.block_n * config.least))
        self.most_items = min(most, max(self.items, (self.items + 1) // 2 + rows * heads))
        self.parts = out.new_empty((self.most_items, self.group, width), dtype=torch.float32)
        self.part_lse = out.new_empty((self.most_items, self.group), dtype=torch.float32)
        self.lse = out.new_empty((rows, query_heads), dtype=torch.float32)
        self.strides = (lengths.stride(0), lengths.stride(1) if lengths.dim() == 2 else 0)
        fitting = min(64, max(16, triton.next_power_of_2(self.group)))
        self.block_m = fitting if config.heads is None else config.heads
        self.grid = (triton.cdiv(self.group, self.block_m), self.most_items)
        # The merge is launched while the first stage ends (programmatic dependent launch).
        self.overlap = has_dependent_launch(out.device)
        self.constants = {
            "BLOCK_N": config.block_n, "LEAST": config.least,
            "SLOTS": triton.next_power_of_2(rows * heads), "PDL": self.overlap,
        }  # fmt: skip

    def merge(self, sink_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The second stage: `out` and its log-sum-exp `[B, Q]`.

        Args:
            sink_logits: `[Q]` or `[B, Q]`.
        """
        width = self.out.shape[-1]
        # A program takes all channels of a query head, or few where there are few heads.
        few = self.lse.numel() < 2 * processors(self.out.device)
        columns = 64 if few else min(512, triton.next_power_of_2(width))
        by_row = None
        if sink_logits is not None:
            by_row = sink_logits.stride(0) if sink_logits.dim() == 2 else 0
        _merge[(self.rows * self.heads, self.group, triton.cdiv(width, columns))](
            self.parts, self.part_lse, self.lengths, sink_logits, self.out, self.lse,
            by_row, *self.out.stride()[:2], *self.strides,
            self.rows, self.heads, self.group, self.first // self.config.block_n, self.items,
            WIDTH=width, COLUMNS=columns, BLOCK=4096 // columns, num_warps=4, **self.constants,
            **({"launch_pdl": True} if self.overlap else {}),
            enable_fp_fusion=True,
        )  # fmt: skip
        return self.out, self.lse
