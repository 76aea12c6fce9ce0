"""A linear layer per KV head, applied to the query heads that belong to it."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.grouped_linear import reference

__all__ = ["grouped_linear"]


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [B, Q, K]` times `weight [H, K, N]`, `[B, Q, N]`; see `reference.py`."""
    run = reference.grouped_linear
    if use_triton(x):
        from kvtool.kernels.grouped_linear.triton import grouped_linear as run
    return run(x, weight, bias)
