"""The decode step over packed latents, see `reference.py`: cut as in
`kernels/packed_attention/triton.py`, with the tiles of a ring first and then a block each.

The numbers of a latent are taken some at a time, all of one width. Bytes become numbers once, which
are keys and values: with 16 query heads and more on a latent, a scale costs less where it makes a
number out of a code than folded into as many queries and sums.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.decode_attention.triton import Config, Cut, find_item
from kvtool.kernels.packed_attention import Ring
from kvtool.kernels.packed_attention.paged import PAGE
from kvtool.kernels.packed_attention.triton import (
    cut_into_tiles,
    due_block,
    pack_channels,
    ring_tile,
    weigh,
)
from kvtool.kernels.packed_latents.reference import Blocks
from kvtool.kernels.tiles import (
    dot,
    gdc_launch_dependents,
    load_columns,
    lying_together,
    precision,
    store_columns,
)

_WIDEST = 64  # numbers that are taken together: more do not stay in registers


class Tile(NamedTuple):
    """Numbers of one width that are taken together.

    Attributes:
        part: Which width; bits: that it is; total: how many numbers have it.
        first, size: Which of them these are.
        columns: A power of two that holds them.
        start: Where they lie in a latent.
    """

    part: int
    bits: int
    total: int
    first: int
    size: int
    columns: int
    start: int


def tiles_for(blocks: Blocks) -> tuple[list[Tile], list[Tile]]:
    """Those of the values, and those of the shared key."""
    found: tuple[list[Tile], list[Tile]] = [], []
    for part, numbers in enumerate(zip(blocks.bits, blocks.counts, *blocks.places, strict=True)):
        bits, count, *places = numbers
        first = 0
        for tiles, place in zip(found, places, strict=True):
            for start in range(place.start, place.stop, _WIDEST):
                size = min(_WIDEST, place.stop - start)
                columns = max(16, triton.next_power_of_2(size))
                tiles.append(Tile(part, bits, count, first, size, columns, start))
                first += size
    return found


@triton.jit
def _codes(plane, lines, there, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Codes of a block's SIZE tokens, fp32 `[n, SIZE]`.

    Args:
        lines: `[n]`, where the bytes of each number begin; there: `[n]`, which there are.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BYTES: tl.constexpr = SIZE * LOW // 8
    token = tl.arange(0, SIZE)
    at = plane + lines[:, None]
    words = tl.load(at + (token % BYTES)[None, :], mask=there[:, None], other=0)
    codes = (words >> (token // BYTES * LOW).to(tl.uint8)[None, :]) & ((1 << LOW) - 1)
    if BITS == 3:  # the third bits lie behind
        HIGH: tl.constexpr = SIZE // 8
        words = tl.load(at + (BYTES + token % HIGH)[None, :], mask=there[:, None], other=0)
        codes |= ((words >> (token // HIGH).to(tl.uint8)[None, :]) & 1) << 2
    return codes.to(tl.float32)


@triton.jit
def _far(codes, scales, own, TOTAL: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
         COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """The numbers of a tile of block `own`, fp32 `[COLUMNS, TOKENS]`."""
    LINE: tl.constexpr = TOKENS * BITS // 8
    at = tl.arange(0, COLUMNS)
    line = own * TOTAL + FIRST
    s = tl.load(scales + line * 2 + at * 2, mask=at < SIZE, other=0.0).to(tl.float32)
    m = tl.load(scales + line * 2 + at * 2 + 1, mask=at < SIZE, other=0.0).to(tl.float32)
    found = _codes(codes + line * LINE, at * LINE, at < SIZE, TOKENS, BITS)
    return found * s[:, None] + m[:, None]


@triton.jit
def _near(plane, at, inside, START: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The numbers of a tile of some rows, which begin at `at [n]`; `[n, COLUMNS]`."""
    columns = tl.arange(0, COLUMNS)
    return load_columns(plane + START, at, columns, inside, SIZE, COLUMNS == SIZE)


