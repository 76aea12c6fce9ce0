"""Mamba-2 in Triton: the chunked scan in two launches or three, one step, the short convolution.

:func:`ssd_chunked` cuts a text into segments of chunks of Q tokens. With the names of
`reference.py`,

1. `_states` goes through the chunks of a segment one after the other, a tile of the state in
   registers, and writes the state before every chunk:

       S <- e^{s_Q} S + Σ_j e^{s_Q - s_j} Δ_j x_j b_jᵀ.

   The first segment begins with the initial state, the others with nothing.
2. `_pass_on` carries states from segment to segment; one segment needs none of it.
3. `_outputs`, for all chunks at once:

       y_i = Σ_{j<=i} (c_i·b_j) e^{s_i - s_j} Δ_j x_j + e^{s_i} S c_i,

   where S gets what its segment inherited, decayed from the segment's start.

There are as many segments as keep the device busy: none too many, as each costs the reading of a
state. Decays are always exponentials of differences, which are never positive.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import dot, lying_together, precision, processors

_LOG2_E = tl.constexpr(math.log2(math.e))
_CHUNK = 64  # Q
_LEAST_CHUNKS = 4  # of a segment


@triton.jit
def _log_decay(dt_ptr, token, tokens, stride, rate):
    """Δ of the tokens of a chunk, zero behind the last of the text, and s to base 2 in two parts.

    The first is a sum of integers, so it is exact, and the second is small: what two tokens differ
    in does not drown in what was summed before them. A factor below 2^-256 is 0 in float32.
    """
    dt = tl.load(dt_ptr + token * stride, token < tokens, 0.0)
    log_decay = tl.maximum(dt * rate, -256.0)
    whole = tl.floor(log_decay)
    return dt, tl.cumsum(whole), tl.cumsum(log_decay - whole)


@triton.jit
def _total(dt, rate):
    """Its last element, the two parts together in the same two parts."""
    log_decay = tl.maximum(dt * rate, -256.0)
    whole = tl.floor(log_decay)
    return tl.sum(whole), tl.sum(log_decay - whole)


@triton.jit
def _states(
    x, dt, A, b, initial, before, elapsed, finals,
    xb, xt, xh, db, dt_token, dh, bb, bt, bg, ib, ih, ip,
    tokens, heads, per_group, chunks, segments, segment_chunks,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = tl.cdiv(N, BLOCK_N)
    p = tl.program_id(0) // across * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    segment = tl.program_id(1)
    row, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    x += row * xb + head * xh
    dt += row * db + head * dh
    b += row * bb + head // per_group * bg
    rate = tl.load(A + head) * _LOG2_E
    is_p, is_n = p < P, n < N
    inside = is_p[:, None] & is_n[None, :]
    tile = p[:, None] * N + n[None, :]  # of a state [P, N]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial is not None and segment == 0:
        at = row * ib + head * ih + p[:, None] * ip + n[None, :]
        state = tl.load(initial + at, inside, 0.0).to(tl.float32)
    passed = 0.0
    first = segment * segment_chunks
    own = (row * heads + head) * chunks  # where the chunks of this head begin
    for chunk in range(first, tl.minimum(first + segment_chunks, chunks)):
        tl.store(before + (own + chunk) * P * N + tile, state.to(before.dtype.element_ty), inside)
        tl.store(elapsed + own + chunk, passed)
        token = (chunk * Q + tl.arange(0, Q)).to(tl.int64)
        there = (token < tokens)[:, None]
        step, high, low = _log_decay(dt, token, tokens, dt_token, rate)
        high_end, low_end = _total(step, rate)
        left = tl.exp2((high_end - high) + (low_end - low))  # of a token, at the chunk's end
        whole = high_end + low_end
        written = tl.load(x + token[:, None] * xt + p[None, :], there & is_p[None, :], 0.0)
        along = tl.load(b + token[:, None] * bt + n[None, :], there & is_n[None, :], 0.0)
        kept = (along.to(tl.float32) * (left * step)[:, None]).to(written.dtype)
        state = dot(tl.trans(written), kept, state * tl.exp2(whole), PRECISION)
        passed += whole
    part = (row * heads + head) * segments + segment
    tl.store(finals + part * P * N + tile, state, inside)


@triton.jit
def _pass_on(
    dt, A, finals, inherited, end, db, dt_token, dh, tokens, heads, segments, segment_tokens,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What every segment inherits from those before it, and the state after the last."""
    one = tl.program_id(1).to(tl.int64)
    row, head = one // heads, one % heads
    dt += row * db + head * dh
    rate = tl.load(A + head) * _LOG2_E
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    for segment in range(segments):
        tl.store(inherited + (one * segments + segment) * SIZE + at, state, inside)
        total = tl.zeros((TOKENS,), tl.float32)
        begin = segment * segment_tokens
        stop = tl.minimum(begin + segment_tokens, tokens)
        for first in range(begin, stop, TOKENS):
            token = (first + tl.arange(0, TOKENS)).to(tl.int64)
            total += tl.load(dt + token * dt_token, token < stop, 0.0)
        own = tl.load(finals + (one * segments + segment) * SIZE + at, inside, 0.0)
        state = tl.exp2(tl.sum(total) * rate) * state + own
    tl.store(end + one * SIZE + at, state, inside)


