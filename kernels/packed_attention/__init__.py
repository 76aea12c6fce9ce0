"""Attention that reads packed integers: scales are folded into queries and probabilities."""

from kvtool.kernels.packed_attention.reference import (
    channel_scores,
    channel_sums,
    token_scores,
    value_sums,
)

__all__ = ["channel_scores", "channel_sums", "token_scores", "value_sums"]
