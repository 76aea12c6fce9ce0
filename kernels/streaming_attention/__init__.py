"""Attention to the first tokens and a recent window, for many queries at once."""

from kvtool.kernels.streaming_attention.reference import streaming_attention

__all__ = ["streaming_attention"]
