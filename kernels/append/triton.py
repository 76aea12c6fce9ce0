"""The same in one launch: a program per row and head, and programs per row block and code block.

The programs that encode rotate the keys again, for themselves: that costs less than a second launch
which waits for the first, as what they read besides, the encoder, is far larger than the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.append.reference import LARGEST, Encoder
from kvtool.kernels.tiles import dot, lying_together, precision, rounded

_CODES = 16  # numbers of a code per program
_LARGEST = tl.constexpr(LARGEST)


def append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    q: Tensor | None = None,
    *,
    out: Tensor | None = None,
    key_code: Encoder | None = None,
    value_code: Encoder | None = None,
    code_slots: Tensor | None = None,
    code_rotated: bool = True,
    scales: tuple[Tensor, Tensor] | None = None,
    rings: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor | None:
    """See `reference.py`."""
    k, v = lying_together(k), lying_together(v)
    batch, heads, width = k.shape
    queries = 0 if q is None else q.shape[1]
    if q is not None:
        q = lying_together(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    code_slots = slots if code_slots is None else code_slots
    coded = key_code is not None or value_code is not None
    rows = min(64, max(16, triton.next_power_of_2(batch)))
    blocks = [
        0 if code is None else triton.cdiv(batch, rows) * triton.cdiv(code.weight.shape[1], _CODES)
        for code in (key_code, value_code)
    ]
    grid = (batch * (queries + heads) + sum(blocks),)
    _append[grid](
        q, out, k, v, cos, sin, slots, code_slots, key_pages, value_pages,
        *(scales or (None, None)), *(rings or (None,) * 3),
        *_encoder_arguments(key_code), *_encoder_arguments(value_code), batch, blocks[0],
        *(stride for x in (q, out) for stride in ((0, 0) if x is None else x.stride()[:2])),
        *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
        *key_pages.stride()[:3], *value_pages.stride()[:3],
        key_pages.shape[2], value_pages.shape[2],
        *((0,) * 7 if rings is None else _ring_arguments(*rings[:2])),
        QUERIES=queries, HEADS=heads, PAGED=key_pages.shape[1], HALF=width // 2, VALUES=v.shape[2],
        ROWS=rows, CODES=_CODES, CODED=coded, KEYS_CODED=key_code is not None,
        VALUES_CODED=value_code is not None, CODE_ROTATED=code_rotated,
        PRECISION=precision(k.dtype),
        num_warps=4 if coded else 1,
        # An encoder is all that comes from memory: where there is room, it is asked for at once.
        num_stages=8 if rows < 64 and k.element_size() == 2 else 3,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _encoder_arguments(code: Encoder | None) -> tuple[Tensor | int | None, ...]:
    if code is None:
        return (None, None, None, 0, 0, 0, 0, 1, 0)
    page, _, place, _ = code.pages.stride()
    size, width = code.pages.shape[2:]
    return (code.weight, code.bias, code.pages, *code.weight.stride(), page, place, size, width)


def _ring_arguments(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    return (*keys.stride()[:3], *values.stride()[:3], keys.shape[2])


@triton.jit
def _append(
    q_ptr, out_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, code_slots_ptr,
    key_pages_ptr, value_pages_ptr, key_scales_ptr, value_scales_ptr,
    ring_keys_ptr, ring_values_ptr, ring_slots_ptr,
    key_weight_ptr, key_bias_ptr, key_codes_ptr, key_weight_row, key_weight_column,
    key_codes_page, key_codes_place, key_codes_size, key_codes_width,
    value_weight_ptr, value_bias_ptr, value_codes_ptr, value_weight_row, value_weight_column,
    value_codes_page, value_codes_place, value_codes_size, value_codes_width,
    batch, key_blocks,
    q_row, q_head, out_row, out_head, k_row, k_head, v_row, v_head, cos_row, sin_row,
    key_page, key_head, key_place, value_page, value_head, value_place, key_size, value_size,
    ring_key, ring_key_head, ring_key_place, ring_value, ring_value_head, ring_value_place,
    ring_size,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, PAGED: tl.constexpr,
    HALF: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, CODED: tl.constexpr, KEYS_CODED: tl.constexpr,
    VALUES_CODED: tl.constexpr, CODE_ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program - batch * (QUERIES + HEADS)
    if block < 0:
        row = (program // (QUERIES + HEADS)).to(tl.int64)
        head = program % (QUERIES + HEADS)
        cos_ptr += row * cos_row
        sin_ptr += row * sin_row
        if head < QUERIES:
            if QUERIES > 0:
                to = out_ptr + row * out_row + head * out_head
                source = q_ptr + row * q_row + head * q_head
                _rotate_head(source, to, None, cos_ptr, sin_ptr, HALF)
        else:
            head -= QUERIES
            place = head.to(tl.int64)  # of the head, in a page
            if ring_keys_ptr is not None:  # as if rings were pages
                rings = head >= PAGED
                place = tl.where(rings, place - PAGED, place)
                slots_ptr = tl.where(rings, ring_slots_ptr, slots_ptr)
                key_pages_ptr = tl.where(rings, ring_keys_ptr, key_pages_ptr)
                value_pages_ptr = tl.where(rings, ring_values_ptr, value_pages_ptr)
                key_page = tl.where(rings, ring_key, key_page)
                key_head = tl.where(rings, ring_key_head, key_head)
                key_place = tl.where(rings, ring_key_place, key_place)
                value_page = tl.where(rings, ring_value, value_page)
                value_head = tl.where(rings, ring_value_head, value_head)
                value_place = tl.where(rings, ring_value_place, value_place)
                key_size = tl.where(rings, ring_size, key_size)
                value_size = tl.where(rings, ring_size, value_size)
            slot = tl.load(slots_ptr + row)
            if slot >= 0:
                to = key_pages_ptr + slot // key_size * key_page + slot % key_size * key_place
                source = k_ptr + row * k_row + head * k_head
                to += place * key_head
                key_scale, value_scale = None, None
                if key_scales_ptr is not None:
                    key_scale = tl.load(key_scales_ptr + head)
                    value_scale = tl.load(value_scales_ptr + head)
                _rotate_head(source, to, key_scale, cos_ptr, sin_ptr, HALF)
                at = tl.arange(0, triton.next_power_of_2(VALUES))
                values = tl.load(v_ptr + row * v_row + head * v_head + at, at < VALUES)
                to = value_pages_ptr + slot // value_size * value_page
                to += slot % value_size * value_place + place * value_head
                _put(to + at, values, value_scale, at < VALUES)
    elif CODED:
        if KEYS_CODED and block < key_blocks:
            _encode(
                k_ptr, k_row, k_head, cos_ptr, cos_row, sin_ptr, sin_row, key_weight_ptr,
                key_weight_row, key_weight_column, key_bias_ptr, key_codes_ptr, key_codes_page,
                key_codes_place, key_codes_size, key_codes_width, code_slots_ptr, batch, block,
                HEADS, 2 * HALF, CODE_ROTATED, ROWS, CODES, PRECISION,
            )  # fmt: skip
        elif VALUES_CODED:
            _encode(
                v_ptr, v_row, v_head, cos_ptr, cos_row, sin_ptr, sin_row, value_weight_ptr,
                value_weight_row, value_weight_column, value_bias_ptr, value_codes_ptr,
                value_codes_page, value_codes_place, value_codes_size, value_codes_width,
                code_slots_ptr, batch, block - key_blocks, HEADS, VALUES, False, ROWS, CODES,
                PRECISION,
            )  # fmt: skip


@triton.jit
def _put(to, x, scale, there):
    """Writes numbers, divided by a scale if there is one, in the dtype that lies there."""
    if scale is not None:
        x = tl.div_rn(x.to(tl.float32), scale)
        x = tl.clamp(x, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(to, rounded(x, to.dtype.element_ty), there)
    else:
        tl.store(to, x.to(to.dtype.element_ty), there)


@triton.jit
def _rotate_head(source_ptr, to_ptr, scale, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Rotates the `2 · HALF` channels at `source_ptr` into `to_ptr`."""
    at = tl.arange(0, triton.next_power_of_2(HALF))
    real, imag = _rotated(
        source_ptr + at, cos_ptr + at, sin_ptr + at, at < HALF, HALF
    )  # before the stores: the two may be the same memory
    _put(to_ptr + at, real, scale, at < HALF)
    _put(to_ptr + HALF + at, imag, scale, at < HALF)


