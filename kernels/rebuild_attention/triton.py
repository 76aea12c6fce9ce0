"""Split-KV flash decoding whose keys are rebuilt and rotated in the kernel.

The work is cut, and its parts are merged, as in decode attention. For a tile of tokens, a program
of one KV head multiplies the codes with both halves of the head's decoder, turns them against each
other, which is all that RoPE does, and goes on as if the keys had been loaded. A decoder of a few
rows stays on the chip; one of many is read again for every tile, from the L2 cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.decode_attention.cut_triton import Config, Cut, find_item
from kvtool.kernels.decode_attention.triton import places_of
from kvtool.kernels.tiles import (
    dot,
    gdc_launch_dependents,
    load_columns,
    precision,
    store_columns,
    tiles_of,
    weigh,
)


def config_for(width: int, rank: int, value_rank: int, itemsize: int) -> Config:
    """How the work is cut and run; nothing depends on the lengths.

    Args:
        width: D.
        rank: R.
        value_rank: Rv.
    """
    wide = width > 128 or rank > 64 or value_rank > 128
    block_n = 32 if itemsize == 4 or (value_rank > 256 and rank <= 128) else 64
    return Config(block_n, 2, 2 if wide else 4, 8 if wide else 4, 2)


@triton.jit
def _attend(
    q, codes, decoder, mean, values, cos, sin, table, lengths, out, lse,
    stride_qb, stride_qh, stride_zp, stride_zh, stride_zt, stride_wh, stride_wr,
    stride_mh, stride_vp, stride_vh, stride_vt, stride_cos, stride_sin,
    stride_table, stride_row, stride_head,
    rows, heads, group, first, items, scale,
    R: tl.constexpr, BLOCK_R: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    V_WIDTH: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PAGED: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    if PDL:  # the merge may start to wait
        gdc_launch_dependents()
    there, row, head, length, begin, end = find_item(
        item, lengths, stride_row, stride_head, rows, heads, first // BLOCK_N, items,
        BLOCK_N, LEAST, SLOTS,
    )  # fmt: skip
    if not there:
        return

    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # query heads of the KV head
    is_member = member < group
    q_at = row.to(tl.int64) * stride_qb + (head * group + member) * stride_qh
    half = tl.arange(0, BLOCK_H)
    is_half = half < HALF
    q_real = tl.trans(load_columns(q, q_at, half, is_member, HALF, BLOCK_H == HALF))
    q_imag = tl.trans(load_columns(q + HALF, q_at, half, is_member, HALF, BLOCK_H == HALF))
    codes += head * stride_zh
    values += head * stride_vh
    decoder += head * stride_wh
    rank = tl.arange(0, BLOCK_R)
    if BLOCK_R >= R:
        w_at = rank * stride_wr
        w_real = load_columns(decoder, w_at, half, rank < R, HALF, BLOCK_H == HALF)
        w_imag = load_columns(decoder + HALF, w_at, half, rank < R, HALF, BLOCK_H == HALF)
    if mean is not None:
        mean += head * stride_mh
        mean_real = tl.load(mean + half, is_half, 0.0).to(tl.float32)
        mean_imag = tl.load(mean + HALF + half, is_half, 0.0).to(tl.float32)
    v0_at = tl.arange(0, V0)
    if V1:
        v1_at = V0 + tl.arange(0, V1)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    sum0 = tl.zeros((V0, BLOCK_M), tl.float32)
    if V1:
        sum1 = tl.zeros((V1, BLOCK_M), tl.float32)
    for tile in range(begin, end):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (token < length) & (token >= first)
        page, within = places_of(
            tile, token, inside, row, table, stride_table, PAGED, PAGE, BLOCK_N
        )
        z_at = page * stride_zp + within.to(tl.int64) * stride_zt
        real = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        imag = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        if BLOCK_R >= R:
            z = load_columns(codes, z_at, rank, inside, R, BLOCK_R == R)
            real = dot(z, w_real, real, PRECISION)
            imag = dot(z, w_imag, imag, PRECISION)
        else:
            for begin_r in range(0, R, BLOCK_R):
                r = begin_r + rank
                z = load_columns(codes, z_at, r, inside, R, R % BLOCK_R == 0)
                w_at = r * stride_wr
                part = load_columns(decoder, w_at, half, r < R, HALF, BLOCK_H == HALF)
                real = dot(z, part, real, PRECISION)
                part = load_columns(decoder + HALF, w_at, half, r < R, HALF, BLOCK_H == HALF)
                imag = dot(z, part, imag, PRECISION)
        if mean is not None:
            real += mean_real[None, :]
            imag += mean_imag[None, :]
        turn = token.to(tl.int64)
        c = load_columns(cos, turn * stride_cos, half, inside, HALF, BLOCK_H == HALF).to(tl.float32)
        s = load_columns(sin, turn * stride_sin, half, inside, HALF, BLOCK_H == HALF).to(tl.float32)
        scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scores = dot((real * c - imag * s).to(q_real.dtype), q_real, scores, PRECISION)
        scores = dot((imag * c + real * s).to(q_real.dtype), q_imag, scores, PRECISION)
        scores = tl.where(inside[:, None], scores * scale, -float("inf"))
        weights, shrink, top = weigh(scores, top, 0)
        mass = mass * shrink + tl.sum(weights, 0)
        v_at = page * stride_vp + within.to(tl.int64) * stride_vt
        v0 = load_columns(values, v_at, v0_at, inside, V_WIDTH, V0 <= V_WIDTH)
        weights = weights.to(v0.dtype)
        sum0 = dot(tl.trans(v0), weights, sum0 * shrink[None, :], PRECISION)
        if V1:
            v1 = load_columns(values, v_at, v1_at, inside, V_WIDTH, V0 + V1 <= V_WIDTH)
            sum1 = dot(tl.trans(v1), weights, sum1 * shrink[None, :], PRECISION)

    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    part_at = item.to(tl.int64) * group + member
    tl.store(lse + part_at, top + tl.log2(safe_mass), mask=is_member)
    at = part_at * V_WIDTH
    store_columns(out, at, v0_at, is_member, V_WIDTH, tl.trans(sum0) / safe_mass[:, None])
    if V1:
        store_columns(out, at, v1_at, is_member, V_WIDTH, tl.trans(sum1) / safe_mass[:, None])


def rebuild_decode_attention(
    q: Tensor,
    codes: Tensor,
    decoder: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    mean: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.py`.

    Args:
        config: See :func:`config_for`, which gives it where it is not given.
    """
    width = q.shape[-1]
    heads, rank = decoder.shape[:2]
    v_width, half = values.shape[-1], width // 2
    if config is None:
        config = config_for(width, rank, v_width, q.element_size())
    v0, v1 = tiles_of(v_width)
    # Both halves of a block of the decoder together take 32 KB.
    block_r = (64 if half > 64 else 128) * 2 // q.element_size()
    out = torch.empty((*q.shape[:2], v_width), dtype=q.dtype, device=q.device)
    tokens = codes.shape[2] * (1 if table is None else table.shape[1])
    cut = Cut(out, lengths, heads, first, config, tokens)
    z_page, z_head, z_token, _ = codes.stride()
    v_page, v_head, v_token, _ = values.stride()
    _attend[cut.grid](
        q, codes, decoder, mean, values, cos, sin, table, lengths, cut.parts, cut.part_lse,
        q.stride(0), q.stride(1), z_page, z_head if codes.shape[1] > 1 else 0, z_token,
        decoder.stride(0), decoder.stride(1), 0 if mean is None else mean.stride(0),
        v_page, v_head if values.shape[1] > 1 else 0, v_token, cos.stride(0), sin.stride(0),
        table.stride(0) if table is not None else 0, *cut.strides,
        cut.rows, heads, cut.group, first, cut.items, scaling * math.log2(math.e),
        R=rank, BLOCK_R=min(block_r, max(16, triton.next_power_of_2(rank))),
        HALF=half, BLOCK_H=max(16, triton.next_power_of_2(half)),
        V_WIDTH=v_width, V0=v0, V1=v1, PAGED=table is not None, PAGE=codes.shape[2],
        PRECISION=precision(q.dtype), BLOCK_M=cut.block_m,
        num_warps=config.warps, num_stages=config.stages, **cut.constants,
        enable_fp_fusion=True,
    )  # fmt: skip
    return cut.merge()
