"""Gated DeltaNet: a state of fixed size that a token corrects where its key points."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.gated_delta import reference
from kvtool.kernels.gated_delta.reference import gated_delta_chunked, gated_delta_recurrence

__all__ = ["gated_delta_chunked", "gated_delta_recurrence", "gated_delta_step"]


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """See :func:`kvtool.kernels.gated_delta.reference.gated_delta_step`."""
    if use_triton(v):
        from kvtool.kernels.gated_delta import triton

        return triton.gated_delta_step(q, k, v, g, beta, state)
    return reference.gated_delta_step(q, k, v, g, beta, state)
