"""Streaming attention in plain torch: the contract, and the CPU path.

What a streaming head of DuoAttention (arXiv 2410.10819, section 2.2) sees: the query at position i
sees the key at position j where `j <= i and (j < sink or i - j < window)`.
"""

import torch
from torch import Tensor

from kvtool.kernels.sink_logits import attention


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: int,
    window: int,
    scaling: float,
    start: int = 0,
    block: int = 256,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention of T consecutive queries to the sinks and to their own last `window` keys.

    Computed by blocks of queries, each over the keys that it can see: T · (sink + window + block)
    scores instead of T². Differentiable.

    Args:
        q: `[B, Q, T, D]`, rotated; query 0 stands at position `start`.
        k: `[B, H, S, D]`, rotated at true positions, H divides Q. The first min(sink, S) columns
            are the positions from 0 on, the others consecutive positions that end at the last
            query's. Without a past these are simply all tokens in order.
        v: `[B, H, S, D]`.
        window: Tokens seen behind the sinks, the current one included; >= 1.
        scaling: Factor on the scores.
        block: Queries at once.
        sink_logits: `[Q]`, a logit of each head that joins the softmax and has no value, no token
            (`kernels/sink_logits`).

    Returns:
        `[B, Q, T, D]`.
    """
    tokens, columns = q.shape[2], k.shape[2]
    sinks = min(sink, columns)
    skipped = start + tokens - columns  # positions missing between the sinks and the rest
    positions = torch.arange(columns, device=q.device)
    positions[sinks:] += skipped
    parts = []
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        oldest = max(sinks, start + first - window + 1 - skipped)
        seen = slice(oldest, max(oldest, start + last - skipped))
        key_at = torch.cat((positions[:sinks], positions[seen]))
        query_at = torch.arange(start + first, start + last, device=q.device)[:, None]
        mask = (key_at <= query_at) & ((key_at < sink) | (query_at - key_at < window))
        keys, values = k[:, :, seen], v[:, :, seen]
        if sinks:
            keys = torch.cat((k[:, :, :sinks], keys), dim=2)
            values = torch.cat((v[:, :, :sinks], values), dim=2)
        parts.append(attention(q[:, :, first:last], keys, values, mask, scaling, sink_logits))
    return torch.cat(parts, dim=2)
