"""Mamba-2: the state-space recurrence, and the short convolution in front of it."""

from kvtool.kernels.ssd.reference import causal_conv, ssd_chunked, ssd_recurrence, ssd_step

__all__ = ["causal_conv", "ssd_chunked", "ssd_recurrence", "ssd_step"]
