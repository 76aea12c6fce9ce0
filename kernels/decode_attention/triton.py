"""Split-KV flash decoding over paged memory.

Every item of the work (`cut_triton.py`) gets its own softmax, for all query heads of a KV head
together, so that keys and values are loaded once; then the items of a row and head are merged.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.decode_attention.cut_triton import Config, Cut, find_item
from kvtool.kernels.tiles import (
    INTERPRETED,
    dot,
    gdc_launch_dependents,
    load_columns,
    lying_together,
    precision,
    processors,
    store_columns,
    tiles_of,
    weigh,
)

_LOG2_E = tl.constexpr(math.log2(math.e))


def config_for(group: int, width: int, itemsize: int, in_keys: bool, slots: float) -> Config:
    """What measured fastest on Hopper, but for codes above 640 numbers and fp32, where it is what
    fits, and e4m3 wider than 256; nothing depends on the lengths.

    Args:
        group: Query heads of a KV head.
        width: The larger of the keys' and the values' width.
        itemsize: Bytes of a number: 1 of e4m3, which is multiplied as float16.
        in_keys: Whether the values are a part of the keys.
        slots: Rows times KV heads, per multiprocessor.
    """
    if itemsize == 1:  # one warp waits for no other
        few, lone = group <= 8, slots < 0.1
        heads = 8 if few else None
        if width <= 64 and lone:
            return Config(block_n=64, least=2, items=3, warps=4, stages=5)
        if width <= 64:
            return Config(32, least=2, items=12, warps=1, stages=5, heads=heads, tokens_first=few)
        if width <= 128:
            items = 4 if lone else 8 if few else 7
            return Config(
                32, least=2, items=items, warps=1, stages=5, heads=heads, tokens_first=few
            )
        if width <= 256 and few:
            return Config(16, least=2, items=7, warps=1, stages=5, heads=heads, tokens_first=True)
        return Config(block_n=32, least=2, items=3, warps=4, stages=5)
    if itemsize == 4:
        return Config(
            block_n=16 if width > 256 else 32, least=2, items=2, warps=4, stages=2,
            heads=16 if width > 256 else None,
        )  # fmt: skip
    if width > 640 and in_keys:
        return Config(block_n=64, least=2, items=1, warps=8, stages=3, heads=16)
    if in_keys and group > 32:
        return Config(block_n=32, least=2, items=1, warps=8, stages=5, heads=64)
    if in_keys and group <= 16 and width > 256:
        return Config(block_n=64, least=2, items=1, warps=4, stages=5)
    if in_keys:
        return Config(block_n=32 if width > 256 else 64, least=2, items=2, warps=4, stages=5)
    if width > 256:  # of more than 32 heads, queries would leave no room
        few = None if group <= 32 else 32
        tile, stages = (64, 2) if width <= 640 else (16, 4)
        return Config(tile, least=2, items=1, warps=8, stages=stages, heads=few)
    if 64 < width <= 128 and slots <= 2:  # beyond, an item of each would not run at once
        return Config(block_n=64, least=2, items=2, warps=4, stages=5)
    if width > 64:
        return Config(block_n=32, least=2, items=4, warps=4, stages=6)
    return Config(block_n=64, least=2, items=3, warps=4, stages=6)


@triton.jit
def places_of(
    tile, token, inside, row, table, stride_table,
    PAGED: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The page of all tokens of a tile, or of each; and where they lie in it `[BLOCK_N]`.

    Args:
        token: `[BLOCK_N]`, their numbers; inside: `[BLOCK_N]`, which of them there are.
    """
    if not PAGED:
        page = row.to(tl.int64)
        within = token
    elif PAGE % BLOCK_N == 0:  # a tile lies in one page
        page = tl.load(table + row * stride_table + tile // (PAGE // BLOCK_N)).to(tl.int64)
        within = (tile % (PAGE // BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        page = tl.load(
            table + row * stride_table + token // PAGE, mask=inside, other=0
        ).to(tl.int64)  # fmt: skip
        within = token % PAGE
    return page, within


_HALVES = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")


@triton.jit
def _summands(v, DTYPE: tl.constexpr):
    """Values as they are multiplied."""
    if INTERPRETED or not v.dtype.is_fp8() or DTYPE.is_fp32():
        found = v.to(DTYPE)
    else:
        # It says that it is not pure, so that numbers change threads, and not bytes, which would be
        # fetched from shared memory one by one.
        found = tl.inline_asm_elementwise(_HALVES, "=r,=r,r", [v], tl.float16, False, pack=4)
    return found


@triton.jit
def _scores(q, k, scores, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Adds `q [M, K]` times `k [N, K]`: `[M, N]`, or `[N, M]`."""
    if TOKENS_FIRST:
        found = dot(k, tl.trans(q), scores, PRECISION)
    else:
        found = dot(q, tl.trans(k), scores, PRECISION)
    return found


@triton.jit
def _add(sums, weights, v, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Adds values `[N, V]` times weights: `[M, V]`, or `[V, M]`."""
    if TOKENS_FIRST:
        found = dot(tl.trans(v), weights, sums, PRECISION)
    else:
        found = dot(weights, v, sums, PRECISION)
    return found


@triton.jit
def _zeros(HEADS: tl.constexpr, OTHERS: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    if TOKENS_FIRST:
        found = tl.zeros((OTHERS, HEADS), tl.float32)
    else:
        found = tl.zeros((HEADS, OTHERS), tl.float32)
    return found


@triton.jit
def _attend(
    q, keys, values, bias, table, lengths, key_scales, value_scales,
    ring_keys, ring_values, places, out, lse,
    stride_qb, stride_qh,
    stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt, stride_bp, stride_bh,
    stride_rkp, stride_rkh, stride_rkt, stride_rvp, stride_rvh, stride_rvt,
    stride_table, stride_row, stride_head,
    rows, heads, paged_heads, group, first, items, scale,
    K_WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    V_WIDTH: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAGED: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if TOKENS_FIRST else 1  # of tokens in scores
    item = tl.program_id(1)
    if PDL:  # the merge may start to wait
        gdc_launch_dependents()
    there, row, head, length, begin, end = find_item(
        item, lengths, stride_row, stride_head, rows, heads, first // BLOCK_N, items,
        BLOCK_N, LEAST, SLOTS,
    )  # fmt: skip
    if not there:
        return

    # e4m3 becomes float16 in one instruction for two numbers, without a loss.
    FLOAT8: tl.constexpr = keys.dtype.element_ty.is_fp8() and not q.dtype.element_ty.is_fp32()
    DTYPE: tl.constexpr = tl.float16 if FLOAT8 else q.dtype.element_ty
    if key_scales is not None:
        scale *= tl.load(key_scales + head)
    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # query heads of the KV head
    is_member = member < group
    # A width of no power of two takes two tiles; the part of a latent that is no value, its own.
    K01: tl.constexpr = V_WIDTH if VALUES_IN_KEYS else K_WIDTH
    q_at = row.to(tl.int64) * stride_qb + (head * group + member) * stride_qh
    k0_at = tl.arange(0, K0)
    q0 = load_columns(q, q_at, k0_at, is_member, K01, K0 <= K01).to(DTYPE)
    if K1:
        k1_at = K0 + tl.arange(0, K1)
        q1 = load_columns(q, q_at, k1_at, is_member, K01, K0 + K1 <= K01).to(DTYPE)
    if K2:
        k2_at = K01 + tl.arange(0, K2)
        q2 = load_columns(q, q_at, k2_at, is_member, K_WIDTH, K01 + K2 <= K_WIDTH).to(DTYPE)
    if not VALUES_IN_KEYS:
        v0_at = tl.arange(0, V0)
        if V1:
            v1_at = V0 + tl.arange(0, V1)
    if ring_keys is not None:  # the heads behind those in pages
        in_ring = head >= paged_heads
        head = tl.where(in_ring, head - paged_heads, head)
        place = tl.load(places + row).to(tl.int64)
        keys, values = tl.where(in_ring, ring_keys, keys), tl.where(in_ring, ring_values, values)
        stride_kp = tl.where(in_ring, stride_rkp, stride_kp)
        stride_kh = tl.where(in_ring, stride_rkh, stride_kh)
        stride_kt = tl.where(in_ring, stride_rkt, stride_kt)
        stride_vp = tl.where(in_ring, stride_rvp, stride_vp)
        stride_vh = tl.where(in_ring, stride_rvh, stride_vh)
        stride_vt = tl.where(in_ring, stride_rvt, stride_vt)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    sum0 = _zeros(BLOCK_M, V0, TOKENS_FIRST)
    if V1:
        sum1 = _zeros(BLOCK_M, V1, TOKENS_FIRST)
    for tile in range(begin, end):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (token < length) & (token >= first)
        if ring_keys is None:
            page, within = places_of(
                tile, token, inside, row, table, stride_table, PAGED, PAGE, BLOCK_N
            )
        else:  # a table may end before a ring does
            page, within = places_of(
                tl.where(in_ring, 0, tile), token, inside & (not in_ring), row, table, stride_table,
                PAGED, PAGE, BLOCK_N,
            )  # fmt: skip
            page = tl.where(in_ring, place, page)
            within = tl.where(in_ring, token, within)
        k_at = page * stride_kp + head * stride_kh + within.to(tl.int64) * stride_kt
        k0 = load_columns(keys, k_at, k0_at, inside, K01, K0 <= K01).to(DTYPE)
        scores = _scores(q0, k0, _zeros(BLOCK_M, BLOCK_N, TOKENS_FIRST), TOKENS_FIRST, PRECISION)
        if K1:
            k1 = load_columns(keys, k_at, k1_at, inside, K01, K0 + K1 <= K01).to(DTYPE)
            scores = _scores(q1, k1, scores, TOKENS_FIRST, PRECISION)
        if K2:
            k2 = load_columns(keys, k_at, k2_at, inside, K_WIDTH, K01 + K2 <= K_WIDTH).to(DTYPE)
            scores = _scores(q2, k2, scores, TOKENS_FIRST, PRECISION)
        scores *= scale
        if HAS_BIAS:
            b_at = page * stride_bp + head * stride_bh + within
            added = tl.load(bias + b_at, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
            scores += tl.expand_dims(added, 1 - AXIS)
        scores = tl.where(tl.expand_dims(inside, 1 - AXIS), scores, -float("inf"))
        weights, shrink, top = weigh(scores, top, AXIS)
        mass = mass * shrink + tl.sum(weights, AXIS)
        sum0 *= tl.expand_dims(shrink, AXIS)
        if V1:
            sum1 *= tl.expand_dims(shrink, AXIS)
        if VALUES_IN_KEYS:
            weights = weights.to(k0.dtype)
            sum0 = _add(sum0, weights, k0, TOKENS_FIRST, PRECISION)
            if V1:
                sum1 = _add(sum1, weights, k1, TOKENS_FIRST, PRECISION)
        else:
            v_at = page * stride_vp + head * stride_vh + within.to(tl.int64) * stride_vt
            v0 = load_columns(values, v_at, v0_at, inside, V_WIDTH, V0 <= V_WIDTH)
            weights = weights.to(DTYPE)
            sum0 = _add(sum0, weights, _summands(v0, DTYPE), TOKENS_FIRST, PRECISION)
            if V1:
                v1 = load_columns(values, v_at, v1_at, inside, V_WIDTH, V0 + V1 <= V_WIDTH)
                sum1 = _add(sum1, weights, _summands(v1, DTYPE), TOKENS_FIRST, PRECISION)

    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    part = item.to(tl.int64) * group + member
    tl.store(lse + part, top + tl.log2(safe_mass), mask=is_member)
    if value_scales is not None:
        safe_mass /= tl.load(value_scales + head)
    if TOKENS_FIRST:
        sum0 = tl.trans(sum0)
    at = part * V_WIDTH
    store_columns(out, at, tl.arange(0, V0), is_member, V_WIDTH, sum0 / safe_mass[:, None])
    if V1:
        if TOKENS_FIRST:
            sum1 = tl.trans(sum1)
        store_columns(out, at, V0 + tl.arange(0, V1), is_member, V_WIDTH, sum1 / safe_mass[:, None])


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def paged_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor | int,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    rings: tuple[Tensor, Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.decode_attention.reference.paged_decode_attention`.

    Args:
        config: See :func:`config_for`, which gives it where it is not given.
    """
    q = lying_together(q)
    query_heads, k_width = q.shape[1:]
    paged_heads, page = keys.shape[1:3]
    heads = paged_heads + (0 if rings is None else rings[0].shape[1])
    in_keys = isinstance(values, int)
    v = keys if isinstance(values, int) else values
    v_width = values if isinstance(values, int) else values.shape[-1]
    k0, k1 = tiles_of(v_width if in_keys else k_width)
    k2 = triton.next_power_of_2(max(16, k_width - v_width)) if in_keys and k_width > v_width else 0
    v0, v1 = tiles_of(v_width)
    if config is None:
        width = max(k_width, v_width)
        itemsize = 4 if q.dtype == torch.float32 else keys.element_size()
        slots = len(q) * heads / processors(q.device)
        config = config_for(query_heads // heads, width, itemsize, in_keys, slots)
    if out is None:
        out = torch.empty((*q.shape[:2], v_width), dtype=q.dtype, device=q.device)
    tokens = page * (1 if table is None else table.shape[1])
    if rings is not None:
        tokens = max(tokens, rings[0].shape[2])
    cut = Cut(out, lengths, heads, first, config, tokens)
    _attend[cut.grid](
        q, keys, v, bias, table, lengths, *(scales or (None, None)), *(rings or (None,) * 3),
        cut.parts, cut.part_lse, *_strides(q, 2), *_strides(keys, 3), *_strides(v, 3),
        *_strides(bias, 2), *_strides(rings and rings[0], 3), *_strides(rings and rings[1], 3),
        *_strides(table, 1), *cut.strides,
        cut.rows, heads, paged_heads, cut.group, first, cut.items, scaling * math.log2(math.e),
        K_WIDTH=k_width, K0=k0, K1=k1, K2=k2, V_WIDTH=v_width, V0=v0, V1=v1,
        VALUES_IN_KEYS=in_keys, HAS_BIAS=bias is not None,
        PAGED=table is not None, PAGE=page, PRECISION=precision(q.dtype),
        TOKENS_FIRST=config.tokens_first, BLOCK_M=cut.block_m,
        num_warps=config.warps, num_stages=config.stages, **cut.constants,
        enable_fp_fusion=True,
    )  # fmt: skip
    return cut.merge(sink_logits)
