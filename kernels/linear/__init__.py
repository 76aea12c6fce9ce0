"""A linear layer over very few tokens, as in decoding."""

from kvtool.kernels.linear.reference import FEW_TOKENS, linear

__all__ = ["FEW_TOKENS", "linear"]
