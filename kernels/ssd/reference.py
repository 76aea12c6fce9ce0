"""Mamba-2 (Dao and Gu, arXiv 2405.21060) in plain torch: the contract, and the CPU path.

Per head, with decay e^{Δ_t A} and state S [P, N],

    S_t = e^{Δ_t A} S_{t-1} + Δ_t x_t b_tᵀ,   y_t = S_t c_t.

Shapes: B rows, T tokens, H heads of size P, G groups of H/G consecutive heads that share b and c,
state size N. `x`, `b` and `c` have one dtype, in which products are taken; Δ (`dt`, after its
softplus), `A` and all that comes of them, the state above all, are fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token.

    Args:
        x: `[B, T, H, P]`.
        dt: `[B, T, H]` fp32, >= 0.
        A: `[H]` fp32, <= 0.
        b, c: `[B, T, G, N]`.
        state: `[B, H, P, N]` fp32 before the first token; zero if not given.

    Returns:
        y `[B, T, H, P]` in the dtype of x, and the state after the last token. Inputs stay.
    """
    state = _initial(x, b) if state is None else state.clone()
    y = [ssd_step(x[:, t], dt[:, t], A, b[:, t], c[:, t], state) for t in range(x.shape[1])]
    return torch.stack(y, dim=1), state


@torch.no_grad()
def ssd_step(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """One token: updates `state` in place and returns y.

    Args:
        x: `[B, H, P]`. dt: `[B, H]` fp32. A: `[H]` fp32. b, c: `[B, G, N]`.
        state: `[B, H, P, N]` fp32; rows may be strided.

    Returns:
        `[B, H, P]` in the dtype of x.
    """
    per_group = x.shape[1] // b.shape[1]
    write = (dt[..., None] * x.float())[..., None]  # [B, H, P, 1]
    b, c = (part.float().repeat_interleave(per_group, dim=1) for part in (b, c))  # [B, H, N]
    state.mul_((dt * A).exp()[..., None, None]).addcmul_(write, b[:, :, None])
    y: Tensor = torch.matmul(state, c[..., None])[..., 0].to(x.dtype)
    return y


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products within chunks of Q tokens (section 6 of the paper).

    With s_i = Σ_{j<=i} Δ_j A from the start of a chunk and S its initial state,

        y_i = Σ_{j<=i} (c_i·b_j) e^{s_i - s_j} Δ_j x_j + e^{s_i} S c_i.

    The largest things in memory are Q numbers per token and head, and a state per chunk and head;
    on the CPU of `_SEGMENT` chunks at a time, which caches hold. Differentiable; arguments and
    results as those of :func:`ssd_recurrence`.
    """
    chunk = min(chunk, x.shape[1])
    state = _initial(x, b) if state is None else state
    size = x.shape[1] if x.is_cuda else _SEGMENT * chunk
    parts = []
    for piece in zip(*(part.split(size, dim=1) for part in (x, dt, b, c)), strict=True):
        with torch.autocast(x.device.type, enabled=False):  # precision is set here, step by step
            y, state = _segment(A, state, chunk, *piece)
        parts.append(y)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], state


_SEGMENT = 4


def _segment(
    A: Tensor, state: Tensor, chunk: int, x: Tensor, dt: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    length, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    # Padding with Δ = 0 neither decays nor writes.
    x, dt, b, c = (_chunks(part, chunk) for part in (x, dt, b, c))
    x = x.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # [B, C, G, H/G, Q, P]
    dt = dt.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # [B, C, G, H/G, Q]
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [B, C, G, Q, N]
    s = (dt * A.view(groups, -1, 1)).cumsum(dim=-1)
    # Differences before the exponential: each factor alone would overflow.
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(future, -torch.inf).exp()
    weights = torch.matmul(c, b.mT)[:, :, :, None] * decay  # [B, C, G, H/G, Q, Q]
    written = dt[..., None] * x
    within = torch.matmul(weights.to(x.dtype), written.to(x.dtype))

    kept = (s[..., -1:] - s).exp()[..., None] * written  # of a token, at the chunk's end
    kept = kept.to(x.dtype).mT.flatten(3, 4)  # [B, C, G, H/G·P, Q]
    states = torch.matmul(kept, b).float().unflatten(3, (heads // groups, -1))
    states = torch.cat((state[:, None], states.flatten(2, 3)), dim=1)  # [B, 1 + C, H, P, N]
    states = _pass_on(states, s[..., -1].flatten(2, 3))
    before = states[:, :-1].unflatten(2, (groups, -1)).flatten(3, 4)  # [B, C, G, H/G·P, N]
    read = torch.matmul(c, before.to(c.dtype).mT).unflatten(-1, (heads // groups, -1))
    y = within + s.exp()[..., None] * read.transpose(3, 4)
    y = y.to(x.dtype).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return y[:, :length], states[:, -1]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = bias + Σ_k weight[:, k] · x_{t-K+1+k}.

    Args:
        x: `[B, T, C]`.
        weight: `[C, K]`; the last tap is for the current token.
        bias: `[C]`.
        state: `[B, C, K - 1]`, the inputs before the first token; zero if not given.

    Returns:
        y `[B, T, C]` in the dtype of x, and the state after the last token.
    """
    taps, length = weight.shape[1], x.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], taps - 1)
    seen = torch.cat((state.to(x.dtype).mT, x), dim=1)  # [B, K - 1 + T, C]
    weight = weight.to(x.dtype)
    y = seen[:, :length] * weight[:, 0]
    for k in range(1, taps):
        y = torch.addcmul(y, seen[:, k : k + length], weight[:, k])
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y, seen[:, length:].mT


def _initial(x: Tensor, b: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    return torch.zeros(shape, dtype=torch.float32, device=x.device)


def _chunks(part: Tensor, chunk: int) -> Tensor:
    """`[B, T, ...]` to `[B, C, Q, ...]`, with zeros behind the last token."""
    padding = (0, 0) * (part.dim() - 2) + (0, -part.shape[1] % chunk)
    chunks: Tensor = F.pad(part, padding).unflatten(1, (-1, chunk))
    return chunks


def _pass_on(states: Tensor, total: Tensor) -> Tensor:
    """States `[B, 1 + C, H, P, N]` that each chunk adds, to those that it leaves behind.

    out_c = Σ_{z<=c} e^{Σ_{z<i<=c} total_i} states_z, with `total [B, C, H]` the log decay of a
    chunk; the first state is the initial one.
    """
    s = F.pad(total.cumsum(dim=1), (0, 0, 1, 0)).transpose(1, 2)  # [B, H, 1 + C]
    future = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(future, -torch.inf).exp()
    flat = states.transpose(1, 2).flatten(3)  # [B, H, 1 + C, P·N]
    left: Tensor = torch.matmul(decay, flat).unflatten(3, states.shape[3:])
    return left.transpose(1, 2)
