"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464) in plain torch: the contract, and the
CPU path.

Per head, with decay e^{g_t}, strength β_t and state S [P, N],

    S_t = e^{g_t} S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,   y_t = S_t q_t:

what the state answers to a key is replaced by a mixture with the value (equation 10).

Shapes: B rows, T tokens, H heads of size P, G groups of H/G consecutive heads that share queries
and keys of size N. g, β, the state and all arithmetic are fp32; `q`, `k` and `v` of any dtype. Keys
have norm 1 or less, or what a token writes may grow without bound.
"""

import torch
from torch import Tensor


def gated_delta_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token.

    Args:
        q, k: `[B, T, G, N]`.
        v: `[B, T, H, P]`.
        g: `[B, T, H]` fp32, <= 0.
        beta: `[B, T, H]` fp32, in [0, 1].
        state: `[B, H, P, N]` fp32 before the first token; zero if not given.

    Returns:
        y `[B, T, H, P]` in the dtype of v, and the state after the last token. Inputs stay.
    """
    state = _initial(k, v) if state is None else state.clone()
    y = [
        gated_delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        for t in range(v.shape[1])
    ]
    return torch.stack(y, dim=1), state


@torch.no_grad()
def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """One token: updates `state` in place and returns y.

    Args:
        q, k: `[B, G, N]`. v: `[B, H, P]`. g, beta: `[B, H]` fp32.
        state: `[B, H, P, N]` fp32; rows may be strided.

    Returns:
        `[B, H, P]` in the dtype of v.
    """
    per_group = v.shape[1] // k.shape[1]
    q, k = (x.float().repeat_interleave(per_group, dim=1) for x in (q, k))  # [B, H, N]
    state.mul_(g.exp()[..., None, None])
    known = torch.matmul(state, k[..., None])[..., 0]
    state.addcmul_((beta[..., None] * (v.float() - known))[..., None], k[:, :, None])
    y: Tensor = torch.matmul(state, q[..., None])[..., 0].to(v.dtype)
    return y


def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products within chunks of Q tokens (section 3.3 of the paper).

    With s_i = Σ_{j<=i} g_j from the start of a chunk, S its initial state and Γ_ij = e^{s_i - s_j}
    for j <= i, what the tokens of a chunk write in place of their values solves

        (I + strict(diag(β) (K Kᵀ ∘ Γ))) U = diag(β) (V - diag(e^s) K Sᵀ),

    where `strict` is the part below the diagonal, and then

        Y = diag(e^s) Q Sᵀ + (Q Kᵀ ∘ Γ) U,   S <- e^{s_Q} S + Uᵀ diag(e^{s_Q - s}) K.

    Differentiable; arguments and results as those of :func:`gated_delta_recurrence`.
    """
    dtype, length, heads, groups = v.dtype, v.shape[1], v.shape[2], k.shape[2]
    chunk = min(chunk, length)
    state = (_initial(k, v) if state is None else state).unflatten(1, (groups, -1))
    parts = []
    with torch.autocast(v.device.type, enabled=False):
        for piece in zip(*(x.float().split(chunk, dim=1) for x in (q, k, v, g, beta)), strict=True):
            y, state = _one_chunk(state, *piece)
            parts.append(y)
    y = torch.cat(parts, dim=3).flatten(1, 2).transpose(1, 2)
    assert y.shape[1:3] == (length, heads)
    return y.to(dtype), state.flatten(1, 2)


def _one_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """y `[B, G, H/G, Q, P]` of a chunk, and the state `[B, G, H/G, P, N]` behind it."""
    groups, length = k.shape[2], k.shape[1]
    q, k = (x.transpose(1, 2)[:, :, None] for x in (q, k))  # [B, G, 1, Q, N]
    v = v.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, Q, P]
    g, beta = (x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)[..., None] for x in (g, beta))
    s = g.cumsum(dim=-2)  # [B, G, H/G, Q, 1]
    # Differences before the exponential: each factor alone would overflow.
    future = torch.ones(length, length, dtype=torch.bool, device=k.device).triu(1)
    decay = (s - s.mT).masked_fill(future, -torch.inf).exp()
    system = beta * decay * (k @ k.mT)  # the solver takes its diagonal for ones
    wanted = beta * (v - s.exp() * (k @ state.mT))
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    y = s.exp() * (q @ state.mT) + (decay * (q @ k.mT)) @ written
    last = s[..., -1:, :]
    kept = (last - s).exp() * written
    return y, last.exp() * state + kept.mT @ k


def _initial(k: Tensor, v: Tensor) -> Tensor:
    shape = (v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    return torch.zeros(shape, dtype=torch.float32, device=v.device)
