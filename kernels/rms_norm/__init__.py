"""RMSNorm over the last axis, and the addition that comes before it."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., W]` normalised; see `reference.py`."""
    run = reference.rms_norm
    if use_triton(x):
        from kvtool.kernels.rms_norm.triton import rms_norm as run
    return run(x, weight, eps)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two `[..., W]`, and the same normalised; see `reference.py`."""
    run = reference.add_rms_norm
    if use_triton(x):
        from kvtool.kernels.rms_norm.triton import add_rms_norm as run
    return run(x, other, weight, eps)
