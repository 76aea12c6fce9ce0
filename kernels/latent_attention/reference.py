"""Absorbed MLA decode in plain torch: the contract, and the path without a C compiler.

Multi-query attention whose keys are `[latent ; RoPE key]` and whose values are the latent again
(DeepSeek-V2, section 2.1.2: the up-projections are absorbed into query and output).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_decode_attention(
    q: Tensor, latents: Tensor, rank: int, lengths: Sequence[int], scaling: float
) -> Tensor:
    """Softmax attention of one absorbed query per head over the first `lengths[b]` tokens.

    Args:
        q: `[B, Q, r + d_r]`: absorbed content query, then rotated RoPE query.
        latents: `[B, capacity, r + d_r]`; what lies past `lengths[b]` is never read.
        rank: r, the width of the part that is also the value.
        lengths: Tokens of each sequence, the current one included; all >= 1.
        scaling: Factor on the scores.

    Returns:
        `[B, Q, r]`, to be multiplied by the value up-projection.
    """
    if len(set(lengths)) > 1:
        rows = [
            latent_decode_attention(q[b : b + 1], latents[b : b + 1], rank, [n], scaling)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(rows)
    seen = latents[:, None, : lengths[0]]  # [B, 1, n, r + d_r]
    # With values as wide as the keys torch has one fused kernel for both; what it makes of the
    # rotated part is cut off.
    context = F.scaled_dot_product_attention(q[:, None], seen, seen, scale=scaling)
    return context[:, 0, :, :rank]