@triton.jit
def _outputs(
    x, dt, A, b, c, before, elapsed, inherited, y,
    xb, xt, xh, db, dt_token, dh, bb, bt, bg, cb, ct, cg,
    tokens, heads, per_group, chunks, segments, segment_chunks,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    chunk = tl.program_id(1)
    row, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    x += row * xb + head * xh
    dt += row * db + head * dh
    b += row * bb + head // per_group * bg
    c += row * cb + head // per_group * cg
    own = row * heads + head
    is_p = p < P
    token = (chunk * Q + tl.arange(0, Q)).to(tl.int64)
    there = (token < tokens)[:, None]
    step, high, low = _log_decay(dt, token, tokens, dt_token, tl.load(A + head) * _LOG2_E)
    if SEGMENTED:
        since = tl.exp2(tl.load(elapsed + own * chunks + chunk))
        from_segment = inherited + (own * segments + chunk // segment_chunks) * P * N
    products = tl.zeros((Q, Q), tl.float32)
    out = tl.zeros((Q, BLOCK_P), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        is_n = (n < N)[None, :]
        read = tl.load(c + token[:, None] * ct + n[None, :], there & is_n, 0.0)
        along = tl.load(b + token[:, None] * bt + n[None, :], there & is_n, 0.0)
        products = dot(read, tl.trans(along), products, PRECISION)
        tile, inside = p[:, None] * N + n[None, :], is_p[:, None] & is_n
        state = tl.load(before + (own * chunks + chunk) * P * N + tile, inside, 0.0)
        if SEGMENTED:
            whole = state.to(tl.float32) + since * tl.load(from_segment + tile, inside, 0.0)
            state = whole.to(read.dtype)
        out = dot(read, tl.trans(state), out, PRECISION)
    at = tl.arange(0, Q)
    past = at[:, None] >= at[None, :]
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp2(tl.where(past, between, -float("inf")))
    written = tl.load(x + token[:, None] * xt + p[None, :], there & is_p[None, :], 0.0)
    weights = (products * decay * step[None, :]).to(written.dtype)
    out = dot(weights, written, out * tl.exp2(high + low)[:, None], PRECISION)
    to = y + ((row * tokens + token[:, None]) * heads + head) * P + p[None, :]
    tl.store(to, out.to(y.dtype.element_ty), there & is_p[None, :])


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.py`; without gradients, and in chunks of its own.

    Args:
        segments: Into which the text is cut; by the device if not given.
    """
    x, b, c = (lying_together(part) for part in (x, b, c))
    (batch, tokens, heads, p), (groups, n) = x.shape, b.shape[2:]
    chunks = triton.cdiv(tokens, _CHUNK)
    block_p = block_n = 64
    # A wide tile of outputs, so that the products of c and b are taken once.
    wide_p = min(64 if x.element_size() == 4 else 128, max(16, triton.next_power_of_2(p)))
    tiles = triton.cdiv(p, block_p) * triton.cdiv(n, block_n)
    if segments is None:
        segments = triton.cdiv(2 * processors(x.device), batch * heads * tiles)
        segments = min(segments, chunks // _LEAST_CHUNKS)
    segment_chunks = triton.cdiv(chunks, max(1, segments))
    segments = triton.cdiv(chunks, segment_chunks)
    before = torch.empty((batch, heads, chunks, p, n), dtype=x.dtype, device=x.device)
    elapsed = torch.empty((batch, heads, chunks), dtype=torch.float32, device=x.device)
    finals = torch.empty((batch, heads, segments, p, n), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if state is not None:
        state = lying_together(state)
    cut = (tokens, heads, heads // groups, chunks, segments, segment_chunks)
    shape = {"P": p, "N": n, "Q": _CHUNK, "BLOCK_N": block_n, "PRECISION": precision(x.dtype)}
    _states[(tiles, segments, batch * heads)](
        x, dt, A, b, state, before, elapsed, finals,
        *x.stride()[:3], *dt.stride(), *b.stride()[:3],
        *((0, 0, 0) if state is None else state.stride()[:3]),
        *cut, BLOCK_P=block_p, num_warps=4, num_stages=3, **shape,
        enable_fp_fusion=True,
    )  # fmt: skip
    inherited, end = None, finals[:, :, 0]
    if segments > 1:
        inherited, end = torch.empty_like(finals), torch.empty_like(end)
        _pass_on[(triton.cdiv(p * n, 1024), batch * heads)](
            dt, A, finals, inherited, end, *dt.stride(), tokens, heads, segments,
            segment_chunks * _CHUNK, SIZE=p * n, BLOCK=1024, TOKENS=1024,
            enable_fp_fusion=True,
        )  # fmt: skip
    _outputs[(triton.cdiv(p, wide_p), chunks, batch * heads)](
        x, dt, A, b, c, before, elapsed, inherited, y,
        *x.stride()[:3], *dt.stride(), *b.stride()[:3], *c.stride()[:3],
        *cut, BLOCK_P=wide_p, SEGMENTED=segments > 1, num_warps=4, num_stages=2, **shape,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y, end


@triton.jit
def _step(
    x, dt, A, b, c, state, y, xb, xh, db, dh, bb, bg, cb, cg, sb, sh, sp, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    is_p, is_n = p < P, n < N
    step = tl.load(dt + row * db + head * dh)
    decay = tl.exp(step * tl.load(A + head))
    written = step * tl.load(x + row * xb + head * xh + p, is_p, 0.0).to(tl.float32)
    group = head // per_group
    along = tl.load(b + row * bb + group * bg + n, is_n, 0.0).to(tl.float32)
    read = tl.load(c + row * cb + group * cg + n, is_n, 0.0).to(tl.float32)
    at = state + row * sb + head * sh + p[:, None] * sp + n[None, :]
    inside = is_p[:, None] & is_n[None, :]
    now = decay * tl.load(at, inside, 0.0) + written[:, None] * along[None, :]
    tl.store(at, now, inside)
    out = tl.sum(now * read[None, :], 1)
    tl.store(y + (row * heads + head) * P + p, out.to(y.dtype.element_ty), is_p)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """See `reference.py`; the last axis of `state` lies together."""
    x, b, c = (lying_together(part) for part in (x, b, c))
    (batch, heads, p), (groups, n) = x.shape, b.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(n)
    block_p = min(triton.next_power_of_2(p), max(1, 2048 // block_n))
    _step[(triton.cdiv(p, block_p), batch * heads)](
        x, dt, A, b, c, state, y, *x.stride()[:2], *dt.stride(), *b.stride()[:2], *c.stride()[:2],
        *state.stride()[:3], heads, heads // groups, P=p, N=n, BLOCK_P=block_p, BLOCK_N=block_n,
        num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


@triton.jit
def _conv(
    x, weight, bias, state, y, after, xb, xt, wc, wk, sb, sc, sk, tokens, channels,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * BLOCK_T
    token = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    is_channel = channel < channels
    x += row * xb
    state += row * sb
    out = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if bias is not None:
        out += tl.load(bias + channel, is_channel, 0.0).to(tl.float32)[None, :]
    inside = (token < tokens)[:, None] & is_channel[None, :]
    for k in tl.static_range(K):
        tap = tl.load(weight + channel * wc + k * wk, is_channel, 0.0).to(tl.float32)
        at = token[:, None] + (k - K + 1)
        seen = _seen(x, state, at, channel[None, :], xt, sc, sk, inside, first < K - 1, K)
        out += seen.to(tl.float32) * tap[None, :]
    tl.store(
        y + (row * tokens + token[:, None]) * channels + channel[None, :],
        out.to(y.dtype.element_ty),
        inside,
    )
    if first + BLOCK_T >= tokens:  # what the next call has to know
        place = tl.arange(0, BLOCK_K)
        kept = is_channel[:, None] & (place < K - 1)[None, :]
        before = tokens + place[None, :].to(tl.int64) - (K - 1)
        last = _seen(x, state, before, channel[:, None], xt, sc, sk, kept, tokens < K - 1, K)
        to = after + (row * channels + channel[:, None]) * (K - 1) + place[None, :]
        tl.store(to, last.to(after.dtype.element_ty), kept)


@triton.jit
def _seen(x, state, at, channel, xt, sc, sk, inside, early, K: tl.constexpr):
    """Inputs at token `at`; `early`: that may be negative, and is then in the state."""
    seen = tl.load(x + at * xt + channel, inside & (at >= 0), 0.0)
    if early:
        old = tl.load(state + channel * sc + (at + K - 1) * sk, inside & (at < 0), 0.0)
        seen = tl.where(at >= 0, seen, old.to(seen.dtype))
    return seen


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.py`; added up in fp32, without gradients."""
    x = lying_together(x)
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    if state is None:
        state = torch.zeros((batch, channels, taps - 1), dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = torch.empty((batch, channels, taps - 1), dtype=x.dtype, device=x.device)
    block_t = min(16, triton.next_power_of_2(tokens))
    _conv[(triton.cdiv(channels, 128), triton.cdiv(tokens, block_t), batch)](
        x, weight, bias, state, y, after, *x.stride()[:2], *weight.stride(), *state.stride(),
        tokens, channels, K=taps, BLOCK_T=block_t, BLOCK_C=128,
        BLOCK_K=triton.next_power_of_2(max(1, taps - 1)), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y, after
