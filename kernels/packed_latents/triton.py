"""The decode step over packed latents, see `reference.py`: cut as in
`kernels/packed_attention/triton.py`, with the tiles of a ring first and then a block each.

Tokens and channels are the rows of all products, query heads their columns: wgmma takes 64 rows,
and heads are few. The numbers of a latent are taken some at a time, all of one width, and twice:

- as keys, code · scale + minimum, in bfloat16;
- as values the codes alone. Weights of a block are summed up, times codes, and the sum is scaled.

Codes need no conversion: the bits of a small integer n are the float16 n · 2^-24 and the bfloat16
n · 2^-133. The shift of a field within its byte and these units go into scales and weights.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.decode_attention.cut_triton import Config, Cut, find_item
from kvtool.kernels.packed_attention import Ring
from kvtool.kernels.packed_attention.pack_triton import due_block, pack_channels
from kvtool.kernels.packed_attention.paged import PAGE
from kvtool.kernels.packed_attention.triton import both_of, cut_into_tiles, ring_tile
from kvtool.kernels.packed_latents.reference import Blocks
from kvtool.kernels.tiles import (
    INTERPRETED,
    dot,
    gdc_launch_dependents,
    has_sound_assembler,
    load_tile,
    lying_together,
    precision,
    store_columns,
    weigh,
    zeros,
)

_WIDEST = 64  # numbers that are taken together: more do not stay in registers
_PACKED = 64  # numbers that a program packs
_KEY_UNIT = tl.constexpr(2.0**-22)  # of keys: so no scale times 2^133 is infinite


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
def _load(at, inside, WHOLE: tl.constexpr):
    """What lies there; zeros where nothing does, unless WHOLE."""
    return tl.load(at) if WHOLE else tl.load(at, mask=inside, other=0)


@triton.jit
def _bytes(
    plane, lines, inside, SIZE: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Bytes of a block's SIZE tokens, each with a run of tokens in each field; `[n, ·]` uint8.

    Of 2, 4 and 8 bits as they are stored. Three become four, in two planes, the first tokens first.

    Args:
        lines: `[n, 1]`, where the bytes of each number begin; inside: which there are.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BYTES: tl.constexpr = SIZE * LOW // 8
    byte = tl.arange(0, BYTES)[None, :]
    words = _load(plane + lines + byte, inside, WHOLE)
    if BITS == 3:
        HIGH: tl.constexpr = SIZE // 8  # the third bits lie behind, in fields half as wide
        thirds = _load(plane + lines + (BYTES + byte % HIGH), inside, WHOLE)
        thirds >>= (byte // HIGH).to(tl.uint8)
        found = _of_three(words, thirds)
    else:
        found = (words,)
    return found


@triton.jit
def _of_three(words, thirds):
    """Codes of three bits in fields of four: those of the first two fields, of the others."""
    if INTERPRETED:
        found = ()
        for half in tl.static_range(2):
            low, high = words >> (4 * half), thirds >> (4 * half)
            found += ((low & 3) | ((low & 12) << 2) | ((high & 1) << 2) | ((high & 4) << 4),)
    else:
        found = tl.inline_asm_elementwise(
            """{ // four bytes at once
            .reg .b32 a, b, c, d;
            and.b32 a, $2, 0x03030303;
            and.b32 b, $2, 0x0c0c0c0c;
            and.b32 c, $3, 0x01010101;
            and.b32 d, $3, 0x04040404;
            shl.b32 b, b, 2;
            shl.b32 c, c, 2;
            shl.b32 d, d, 4;
            or.b32 a, a, b;
            or.b32 c, c, d;
            or.b32 $0, a, c;
            shr.b32 a, $2, 4;
            shr.b32 b, $2, 2;
            shr.b32 c, $3, 2;
            and.b32 a, a, 0x03030303;
            and.b32 b, b, 0x30303030;
            and.b32 c, c, 0x04040404;
            and.b32 d, $3, 0x40404040;
            or.b32 a, a, b;
            or.b32 c, c, d;
            or.b32 $1, a, c;
            }""",
            "=&r,=r,r,r", [words, thirds], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip
    return found


@triton.constexpr_function
def _unpacking(bits, dtype):
    """What takes four bytes apart: two pairs of 16 bits, of which a mask takes each field.

    Its comment tells keys from values. Otherwise both were made at once, in front of the scores,
    and values waited in registers.
    """
    fields = 8 // bits
    lines = [f"// {dtype}", ".reg .b32 a, b;"]
    lines += [f"prmt.b32 a, ${2 * fields}, 0, 0x4140;", f"prmt.b32 b, ${2 * fields}, 0, 0x4342;"]
    for field in range(fields):
        mask = ((1 << bits) - 1 << bits * field) * 0x10001
        lines += [f"and.b32 ${2 * field + i}, {pair}, {mask};" for i, pair in enumerate("ab")]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit
def _fields(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The fields of some bytes, as numbers in units: code · 2^(BITS · field)."""
    ASM: tl.constexpr = _unpacking(BITS, DTYPE)
    if INTERPRETED or tl.float32 == DTYPE:
        found = ()
        for field in tl.static_range(8 // BITS):
            found += ((words & (((1 << BITS) - 1) << (BITS * field))).to(tl.int16),)
    elif BITS == 8:
        found = tl.inline_asm_elementwise(
            ASM, "=r,=r,r", [words], dtype=(tl.int16,), is_pure=True, pack=4
        )
    elif BITS == 4:
        found = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [words], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
    else:
        found = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
    numbers = ()
    for field in tl.static_range(8 // BITS):
        if tl.float32 == DTYPE:
            numbers += (found[field].to(tl.float32),)
        elif INTERPRETED and tl.bfloat16 == DTYPE:  # is no number there
            numbers += (tl.cast(found[field].to(tl.int32) << 16, tl.float32, bitcast=True),)
        else:
            numbers += (found[field].to(DTYPE, bitcast=True),)
    return numbers


@triton.jit
def _in_order(fields):
    """Fields `[n, ·]` side by side, in sixteens whose tokens 4q + 2h + b lie at 8h + 2q + b.

    So a thread has four neighbouring bytes of what a product asks of it (any order would do).
    """
    if len(fields) == 1:
        found = fields[0]
    elif len(fields) == 2:
        found = tl.permute(tl.join(fields[0], fields[1]), (0, 2, 1))
    else:
        even, odd = tl.join(fields[0], fields[2]), tl.join(fields[1], fields[3])
        found = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
    N: tl.constexpr = found.shape[0]
    SIZE: tl.constexpr = fields[0].shape[1] * len(fields)
    found = tl.permute(tl.reshape(found, (N, SIZE // 16, 4, 2, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(found, (N, SIZE))


@triton.constexpr_function
def _wide(bits):
    """Bits of a field."""
    return 4 if bits == 3 else bits


@triton.constexpr_function
def _last(bits):
    """What the code in the last field of a byte is times."""
    return 1 << (8 - _wide(bits))


@triton.jit
def _raised(SIZE: tl.constexpr, BITS: tl.constexpr):
    """What makes up for the fields of the tokens, with the last field's as one; fp32 `[SIZE]`."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    WIDE: tl.constexpr = 4 if BITS == 3 else BITS
    at = tl.arange(0, SIZE)
    token = at // 16 * 16 + at % 8 // 2 * 4 + at // 8 % 2 * 2 + at % 2
    field = token // (SIZE * LOW // 8) % (8 // WIDE)
    return (1 << (8 - WIDE - WIDE * field)).to(tl.float32)


@triton.jit
def _scales(plane, line, inside, WHOLE: tl.constexpr):
    """Scale and minimum of each number, fp32 `[n]`; they lie side by side."""
    return both_of(_load(plane + line, inside, WHOLE))


@triton.jit
def _keys(words, s, m, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a tile, times `_KEY_UNIT` unless they are fp32; `[n, SIZE]`."""
    WIDE: tl.constexpr = 4 if BITS == 3 else BITS
    UNIT: tl.constexpr = 1.0 if tl.float32 == DTYPE else _KEY_UNIT
    ROOM: tl.constexpr = 1.0 if tl.float32 == DTYPE else _KEY_UNIT * 2.0**133
    minimum = (m * UNIT)[:, None]
    found = ()
    for i in tl.static_range(len(words)):
        fields = _fields(words[i], WIDE, DTYPE)
        for field in tl.static_range(8 // WIDE):
            scale = (s * (ROOM / (1 << (WIDE * field))))[:, None]
            if not INTERPRETED:
                scale = scale.to(DTYPE)
            found += (fields[field] * scale + minimum.to(scale.dtype),)
    return _in_order(found).to(DTYPE)


@triton.jit
def _values(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of a tile, in units as those of `_fields`; `[n, SIZE]`."""
    found = ()
    for i in tl.static_range(len(words)):
        found += _fields(words[i], 4 if BITS == 3 else BITS, DTYPE)
    return _in_order(found)


@triton.jit
def _far(codes, scales, own, TOTAL: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
         COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Bytes of a tile of block `own`, and scales and minima of its numbers."""
    LINE: tl.constexpr = TOKENS * BITS // 8
    at = tl.arange(0, COLUMNS)
    line = own * TOTAL + FIRST
    inside = at < SIZE
    WHOLE: tl.constexpr = COLUMNS == SIZE
    words = _bytes(
        codes + line * LINE, at[:, None] * LINE, inside[:, None], TOKENS, BITS, WHOLE
    )  # fmt: skip
    s, m = _scales(scales + line, at, inside, WHOLE)
    return words, s, m


@triton.jit
def _store(out, at, inside, x, START: tl.constexpr, SIZE: tl.constexpr):
    """Writes the numbers of a tile of some rows, as `load_tile` reads them."""
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
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
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
        asked += (
            tl.trans(load_tile(q, member * stride_qh, is_member, START[i], SIZE[i], COLUMNS[i])),
        )
    for i in tl.static_range(SUMMED):
        sums += (zeros(COLUMNS[i], BLOCK_M),)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)

    length = tl.load(lengths + row)
    ring = latents + tl.load(rings + row).to(tl.int64) * stride_lr
    for tile in tl.range(begin, tl.minimum(end, NEAR), num_stages=1):
        slot, inside = ring_tile(tile, length, SINK, WINDOW, BLOCK_N)
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        found = ()
        for i in tl.static_range(TILES):
            found += (load_tile(ring, slot * stride_lt, inside, START[i], SIZE[i], COLUMNS[i]),)
            scores = dot(found[i], asked[i], scores, PRECISION)
        scores = tl.where(inside[:, None], scores * scale, -float("inf"))
        weights, shrink, top = weigh(scores, top, 0)
        mass = mass * shrink + tl.sum(weights, 0)
        added = ()
        for i in tl.static_range(SUMMED):
            total = sums[i] * shrink[None, :]
            added += (dot(tl.trans(found[i]), weights.to(DTYPE), total, PRECISION),)
        sums = added

    KEYS: tl.constexpr = tl.float32 if tl.float32 == DTYPE else tl.bfloat16
    VALUES: tl.constexpr = tl.float32 if tl.float32 == DTYPE else tl.float16
    far_scale = scale if tl.float32 == DTYPE else scale * (1 / _KEY_UNIT)
    UNIT: tl.constexpr = 1.0 if tl.float32 == DTYPE else 2.0**24
    # Without the last, the places of all queries were held in registers.
    for tile in tl.range(tl.maximum(begin, NEAR), end, num_stages=STAGES, disable_licm=True):
        block = tile - NEAR
        page = tl.load(table + row * stride_table + block // EACH).to(tl.int64)
        own = page * EACH + block % EACH
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        found = ()
        for i in tl.static_range(TILES):
            words, s, m = _far(
                codes[PART[i]], scales[PART[i]], own, TOTAL[i], FIRST[i], SIZE[i], COLUMNS[i],
                BLOCK_N, BITS[i],
            )  # fmt: skip
            found += ((words, s, m),)
            x = _keys(words, s, m, BITS[i], KEYS)
            scores = dot(tl.trans(x), asked[i].to(KEYS), scores, PRECISION)
        weights, shrink, top = weigh(scores * far_scale, top, 0)
        weight = tl.sum(weights, 0)
        mass = mass * shrink + weight
        added = ()
        for i in tl.static_range(SUMMED):
            words, s, m = found[i]
            raised = (weights * _raised(BLOCK_N, BITS[i])[:, None]).to(VALUES)
            one = dot(
                _values(words, BITS[i], VALUES), raised, zeros(COLUMNS[i], BLOCK_M), PRECISION
            )
            total = sums[i] * shrink[None, :] + m[:, None] * weight[None, :]
            added += (total + (s * (UNIT / _last(BITS[i])))[:, None] * one,)
        sums = added

    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    part = item.to(tl.int64) * group + member
    tl.store(lse + part, top + tl.log2(safe_mass), mask=is_member)
    for i in tl.static_range(SUMMED):
        total = tl.trans(sums[i] / safe_mass[None, :])
        _store(out, part * RANK, is_member, total, START[i], SIZE[i])


def config_for(heads: int, size: int, itemsize: int, sound: bool) -> Config:
    """How the work of `heads` query heads over blocks of `size` tokens is cut and run.

    Args:
        sound: Whether the assembler is: before ptxas 12.9, four warps got the ring wrong.
    """
    # Numbers of fp32 fill the shared memory of a multiprocessor.
    most, items, warps, stages = 32, 2, 4, 5
    if itemsize == 4:
        most, items, warps, stages = 16, 1, 8, 1
    elif not sound:
        items, warps = 1, 8
    fitting = min(most, max(16, triton.next_power_of_2(heads)))
    return Config(block_n=size, least=2, items=items, warps=warps, stages=stages, heads=fitting)


def packed_latent_attention(
    q: Tensor, ring: Ring, blocks: Blocks, lengths: Tensor, scaling: float
) -> Tensor:
    """See :func:`kvtool.kernels.packed_latents.reference.packed_latent_attention`."""
    q = lying_together(q)
    codes, scales = _planes(blocks)
    scales = tuple(plane.view(torch.int32) for plane in scales)  # with their minima
    size, rank = blocks.size, ring.values.shape[-1]
    near, tokens, most = cut_into_tiles(lengths, ring, blocks.table, size)
    config = config_for(q.shape[1], size, q.element_size(), has_sound_assembler(q.device))
    cut = Cut(q.new_empty((*q.shape[:2], rank)), tokens, 1, 0, config, most)
    values, others = tiles_for(blocks)
    tiles = dict(zip(map(str.upper, Tile._fields), zip(*values, *others, strict=True), strict=True))
    _attend[cut.grid](
        q, ring.keys, codes, scales, ring.rows, blocks.table, lengths, tokens,
        cut.parts, cut.part_lse, *q.stride()[:2], ring.keys.stride(0), ring.keys.stride(2),
        blocks.table.stride(0), *cut.strides, cut.rows, cut.group, cut.items,
        scaling * math.log2(math.e),
        RANK=rank, SINK=ring.sink, WINDOW=ring.window, NEAR=near, EACH=PAGE // size,
        TILES=len(values) + len(others), SUMMED=len(values), **tiles,
        PRECISION=precision(q.dtype), BLOCK_M=cut.block_m, STAGES=config.stages,
        num_warps=config.warps, enable_fp_fusion=True, **cut.constants,
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
    _pack[(len(lengths), sum(triton.cdiv(count, _PACKED) for count in counts))](
        ring.keys, *_planes(blocks), ring.rows, blocks.table, lengths,
        ring.keys.stride(0), ring.keys.stride(2), blocks.table.stride(0),
        SINK=ring.sink, WINDOW=ring.window, TOKENS=size, EACH=PAGE // size,
        PARTS=len(counts), BITS=blocks.bits, COUNT=counts, VALUES=blocks.values,
        START=starts[0], BEHIND=starts[1], BLOCK=_PACKED, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _planes(blocks: Blocks) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    assert all(plane.is_contiguous() for plane in (*blocks.codes, *blocks.scales))
    return blocks.codes, blocks.scales
