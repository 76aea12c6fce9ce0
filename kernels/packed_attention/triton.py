"""The decode step over packed heads, see `paged.py`: work is cut and merged as in
`kernels/decode_attention/triton.py`, with tiles of two kinds.

The first tiles of a row cover its ring, each other one a block. Scales are folded: those of a
block's keys into the query, those of its values into the probabilities, so codes go from their
bytes into the dot products, less half of the range, which is put to the minimum: what is rounded
with a scale is then not taken off again. One field of all bytes of a tile is a run of tokens (keys)
or of channels (values), so nothing is interleaved or put together: keys give scores in as many
pieces as a byte has fields, and values are summed in as many.

A block is too little work for many warps, which would wait for each other: a program is one warp,
or as few as hold the sums of a wide head.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.decode_attention.cut_triton import Config, Cut, find_item
from kvtool.kernels.packed_attention.paged import PAGE, Blocks, Ring, pieces_of
from kvtool.kernels.tiles import (
    INTERPRETED,
    dot,
    gdc_launch_dependents,
    load_tile,
    lying_together,
    precision,
    rounded,
    tiles_of,
    weigh,
    zeros,
)


@triton.constexpr_function
def _to_numbers(shift, bits, half):
    """PTX: a field of four bytes to four numbers of 16 bits, about zero."""
    mask, middle = ((1 << bits) - 1) * 0x01010101, 0x00010001 << (bits - 1)
    # The last bit of a float with these upper eight bits, 1024 or 128 and more, counts ones.
    ones, kind = ("0x64646464", "f16x2") if half else ("0x43434343", "bf16x2")
    one, zero = (0x3C003C00, 0xE400E400) if half else (0x3F803F80, 0xC300C300)
    return f"""{{
        .reg .b32 codes, one, zero;
        shr.b32 codes, $2, {shift};
        and.b32 codes, codes, {mask};
        mov.b32 one, {one};
        mov.b32 zero, {zero + middle};
        prmt.b32 $0, codes, {ones}, 0x4140;
        prmt.b32 $1, codes, {ones}, 0x4342;
        fma.rn.{kind} $0, $0, one, zero;
        fma.rn.{kind} $1, $1, one, zero;
    }}"""


@triton.jit
def _numbers_of(words, SHIFT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The BITS bits from SHIFT on of bytes, less half of the range: exact numbers of DTYPE."""
    if INTERPRETED or BITS == 8 or DTYPE.is_fp32():
        codes = (words >> SHIFT) & ((1 << BITS) - 1)
        found = (codes.to(tl.float32) - (1 << (BITS - 1))).to(DTYPE)
    else:
        # Six instructions for four numbers, where conversions would take six for one. It says that
        # it is not pure, so that numbers change their places behind it: the compiler would have
        # bytes do so instead, which are fetched from shared memory one by one.
        HALF: tl.constexpr = DTYPE.is_fp16()
        found = tl.inline_asm_elementwise(
            _to_numbers(SHIFT, BITS, HALF), "=r,=r,r", [words],
            tl.float16 if HALF else tl.bfloat16, is_pure=False, pack=4,
        )  # fmt: skip
    return found


@triton.constexpr_function
def _joined(shift, field):
    """PTX: of four codes of three bits, the lower two and the third, which lies in two fields."""
    return f"""{{
        .reg .b32 low, high, other;
        shr.b32 low, $1, {shift};
        and.b32 low, low, 0x03030303;
        shr.b32 high, $2, {field};
        shr.b32 other, $2, {field + 1};
        lop3.b32 high, high, other, $3, 0xD8;
        and.b32 high, high, 0x01010101;
        shl.b32 high, high, 2;
        or.b32 $0, low, high;
    }}"""


@triton.jit
def _three_bits(words, third, upper, SHIFT: tl.constexpr, FIELD: tl.constexpr):
    """Codes of three bits: two from bit SHIFT on of a byte, and one of another byte.

    Args:
        upper: 255 where that lies in bit FIELD + 1, and not in bit FIELD.
    """
    if INTERPRETED:
        high = tl.where(upper == 0, third >> FIELD, third >> (FIELD + 1))
        found = ((words >> SHIFT) & 3) | ((high & 1) << 2)
    else:
        found = tl.inline_asm_elementwise(
            _joined(SHIFT, FIELD), "=r,r,r,r", [words, third, upper], tl.uint8, is_pure=True, pack=4
        )
    return found


@triton.jit
def both_of(pair):
    """The fp16 scale and minimum that lie in 32 bits, as fp32."""
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
    minimum = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _scale_of(pair, BITS: tl.constexpr):
    """The scale, and what stands for half of the range."""
    scale, minimum = both_of(pair)
    return scale, minimum + scale * (1 << (BITS - 1))


