"""Flash attention to sinks and a window: a block of queries per program, over what it can see."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import (
    dot,
    load_columns,
    lying_together,
    precision,
    store_columns,
    tiles_of,
    weigh,
)

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _attend(
    q, k, v, sink_logits, out, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, tokens, columns, sink, window, start, scale,
    WIDTH: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q += row * stride_qb + head * stride_qh
    k += row * stride_kb + head // group * stride_kh
    v += row * stride_vb + head // group * stride_vh
    out += row * stride_ob + head * stride_oh
    last = tl.minimum(first + BLOCK_M, tokens)
    # Columns before `sinks` are the positions from 0 on, the others lie `skipped` further back.
    sinks = tl.minimum(sink, columns)
    skipped = start + tokens - columns
    oldest = tl.maximum(sinks, start + first - window + 1 - skipped)
    newest = tl.maximum(oldest, start + last - skipped)
    sink_tiles = tl.cdiv(tl.minimum(sinks, start + last), BLOCK_N)

    query = first + tl.arange(0, BLOCK_M)
    is_query = query < tokens
    query_at = start + query
    at0 = tl.arange(0, W0)
    q_at = query.to(tl.int64) * stride_qt
    q0 = load_columns(q, q_at, at0, is_query, WIDTH, W0 <= WIDTH)
    if W1:
        at1 = W0 + tl.arange(0, W1)
        q1 = load_columns(q, q_at, at1, is_query, WIDTH, W0 + W1 <= WIDTH)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    if sink_logits is not None:
        logit = tl.load(sink_logits + head).to(tl.float32) * _LOG2_E
        top, mass = tl.zeros((BLOCK_M,), tl.float32) + logit, mass + 1.0
    sum0 = tl.zeros((BLOCK_M, W0), tl.float32)
    if W1:
        sum1 = tl.zeros((BLOCK_M, W1), tl.float32)
    for tile in range(0, sink_tiles + tl.cdiv(newest - oldest, BLOCK_N)):
        is_sink = tile < sink_tiles
        begin = tl.where(is_sink, tile * BLOCK_N, oldest + (tile - sink_tiles) * BLOCK_N)
        column = begin + tl.arange(0, BLOCK_N)
        inside = column < tl.where(is_sink, sinks, newest)
        k_at, v_at = column.to(tl.int64) * stride_kt, column.to(tl.int64) * stride_vt
        k0 = load_columns(k, k_at, at0, inside, WIDTH, W0 <= WIDTH)
        scores = dot(q0, tl.trans(k0), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if W1:
            k1 = load_columns(k, k_at, at1, inside, WIDTH, W0 + W1 <= WIDTH)
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
        key_at = column + tl.where(is_sink, 0, skipped)
        distance = query_at[:, None] - key_at[None, :]
        visible = inside[None, :] & (distance >= 0) & (is_sink | (distance < window))
        scores = tl.where(visible, scores * scale, -float("inf"))
        weights, shrink, top = weigh(scores, top, 1)
        mass = mass * shrink + tl.sum(weights, 1)
        v0 = load_columns(v, v_at, at0, inside, WIDTH, W0 <= WIDTH)
        weights = weights.to(v0.dtype)
        sum0 = dot(weights, v0, sum0 * shrink[:, None], PRECISION)
        if W1:
            v1 = load_columns(v, v_at, at1, inside, WIDTH, W0 + W1 <= WIDTH)
            sum1 = dot(weights, v1, sum1 * shrink[:, None], PRECISION)
    mass = tl.where(is_query, mass, 1.0)  # nobody asks behind the last token
    kind = out.dtype.element_ty
    o_at = query.to(tl.int64) * stride_ot
    store_columns(out, o_at, at0, is_query, WIDTH, (sum0 / mass[:, None]).to(kind))
    if W1:
        store_columns(out, o_at, at1, is_query, WIDTH, (sum1 / mass[:, None]).to(kind))


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, sink: int, window: int, scaling: float, start: int = 0,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `reference.py`; without gradients."""
    q, k, v = (lying_together(x) for x in (q, k, v))
    batch, heads, tokens, width = q.shape
    # By tokens, as the output projection reads it.
    out = torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
    w0, w1 = tiles_of(width)
    block = 32 if q.element_size() == 4 else 64
    _attend[(triton.cdiv(tokens, block), batch * heads)](
        q, k, v, sink_logits, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, heads // k.shape[1], tokens, k.shape[2], sink, window, start,
        scaling * math.log2(math.e), WIDTH=width, W0=w0, W1=w1, PRECISION=precision(q.dtype),
        BLOCK_M=block, BLOCK_N=block, num_warps=8 if width > 128 else 4,
        num_stages=2 if width > 128 else 3,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out
