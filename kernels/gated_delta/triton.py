"""One step of Gated DeltaNet in Triton: the state is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.tiles import lying_together


@triton.jit
def _delta_step(
    q, k, v, g, beta, state, y, qb, qg, kb, kg, vb, vh, gb, gh, bb, bh, sb, sh, sp, heads,
    per_group, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    is_p, is_n, group = p < P, n < N, head // per_group
    decay = tl.exp(tl.load(g + row * gb + head * gh))
    strength = tl.load(beta + row * bb + head * bh)
    key = tl.load(k + row * kb + group * kg + n, is_n, 0.0).to(tl.float32)
    query = tl.load(q + row * qb + group * qg + n, is_n, 0.0).to(tl.float32)
    value = tl.load(v + row * vb + head * vh + p, is_p, 0.0).to(tl.float32)
    at = state + row * sb + head * sh + p[:, None] * sp + n[None, :]
    inside = is_p[:, None] & is_n[None, :]
    now = decay * tl.load(at, inside, 0.0)
    written = strength * (value - tl.sum(now * key[None, :], 1))
    now += written[:, None] * key[None, :]
    tl.store(at, now, inside)
    out = tl.sum(now * query[None, :], 1)
    tl.store(y + (row * heads + head) * P + p, out.to(y.dtype.element_ty), is_p)


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """See `reference.py`; the last axis of `state` lies together."""
    q, k, v = (lying_together(part) for part in (q, k, v))
    (batch, heads, p), (groups, n) = v.shape, k.shape[1:]
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_n = triton.next_power_of_2(n)
    block_p = min(triton.next_power_of_2(p), max(1, 2048 // block_n))
    _delta_step[(triton.cdiv(p, block_p), batch * heads)](
        q, k, v, g, beta, state, y, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(),
        *beta.stride(), *state.stride()[:3], heads, heads // groups, P=p, N=n, BLOCK_P=block_p,
        BLOCK_N=block_n, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
