"""A softmax with a learned logit beside its scores, as gpt-oss has it, in plain torch.

Query head h has a logit s_h, which takes part in the softmax of each of its queries and has no
value. With scores l_j, key j weighs

    p_j = exp(l_j) / (Σ_i exp(l_i) + exp(s_h)) = softmax(l)_j · σ(L - s_h),    L = log Σ_i exp(l_i),

so it can be left out of attention and be made good by one factor per query. These "attention sinks"
are no tokens; the first tokens that a ring keeps are something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax(
    scores: Tensor,
    sink_logits: Tensor | None,
    first: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights of keys; they sum up to less than 1 where there is a logit beside them.

    Args:
        scores: `[..., heads, ..., S]`; the query heads may be two axes, KV heads and groups.
        sink_logits: `[Q]`, s; None for an ordinary softmax.
        first: The first axis of the heads.
        dtype: Of the result; None for that of the scores.
    """
    if sink_logits is None:
        return torch.softmax(scores, dim=-1, dtype=dtype)
    one = _beside(sink_logits, scores.shape[:-1], first).expand(scores.shape[:-1])
    both = torch.cat((scores, one[..., None].to(scores.dtype)), dim=-1)
    return torch.softmax(both, dim=-1, dtype=dtype)[..., :-1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Softmax attention of T queries to S keys. Differentiable.

    Args:
        q: `[B, Q, T, D]`; or, for one query, `[B, H, Q / H, D]`.
        k, v: `[B, H, S, D]`, H divides Q.
        mask: `[T, S]`, what each query sees; None for everything.
        scaling: Factor on the scores.
        sink_logits: `[Q]`, s; None for ordinary attention.

    Returns:
        The shape of `q`.
    """
    if sink_logits is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sink_logits))
    if q.is_cpu and not wanted:
        added = None
        if mask is not None:
            added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        # What `scaled_dot_product_attention` runs, but that it keeps L for itself.
        context, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=added, scale=scaling
        )
        share = torch.sigmoid(mass - _beside(sink_logits, mass.shape, 1).to(mass.dtype))
        found: Tensor = context.mul_(share[..., None])
        return found
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H, g, T, D]
    scores = torch.matmul(grouped, k[:, :, None].mT) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = softmax(scores, sink_logits, first=1)
    return torch.matmul(weights, v[:, :, None]).flatten(1, 2)


def _beside(sink_logits: Tensor, shape: Sequence[int], first: int) -> Tensor:
    """The logits on those axes of a shape, from `first` on, that are all query heads."""
    last = first + 1
    while math.prod(shape[first:last]) < len(sink_logits):
        last += 1
    return sink_logits.view(*shape[first:last], *[1] * (len(shape) - last))
