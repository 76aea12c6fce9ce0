"""Packs what has become a block, byte for byte as `kernels/quantise` does; see `paged.py`."""

import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.packed_attention.paged import PAGE, Blocks, Ring

_LARGEST = tl.constexpr(65504.0)  # of fp16
_TOGETHER = tl.constexpr(128)  # channels
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: added and taken off, it rounds half to even


@triton.jit
def _to_half(x, DOWN: tl.constexpr):
    """To fp16, never up or never down."""
    TOWARD: tl.constexpr = -1 if DOWN else 1
    near = x.to(tl.float16)
    back = near.to(tl.float32)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32)
    beyond = back > x if DOWN else back < x
    # The next number lies a step further from zero, or closer to it. That is one sum: of two, with
    # 1 and with -1, ptxas 12.8 to 13.0 makes one of 16-bit pairs, with the bits in one half only.
    step = bits + tl.where(back > 0, TOWARD, -TOWARD)
    beside = tl.where(back == 0, -32767 if DOWN else 1, step)
    return tl.where(beyond, beside, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _range(x, inside, AXIS: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr):
    """Scale and minimum of the numbers along an axis, fp16; NaN where one of them is."""
    is_number = inside & (x == x)
    low = tl.min(tl.where(is_number, x, _LARGEST), AXIS)
    high = tl.max(tl.where(is_number, x, -_LARGEST), AXIS)
    cut = (1 - CLIP) / 2 * (high - low)
    minimum = _to_half(low + cut, True)
    scale = _to_half(tl.div_rn(high - cut - minimum.to(tl.float32), TOP), False)
    broken = tl.max((inside & (x != x)).to(tl.int32), AXIS) > 0
    return tl.where(broken, float("nan"), scale), tl.where(broken, float("nan"), minimum)


@triton.jit
def _code(x, scale, minimum, TOP: tl.constexpr):
    """round((x - m) / s) between 0 and TOP; 0 for NaN."""
    s, m = scale.to(tl.float32), minimum.to(tl.float32)
    code = tl.div_rn(x - m, tl.where(s == 0.0, 1.0, s))
    code = tl.minimum(tl.maximum(code, 0.0), TOP)
    code = (code + _TO_INTEGER) - _TO_INTEGER
    return tl.where(code == code, code, 0.0).to(tl.int32)


@triton.jit
def _numbers(x, at, inside):
    """Numbers as far as fp16 holds them."""
    found = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    held = tl.minimum(tl.maximum(found, -_LARGEST), _LARGEST)
    return tl.where(found == found, held, found)


@triton.jit
def _pack_lines(
    x, stride, lines, scale, minimum, first, channel, is_channel,
    BIT: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, SINK: tl.constexpr,
    ROOM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Writes the BITS bits from BIT on of the codes of a block, a line `[SIZE]` per channel."""
    BYTES: tl.constexpr = SIZE * BITS // 8
    byte = tl.arange(0, BYTES)
    inside = is_channel[None, :] & (byte >= 0)[:, None]
    words = tl.zeros((BYTES, channel.shape[0]), tl.int32)
    for field in tl.static_range(8 // BITS):
        slot = (SINK + (first + field * BYTES + byte) % ROOM).to(tl.int64)
        found = _numbers(x, slot[:, None] * stride + channel[None, :], inside)
        code = _code(found, scale[None, :], minimum[None, :], TOP)
        words |= ((code >> BIT) & ((1 << BITS) - 1)) << (BITS * field)
    tl.store(lines[None, :] + byte[:, None], words.to(tl.uint8), mask=inside)


@triton.jit
def due_block(length, SINK: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Whether the newest token of a row has made a block complete, and which."""
    gone = length - SINK - WINDOW
    return (gone >= SIZE) & (gone % SIZE == 0), gone // SIZE - 1


@triton.jit
def pack_channels(
    x, stride, first, channel, is_channel, lines, scales, SINK: tl.constexpr, ROOM: tl.constexpr,
    SIZE: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Packs channels of a block: a line `[SIZE]`, a scale and a minimum each.

    Args:
        x: Where a ring begins, whose tokens are `stride` apart; first: an offset there.
        channel: `[n]`, which of a token's numbers; is_channel: `[n]`, which of these there are.
        lines, scales: `[n]`, where they are written.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    token = tl.arange(0, SIZE)
    slot = (SINK + (first + token) % ROOM).to(tl.int64)
    inside = is_channel[None, :] & (token >= 0)[:, None]
    numbers = _numbers(x, slot[:, None] * stride + channel[None, :], inside)
    scale, minimum = _range(numbers, inside, 0, CLIP, TOP)
    tl.store(scales, scale, mask=is_channel)
    tl.store(scales + 1, minimum, mask=is_channel)
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    _pack_lines(
        x, stride, lines, scale, minimum, first, channel, is_channel, 0, LOW, TOP, SINK, ROOM, SIZE
    )
    if BITS == 3:
        _pack_lines(
            x, stride, lines + SIZE * LOW // 8, scale, minimum, first, channel, is_channel, LOW, 1,
            TOP, SINK, ROOM, SIZE,
        )  # fmt: skip


@triton.jit
def _pack_values(
    values, lines, scales, BIT: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same with a line `[WIDTH]` per token, which begins at `values [SIZE]`."""
    BYTES: tl.constexpr = WIDTH * BITS // 8
    EACH: tl.constexpr = min(PADDED, _TOGETHER) * BITS // 8
    for start in range(0, BYTES, EACH):
        byte = start + tl.arange(0, EACH)
        inside = tl.broadcast_to((byte < BYTES)[None, :], (lines.shape[0], EACH))
        words = tl.zeros((lines.shape[0], EACH), tl.int32)
        for field in tl.static_range(8 // BITS):
            column = field * BYTES + byte
            x = _numbers(values[:, None], column[None, :], inside)
            at = scales[:, None] + (column // GROUP)[None, :] * 2
            scale = tl.load(at, mask=inside, other=0.0)
            minimum = tl.load(at + 1, mask=inside, other=0.0)
            code = _code(x, scale, minimum, TOP)
            words |= ((code >> BIT) & ((1 << BITS) - 1)) << (BITS * field)
        tl.store(lines[:, None] + byte[None, :], words.to(tl.uint8), mask=inside)


@triton.jit
def _pack(
    keys, values, key_codes, key_scales, value_codes, value_scales, rings, table, lengths,
    stride_kr, stride_kh, stride_kt, stride_vr, stride_vh, stride_vt, stride_table,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_LINE: tl.constexpr, KEY_CLIP: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_LINE: tl.constexpr, VALUE_CLIP: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    due, block = due_block(tl.load(lengths + row), SINK, WINDOW, SIZE)
    if not due:
        return
    page = tl.load(table + row * stride_table + block // EACH).to(tl.int64)
    own = (page * tl.num_programs(1) + head) * EACH + block % EACH
    ring = tl.load(rings + row).to(tl.int64)
    first = block * SIZE
    ROOM: tl.constexpr = WINDOW + SIZE
    v_base = values + ring * stride_vr + head * stride_vh
    token = tl.arange(0, SIZE)
    slot = (SINK + (first + token) % ROOM).to(tl.int64)

    k_base = keys + ring * stride_kr + head * stride_kh
    for start in range(0, WIDTH, min(PADDED, _TOGETHER)):
        channel = start + tl.arange(0, min(PADDED, _TOGETHER))
        line = own * WIDTH + channel
        pack_channels(
            k_base, stride_kt, first, channel, channel < WIDTH, key_codes + line * KEY_LINE,
            key_scales + line * 2, SINK, ROOM, SIZE, KEY_BITS, KEY_CLIP,
        )  # fmt: skip

    V_TOP: tl.constexpr = (1 << VALUE_BITS) - 1
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    at = value_scales + (own * SIZE + token) * (GROUPS * 2)
    for j in tl.static_range(GROUPS):
        column = j * GROUP + tl.arange(0, GROUP)
        inside = (column < WIDTH)[None, :] & (token >= 0)[:, None]
        v = _numbers(v_base, slot[:, None] * stride_vt + column[None, :], inside)
        scale, minimum = _range(v, inside, 1, VALUE_CLIP, V_TOP)
        tl.store(at + j * 2, scale)
        tl.store(at + j * 2 + 1, minimum)
    tl.debug_barrier()  # other threads read these scales
    line = value_codes + (own * SIZE + token) * VALUE_LINE
    V_LOW: tl.constexpr = 2 if VALUE_BITS == 3 else VALUE_BITS
    _pack_values(v_base + slot * stride_vt, line, at, 0, V_LOW, V_TOP, WIDTH, PADDED, GROUP)
    if VALUE_BITS == 3:
        line += WIDTH * V_LOW // 8
        _pack_values(v_base + slot * stride_vt, line, at, V_LOW, 1, V_TOP, WIDTH, PADDED, GROUP)


def pack_blocks(ring: Ring, blocks: Blocks, lengths: Tensor) -> None:
    """See :func:`kvtool.kernels.packed_attention.paged.pack_blocks`."""
    heads, _, width = ring.keys.shape[1:]
    size = blocks.size
    _pack[(len(lengths), heads)](
        ring.keys, ring.values, *blocks.planes, ring.rows, blocks.table, lengths,
        *ring.keys.stride()[:3], *ring.values.stride()[:3], blocks.table.stride(0),
        WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)), SINK=ring.sink,
        WINDOW=ring.window, SIZE=size, EACH=PAGE // size, GROUP=size,
        KEY_BITS=blocks.key_bits, KEY_LINE=blocks.keys.shape[-1], KEY_CLIP=blocks.key_clip,
        VALUE_BITS=blocks.value_bits, VALUE_LINE=blocks.values.shape[-1],
        VALUE_CLIP=blocks.value_clip, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
