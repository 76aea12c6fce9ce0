"""The lossless embedding of GQA into MLA: a change of format, the regression test of the rest.

Every KV head's key goes into the shared RoPE key whole, with its frequencies repeated once per
head; the latent holds the values as they are. The cache has the same size as before.
"""

import torch

from kvtool.latent import LatentFactors, query_blocks
from kvtool.layout import AttentionLayout
from kvtool.rope import Rope


def exact_factors(layout: AttentionLayout, rope: Rope) -> LatentFactors:
    """Factors with d_r = K, d_n = 0 and r = K that reproduce the layer to rounding."""
    heads, dim = layout.kv_heads, layout.head_dim
    width, half = heads * dim, dim // 2
    channel = torch.arange(width).view(heads, 2, half)  # [H, real | imag, frequency]
    identity = torch.eye(width, dtype=torch.float64)
    order = channel.transpose(0, 1).flatten()  # all real parts, then all imaginary ones
    return LatentFactors(
        rope=identity[order],
        rope_query=query_blocks(identity[order], heads),
        inv_freq=rope.inv_freq.repeat(heads),
        down=torch.cat((torch.zeros_like(identity), identity), dim=1),
        key_up=torch.zeros(heads, 0, width, dtype=torch.float64),
        value_up=identity.view(heads, dim, width),
    )
