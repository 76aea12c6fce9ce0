"""One new query per sequence against cached keys and values."""

from kvtool.kernels.decode_attention.reference import decode_attention

__all__ = ["decode_attention"]
