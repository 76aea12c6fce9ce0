"""Keys and values in e4m3 outside of Triton.

A CPU converts codes one by one, at a fifth of the speed at which it looks them up in a table. They
are widened a tile at a time, which stays in the cache of the processor, and scales are multiplied
with queries and sums, of which there are few.
"""

import torch
from torch import Tensor

from kvtool.kernels.sink_logits import softmax

TILE = 4096
"""Tokens that are widened together."""

_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def widen(codes: Tensor) -> Tensor:
    """Numbers in e4m3, bytes `uint8` of any shape, in fp32."""
    if not codes.is_cpu:
        return codes.view(torch.float8_e4m3fn).float()
    return _NUMBERS.index_select(0, codes.flatten().int()).view(codes.shape)


def decode_attention_e4m3(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    scales: tuple[Tensor, Tensor],
    sink_logits: Tensor | None = None,
    exact: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of one query of one sequence, in fp32.

    Args:
        q: `[Q, D]`, rotated.
        keys: `[H, S, D]` bytes, rotated, H divides Q; values: `[H, S, Dv]` bytes.
        scaling: Factor on the scores.
        scales: `[H]` fp32 each, what keys and values are multiplied by.
        sink_logits: `[Q]`, see `kernels/sink_logits`.
        exact: Keys and values of further tokens, `[H, C, D]` and `[H, C, Dv]`, of any float dtype.

    Returns:
        `[Q, Dv]`, in the dtype of q.
    """
    of_keys, of_values = (scale[:, None, None] for scale in scales)
    asked = q.float().unflatten(0, (keys.shape[0], -1)) * scaling  # [H, Q/H, D]
    scaled, tokens = asked * of_keys, keys.shape[1]
    scores = [scaled @ widen(some).mT for some in keys.split(TILE, 1)]
    if exact is not None:
        scores.append(asked @ exact[0].float().mT)
    weights = softmax(torch.cat(scores, dim=-1), sink_logits)
    sums = weights.new_zeros((*weights.shape[:2], values.shape[-1]))
    far = weights[..., :tokens]
    for p, some in zip(far.split(TILE, 2), values.split(TILE, 1), strict=True):
        sums += p @ widen(some)
    sums *= of_values
    if exact is not None:
        sums += weights[..., tokens:] @ exact[1].float()
    return sums.flatten(0, 1).to(q.dtype)
