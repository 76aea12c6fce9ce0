"""Decode attention in plain torch: the contract, and the CPU path."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    # The query heads of a KV head are queries of one call, so keys and values are read once.
    grouped = q.view(batch, heads, -1, q.shape[-1])  # [B, H, Q/H, D]
    context = F.scaled_dot_product_attention(
        grouped, keys[:, :, :n], values[:, :, :n], scale=scaling
    )
    return context.flatten(1, 2)
