"""Decode attention in plain torch: the contract, and the CPU path."""

from collections.abc import Sequence

import torch
from torch import Tensor


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    """Softmax attention of one query per sequence over the first `lengths[b]` cached tokens.

    Args:
        q: `[B, Q, D]`, rotated.
        keys: `[B, H, capacity, D]`, rotated; what lies past `lengths[b]` is never read.
        values: `[B, H, capacity, Dv]`.
        lengths: Tokens of each sequence, the current one included; all >= 1.
        scaling: Factor on the scores.

    Returns:
        `[B, Q, Dv]`.
    """
    if len(set(lengths)) > 1:  # a view per sequence beats a padded copy with a mask
        rows = [
            decode_attention(q[b : b + 1], keys[b : b + 1], values[b : b + 1], [n], scaling)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(rows)
    n = lengths[0]
    batch, heads = keys.shape[:2]
    # The query heads of a KV head are rows of one matrix, so keys and values are read once.
    grouped = (q * scaling).view(batch, heads, -1, q.shape[-1])  # [B, H, Q/H, D]
    # Tokens are the rows of the product: on the CPU this order reads the keys at memory speed, the
    # other at two thirds of it.
    scores = torch.matmul(keys[:, :, :n], grouped.transpose(-1, -2))  # [B, H, n, Q/H]
    weights = torch.softmax(scores.transpose(-1, -2).contiguous(), dim=-1)
    context = torch.matmul(weights, values[:, :, :n])
    return context.flatten(1, 2)
