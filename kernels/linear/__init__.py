"""A linear layer over very few tokens, as in decoding."""

from kvtool.kernels.linear.packed import LEAST_ROWS, pack, packed_linear
from kvtool.kernels.linear.reference import FEW_TOKENS, linear

__all__ = ["FEW_TOKENS", "LEAST_ROWS", "linear", "pack", "packed_linear"]