@triton.jit
def _rotated(source, cos, sin, seen, HALF: tl.constexpr):
    """Both halves of what is at pointers to the first half, in the dtype of the source."""
    real = tl.load(source, seen, 0.0)
    kind = real.dtype
    real = real.to(tl.float32)
    imag = tl.load(source + HALF, seen, 0.0).to(tl.float32)
    turned = real * tl.load(cos, seen, 0.0).to(tl.float32)
    turned -= imag * tl.load(sin, seen, 0.0).to(tl.float32)
    other = imag * tl.load(cos + HALF, seen, 0.0).to(tl.float32)
    other += real * tl.load(sin + HALF, seen, 0.0).to(tl.float32)
    return turned.to(kind), other.to(kind)


@triton.jit
def _encode(
    x_ptr, x_row, x_head, cos_ptr, cos_row, sin_ptr, sin_row, weight_ptr, weight_row, weight_column,
    bias_ptr, codes_ptr, codes_page, codes_place, codes_size, codes_width, slots_ptr, batch, block,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the codes of a block of rows: x W + b, head by head."""
    row_blocks = tl.cdiv(batch, ROWS)
    row = ((block % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (block // row_blocks) * CODES + tl.arange(0, CODES)
    there, stored = row < batch, column < codes_width
    PART: tl.constexpr = WIDTH // 2 if ROTATED else WIDTH
    PADDED: tl.constexpr = max(16, triton.next_power_of_2(PART))
    at = tl.arange(0, PADDED)
    seen = there[:, None] & (at < PART)
    used = (at < PART)[:, None] & stored
    x_ptr += row[:, None] * x_row + at
    weight_ptr += at[:, None] * weight_row + column * weight_column
    codes = tl.zeros((ROWS, CODES), tl.float32)
    for head in range(HEADS):
        weight = tl.load(weight_ptr + head * WIDTH * weight_row, used, 0.0)
        if ROTATED:
            cos, sin = cos_ptr + row[:, None] * cos_row + at, sin_ptr + row[:, None] * sin_row + at
            real, imag = _rotated(x_ptr + head * x_head, cos, sin, seen, PART)
            codes = dot(real, weight, codes, PRECISION)
            weight = tl.load(weight_ptr + (head * WIDTH + PART) * weight_row, used, 0.0)
            codes = dot(imag, weight, codes, PRECISION)
        else:
            x = tl.load(x_ptr + head * x_head, seen, 0.0)
            codes = dot(x, weight, codes, PRECISION)
    if bias_ptr is not None:
        codes += tl.load(bias_ptr + column, stored, 0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row, there, -1)
    to = codes_ptr + (slot // codes_size * codes_page + slot % codes_size * codes_place)[:, None]
    written = (slot >= 0)[:, None] & stored
    tl.store(to + column, codes.to(codes_ptr.dtype.element_ty), written)