@triton.jit
def _bytes(
    plane, lines, there, START: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The bytes that SIZE numbers of each line from START on lie in, `[N, COLUMNS]`.

    Args:
        lines: `[N]`, where the bytes of each line begin; there: `[N]`, which there are.
        START: They lie in one field of the bytes.
        COLUMNS: A power of two that holds SIZE.
        WIDTH: Numbers of a line.

    Returns:
        Of all bits or the lower two of three; of the third, which lie behind, where there is one.
    """
    BYTES: tl.constexpr = WIDTH * (2 if BITS == 3 else BITS) // 8
    at = tl.arange(0, COLUMNS)
    inside = there[:, None] & (at < SIZE)[None, :]
    at_byte = plane + lines[:, None]
    words = tl.load(at_byte + (START % BYTES + at)[None, :], mask=inside, other=0)
    third = words
    if BITS == 3:  # fields half as wide
        HIGH: tl.constexpr = WIDTH // 8
        third_at = at_byte + (BYTES + (START + at) % HIGH)[None, :]
        third = tl.load(third_at, mask=inside, other=0)
    return words, third


@triton.jit
def _codes(
    found, START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The codes of numbers from START on, less half of the range, from their bytes."""
    words, third = found
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    SHIFT: tl.constexpr = LOW * (START // (WIDTH * LOW // 8))
    if BITS != 3:
        return _numbers_of(words, SHIFT, BITS, DTYPE)
    HIGH: tl.constexpr = WIDTH // 8
    FIELD: tl.constexpr = START // HIGH
    own = START + tl.arange(0, words.shape[1])
    upper = tl.where(own // HIGH > FIELD, 255, 0).to(tl.uint8)[None, :]
    return _numbers_of(_three_bits(words, third, upper, SHIFT, FIELD), 0, BITS, DTYPE)


@triton.jit
def ring_tile(
    tile, length, SINK: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Places of a tile of a ring `[BLOCK_N]`, and which hold a token that is in no block."""
    ROOM: tl.constexpr = WINDOW + BLOCK_N
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offset, newest = slot - SINK, length - 1 - SINK
    latest = newest - (newest - offset + ROOM) % ROOM  # that lies there; negative for none
    done = tl.maximum(length - SINK - WINDOW, 0) // BLOCK_N
    kept = (offset >= 0) & (offset < ROOM) & (latest >= done * BLOCK_N)
    return slot, kept | ((slot < SINK) & (slot < length))


@triton.jit
def _numbers_of_tile(START: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers from START on `[COLUMNS]`, and which of them are in a tile of SIZE."""
    column = tl.arange(0, COLUMNS)
    return START + column, column < SIZE


@triton.jit
def _attend(
    q, keys, values, key_codes, key_scales, value_codes, value_scales,
    rings, table, lengths, tokens_cut, out, lse,
    stride_qb, stride_qh, stride_kr, stride_kh, stride_kt, stride_vr, stride_vh, stride_vt,
    stride_table, stride_cut, stride_cut_head, rows, heads, group, items, scale,
    WIDTH: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, NEAR: tl.constexpr,
    EACH: tl.constexpr, KEY_BITS: tl.constexpr, KEY_LINE: tl.constexpr,
    KEY_TILES: tl.constexpr, KEY_START: tl.constexpr, KEY_SIZE: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_LINE: tl.constexpr,
    TILES: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    if PDL:  # the merge may start to wait
        gdc_launch_dependents()
    found, row, head, _, begin, end = find_item(
        item, tokens_cut, stride_cut, stride_cut_head, rows, heads, 0, items, BLOCK_N, LEAST, SLOTS
    )
    if not found:
        return

    DTYPE: tl.constexpr = q.dtype.element_ty
    # Tokens and channels are rows and query heads columns: few heads fill a product's columns.
    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # query heads of the KV head
    is_member = member < group
    q_at = row.to(tl.int64) * stride_qb + (head * group + member) * stride_qh
    asked, scaled, sums = (), (), ()
    for i in tl.static_range(KEY_TILES):
        channel, there = _numbers_of_tile(KEY_START[i], KEY_SIZE[i], KEY_COLUMNS[i])
        mask = there[:, None] & is_member[None, :]
        asked += (tl.load(q + q_at[None, :] + channel[:, None], mask=mask, other=0.0),)
        scaled += (asked[i].to(tl.float32) * scale,)
    for i in tl.static_range(TILES):
        sums += (zeros(COLUMNS[i], BLOCK_M),)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)

    length = tl.load(lengths + row)
    ring = tl.load(rings + row).to(tl.int64)
    for tile in range(begin, tl.minimum(end, NEAR)):
        slot, inside = ring_tile(tile, length, SINK, WINDOW, BLOCK_N)
        at = ring * stride_kr + head * stride_kh + slot.to(tl.int64) * stride_kt
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(KEY_TILES):
            k = load_tile(keys, at, inside, KEY_START[i], KEY_SIZE[i], KEY_COLUMNS[i])
            scores = dot(k, asked[i], scores, PRECISION)
        scores = tl.where(inside[:, None], scores * scale, -float("inf"))
        weights, shrink, top = weigh(scores, top, 0)
        mass = mass * shrink + tl.sum(weights, 0)
        at = ring * stride_vr + head * stride_vh + slot.to(tl.int64) * stride_vt
        added = ()
        for i in tl.static_range(TILES):
            v = load_tile(values, at, inside, START[i], SIZE[i], COLUMNS[i])
            added += (
                dot(tl.trans(v), rounded(weights, DTYPE), sums[i] * shrink[None, :], PRECISION),
            )
        sums = added

    RUN: tl.constexpr = BLOCK_N * (2 if KEY_BITS == 3 else KEY_BITS) // 8
    RUNS: tl.constexpr = BLOCK_N // RUN
    GROUPS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    # Sums over tokens that wait until the end, a place for each token of a run.
    seen, rests = zeros(RUN, BLOCK_M), ()
    for _ in tl.static_range(GROUPS):
        rests += (zeros(RUN, BLOCK_M),)
    first, last = tl.maximum(begin, NEAR) - NEAR, end - NEAR - 1
    pages = table + row * stride_table
    page = tl.load(pages + first // EACH, mask=first <= last, other=0)
    for block in range(first, last + 1):
        own = (page.to(tl.int64) * heads + head) * EACH + block % EACH
        # All that is read of a block is asked for at once, and where the next one lies.
        k_bytes, v_bytes, k_pairs, v_pairs = (), (), (), ()
        lines = key_codes + own * (WIDTH * KEY_LINE)
        for i in tl.static_range(KEY_TILES):
            channel, there = _numbers_of_tile(KEY_START[i], KEY_SIZE[i], KEY_COLUMNS[i])
            k_pairs += (tl.load(key_scales + own * WIDTH + channel, mask=there, other=0),)
            k_bytes += (_bytes(lines, channel * KEY_LINE, there, 0, RUN, RUN, BLOCK_N, KEY_BITS),)
        lines = value_codes + own * (BLOCK_N * VALUE_LINE)
        for j in tl.static_range(RUNS):
            token = j * RUN + tl.arange(0, RUN)
            for i in tl.static_range(TILES):
                v_bytes += (
                    _bytes(
                        lines, token * VALUE_LINE, token >= 0, START[i], SIZE[i], COLUMNS[i],
                        WIDTH, VALUE_BITS,
                    ),
                )  # fmt: skip
            for i in tl.static_range(GROUPS):
                v_pairs += (tl.load(value_scales + (own * BLOCK_N + token) * GROUPS + i),)
        page = tl.load(pages + tl.minimum(block + 1, last) // EACH)

        folded, shift = (), tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(KEY_TILES):
            s, m = _scale_of(k_pairs[i], KEY_BITS)
            folded += (rounded(scaled[i] * s[:, None], DTYPE),)
            shift += tl.sum(scaled[i] * m[:, None], 0)
        scores = ()
        highest = tl.full((RUN, BLOCK_M), -float("inf"), tl.float32)
        for j in tl.static_range(RUNS):
            score = tl.broadcast_to(shift[None, :], (RUN, BLOCK_M))
            for i in tl.static_range(KEY_TILES):
                codes = _codes(k_bytes[i], j * RUN, BLOCK_N, KEY_BITS, DTYPE)
                score = dot(tl.trans(codes), folded[i], score, PRECISION)
            scores += (score,)
            highest = tl.maximum(highest, score)
        new_top = tl.maximum(top, tl.max(highest, 0))
        shrink = tl.exp2(top - new_top)[None, :]  # a block is full: its top is a number
        top = new_top
        mass *= tl.reshape(shrink, (BLOCK_M,))
        seen *= shrink
        added, kept = (), ()
        for i in tl.static_range(TILES):
            added += (sums[i] * shrink,)
        for i in tl.static_range(GROUPS):
            kept += (rests[i] * shrink,)
        for j in tl.static_range(RUNS):
            weights = tl.exp2(scores[j] - top[None, :])
            seen += weights
            sums, added, rests, kept, shares = added, (), kept, (), ()
            for i in tl.static_range(GROUPS):
                s, m = _scale_of(v_pairs[j * GROUPS + i], VALUE_BITS)
                shares += (rounded(weights * s[:, None], DTYPE),)
                kept += (rests[i] + weights * m[:, None],)
            for i in tl.static_range(TILES):
                codes = _codes(v_bytes[j * TILES + i], START[i], WIDTH, VALUE_BITS, DTYPE)
                added += (dot(tl.trans(codes), shares[START[i] // BLOCK_N], sums[i], PRECISION),)
        sums, rests = added, kept
    mass += tl.sum(seen, 0)

    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    part = item.to(tl.int64) * group + member
    tl.store(lse + part, top + tl.log2(safe_mass), mask=is_member)
    for i in tl.static_range(TILES):
        channel, there = _numbers_of_tile(START[i], SIZE[i], COLUMNS[i])
        mask = there[:, None] & is_member[None, :]
        total = sums[i] + tl.sum(rests[START[i] // BLOCK_N], 0)[None, :]
        at = out + (part * WIDTH)[None, :] + channel[:, None]
        tl.store(at, total / safe_mass[None, :], mask=mask)


def cut_into_tiles(
    lengths: Tensor, ring: Ring, table: Tensor, size: int
) -> tuple[int, Tensor, int]:
    """Tiles of a ring; for each row `[B]` some tokens that have these and a tile per block; at most
    how many.

    A row of n tokens has ⌊x / N⌋ = ⌈(x - N + 1) / N⌉ blocks, with x = max(0, n - sink - window).
    """
    near = triton.cdiv(ring.keys.shape[2], size)
    least = (near - 1) * size + 1
    tokens = (lengths + (least - ring.sink - ring.window)).clamp(min=least)
    return near, tokens, near * size + table.shape[1] * PAGE


def tiles_for(pieces: list[range]) -> tuple[tuple[int, ...], ...]:
    """Where pieces begin, their sizes, and powers of two that hold these: two of them, where one
    would have more to spare.
    """
    tiles = []
    for piece in pieces:
        whole, rest = tiles_of(len(piece))
        columns = triton.next_power_of_2(max(16, len(piece)))
        if rest and whole + rest < columns:
            tiles += [(piece.start, whole, whole), (piece.start + whole, len(piece) - whole, rest)]
        else:
            tiles.append((piece.start, len(piece), columns))
    return tuple(zip(*tiles, strict=True))


def config_for(group: int, size: int, width: int, itemsize: int) -> Config:
    """How the work of `group` query heads over blocks of `size` tokens is cut and run."""
    heads = min(64, max(8, triton.next_power_of_2(group)))
    # Numbers of a head that one warp can hold. Those of fp32 are not multiplied by tensor cores.
    held = 128 if itemsize == 2 else 32
    warps = min(8, triton.next_power_of_2(triton.cdiv(width, held)))
    items = max(1, 8 // warps)
    return Config(block_n=size, least=2, items=items, warps=warps, stages=1, heads=heads)


def packed_attention(
    q: Tensor,
    ring: Ring,
    blocks: Blocks,
    lengths: Tensor,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """See :func:`kvtool.kernels.packed_attention.paged.packed_attention`."""
    q = lying_together(q)
    width, heads, size = q.shape[-1], ring.keys.shape[1], blocks.size
    near, tiles, most = cut_into_tiles(lengths, ring, blocks.table, size)
    config = config_for(q.shape[1] // heads, size, width, q.element_size())
    cut = Cut(torch.empty_like(q), tiles, heads, 0, config, most)
    of_keys = tiles_for([range(width)])
    of_values = tiles_for(pieces_of(width, blocks.value_bits, size))
    keys, key_scales, values, value_scales = blocks.planes
    _attend[cut.grid](
        q, ring.keys, ring.values, keys, key_scales.view(torch.int32), values,
        value_scales.view(torch.int32), ring.rows, blocks.table, lengths, tiles,
        cut.parts, cut.part_lse, *q.stride()[:2], *ring.keys.stride()[:3],
        *ring.values.stride()[:3], blocks.table.stride(0), *cut.strides,
        cut.rows, heads, cut.group, cut.items, scaling * math.log2(math.e),
        WIDTH=width, SINK=ring.sink, WINDOW=ring.window, NEAR=near, EACH=PAGE // size,
        KEY_BITS=blocks.key_bits, KEY_LINE=blocks.keys.shape[-1],
        KEY_TILES=len(of_keys[0]), KEY_START=of_keys[0], KEY_SIZE=of_keys[1],
        KEY_COLUMNS=of_keys[2],
        VALUE_BITS=blocks.value_bits, VALUE_LINE=blocks.values.shape[-1],
        TILES=len(of_values[0]), START=of_values[0], SIZE=of_values[1], COLUMNS=of_values[2],
        PRECISION=precision(q.dtype), BLOCK_M=cut.block_m,
        num_warps=config.warps, num_stages=config.stages, **cut.constants,
        enable_fp_fusion=True,
    )  # fmt: skip
    return cut.merge(sink_logits)[0]
