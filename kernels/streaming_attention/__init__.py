"""Attention to the first tokens and a recent window, for many queries at once.

Triton has no backward pass here: whoever wants gradients gets plain torch.
"""

import torch
from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.streaming_attention import reference

__all__ = ["streaming_attention"]


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
    """See :func:`kvtool.kernels.streaming_attention.reference.streaming_attention`.

    Triton has blocks of its own.
    """
    parts = (q, k, v) if sink_logits is None else (q, k, v, sink_logits)
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if use_triton(q) and not wanted:
        from kvtool.kernels.streaming_attention import triton

        return triton.streaming_attention(q, k, v, sink, window, scaling, start, sink_logits)
    return reference.streaming_attention(q, k, v, sink, window, scaling, start, block, sink_logits)