@triton.jit
def _zeros(M: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((M, COLUMNS), tl.float32)


@triton.jit
def _store(out, at, inside, x, START: tl.constexpr, SIZE: tl.constexpr):
    """Writes the numbers of a tile of some rows, as `_near` reads them."""
    store_columns(out + START, at, tl.arange(0, x.shape[1]), inside, SIZE, x)


@triton.jit
def _attend(
    q, latents, codes, scales, rings, table, lengths, tokens_cut, out, lse,
    stride_qb, stride_qh, stride_lr, stride_lt, stride_table, stride_cut, stride_cut_head,
    rows, group, items, scale,
    RANK: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, NEAR: tl.constexpr,
    EACH: tl.constexpr, TILES: tl.constexpr, SUMMED: tl.constexpr, PART: tl.constexpr,
    BITS: tl.constexpr, TOTAL: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    if PDL:  # the merge may start to wait
        gdc_launch_dependents()
    there, row, _, _, begin, end = find_item(
        item, tokens_cut, stride_cut, stride_cut_head, rows, 1, 0, items, BLOCK_N, LEAST, SLOTS
    )
    if not there:
        return

    DTYPE: tl.constexpr = q.dtype.element_ty
    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # query heads
    is_member = member < group
    q += row.to(tl.int64) * stride_qb
    asked, sums = (), ()  # a tile each; the first have values
    for i in tl.static_range(TILES):
        asked += (_near(q, member * stride_qh, is_member, START[i], SIZE[i], COLUMNS[i]),)
    for i in tl.static_range(SUMMED):
        sums += (_zeros(BLOCK_M, COLUMNS[i]),)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)

    length = tl.load(lengths + row)
    ring = latents + tl.load(rings + row).to(tl.int64) * stride_lr
    for tile in range(begin, tl.minimum(end, NEAR)):
        slot, inside = ring_tile(tile, length, SINK, WINDOW, BLOCK_N)
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        found = ()
        for i in tl.static_range(TILES):
            found += (_near(ring, slot * stride_lt, inside, START[i], SIZE[i], COLUMNS[i]),)
            scores = dot(asked[i], tl.trans(found[i]), scores, PRECISION)
        scores = tl.where(inside[None, :], scores * scale, -float("inf"))
        weights, shrink, top, mass = weigh(scores, top, mass)
        added = ()
        for i in tl.static_range(SUMMED):
            total = sums[i] * shrink[:, None]
            added += (dot(weights.to(DTYPE), found[i], total, PRECISION),)
        sums = added

    for tile in range(tl.maximum(begin, NEAR), end):
        block = tile - NEAR
        page = tl.load(table + row * stride_table + block // EACH).to(tl.int64)
        own = page * EACH + block % EACH
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        found = ()
        for i in tl.static_range(TILES):
            x = _far(
                codes[PART[i]], scales[PART[i]], own, TOTAL[i], FIRST[i], SIZE[i], COLUMNS[i],
                BLOCK_N, BITS[i],
            )  # fmt: skip
            found += (x.to(DTYPE),)
            scores = dot(asked[i], found[i], scores, PRECISION)
        weights, shrink, top, mass = weigh(scores * scale, top, mass)
        added = ()
        for i in tl.static_range(SUMMED):
            total = sums[i] * shrink[:, None]
            added += (dot(weights.to(DTYPE), tl.trans(found[i]), total, PRECISION),)
        sums = added

    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    part = item.to(tl.int64) * group + member
    tl.store(lse + part, top + tl.log2(safe_mass), mask=is_member)
    for i in tl.static_range(SUMMED):
        _store(out, part * RANK, is_member, sums[i] / safe_mass[:, None], START[i], SIZE[i])


def config_for(heads: int, size: int, itemsize: int) -> Config:
    """How the work of `heads` query heads over blocks of `size` tokens is cut and run."""
    # Numbers of fp32 fill the shared memory of a multiprocessor.
    most, stages = (16, 1) if itemsize == 4 else (32, 2)
    fitting = min(most, max(16, triton.next_power_of_2(heads)))
    return Config(block_n=size, least=2, items=1, warps=8, stages=stages, heads=fitting)


def packed_latent_attention(
    q: Tensor, ring: Ring, blocks: Blocks, lengths: Tensor, scaling: float
) -> Tensor:
    """See :func:`kvtool.kernels.packed_latents.reference.packed_latent_attention`."""
    q = lying_together(q)
    size, rank = blocks.size, ring.values.shape[-1]
    near, tokens = cut_into_tiles(lengths, ring, size)
    config = config_for(q.shape[1], size, q.element_size())
    cut = Cut(q.new_empty((*q.shape[:2], rank)), tokens, 1, 0, config)
    values, others = tiles_for(blocks)
    tiles = dict(zip(map(str.upper, Tile._fields), zip(*values, *others, strict=True), strict=True))
    _attend[cut.grid](
        q, ring.keys, *_planes(blocks), ring.rows, blocks.table, lengths, tokens,
        cut.parts, cut.part_lse, *q.stride()[:2], ring.keys.stride(0), ring.keys.stride(2),
        blocks.table.stride(0), *cut.strides, cut.rows, cut.group, cut.items,
        scaling * math.log2(math.e),
        RANK=rank, SINK=ring.sink, WINDOW=ring.window, NEAR=near, EACH=PAGE // size,
        TILES=len(values) + len(others), SUMMED=len(values), **tiles,
        PRECISION=precision(q.dtype), BLOCK_M=cut.block_m, num_warps=config.warps,
        num_stages=config.stages, **cut.constants,
    )  # fmt: skip
    return cut.merge()[0]


@triton.jit
def _pack(
    latents, codes, scales, rings, table, lengths, stride_lr, stride_lt, stride_table,
    SINK: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, EACH: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, VALUES: tl.constexpr,
    START: tl.constexpr, BEHIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0), tl.program_id(1)
    due, block = due_block(tl.load(lengths + row), SINK, WINDOW, TOKENS)
    if not due:
        return
    page = tl.load(table + row * stride_table + block // EACH).to(tl.int64)
    own = page * EACH + block % EACH
    ring = latents + tl.load(rings + row).to(tl.int64) * stride_lr
    for i in tl.static_range(PARTS):  # a program packs some numbers of one width
        if (chunk >= 0) & (chunk * BLOCK < COUNT[i]):
            number = chunk * BLOCK + tl.arange(0, BLOCK)
            column = number + tl.where(number < VALUES[i], START[i], BEHIND[i] - VALUES[i])
            line = own * COUNT[i] + number
            pack_channels(
                ring, stride_lt, block * TOKENS, column, number < COUNT[i],
                codes[i] + line * (TOKENS * BITS[i] // 8), scales[i] + line * 2,
                SINK, WINDOW + TOKENS, TOKENS, BITS[i], 1.0,
            )  # fmt: skip
        chunk -= (COUNT[i] + BLOCK - 1) // BLOCK


def pack_latents(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
    """See :func:`kvtool.kernels.packed_latents.reference.pack_latents`."""
    size, counts = blocks.size, blocks.counts
    starts = [tuple(place.start for place in places) for places in blocks.places]
    _pack[(len(lengths), sum(triton.cdiv(count, _WIDEST) for count in counts))](
        ring.keys, *_planes(blocks), ring.rows, blocks.table, lengths,
        ring.keys.stride(0), ring.keys.stride(2), blocks.table.stride(0),
        SINK=ring.sink, WINDOW=ring.window, TOKENS=size, EACH=PAGE // size,
        PARTS=len(counts), BITS=blocks.bits, COUNT=counts, VALUES=blocks.values,
        START=starts[0], BEHIND=starts[1], BLOCK=_WIDEST, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _planes(blocks: Blocks) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    assert all(plane.is_contiguous() for plane in (*blocks.codes, *blocks.scales))
    return blocks.codes, blocks.scales
