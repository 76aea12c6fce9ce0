"""Mamba-2: the state-space recurrence, and the short convolution in front of it.

Triton has no backward pass here: whoever wants gradients gets plain torch.
"""

import torch
from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.ssd import reference
from kvtool.kernels.ssd.reference import ssd_recurrence

__all__ = ["causal_conv", "ssd_chunked", "ssd_recurrence", "ssd_step"]


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.ssd.reference.ssd_chunked`; Triton has chunks of its own."""
    if _run_triton(x, dt, A, b, c, state) and _assembles(x, b):
        from kvtool.kernels.ssd import triton

        return triton.ssd_chunked(x, dt, A, b, c, state)
    return reference.ssd_chunked(x, dt, A, b, c, state, chunk)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """See :func:`kvtool.kernels.ssd.reference.ssd_step`."""
    if use_triton(x):
        from kvtool.kernels.ssd import triton

        return triton.ssd_step(x, dt, A, b, c, state)
    return reference.ssd_step(x, dt, A, b, c, state)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvtool.kernels.ssd.reference.causal_conv`."""
    if _run_triton(x, weight, bias, state):
        from kvtool.kernels.ssd import triton

        return triton.causal_conv(x, weight, bias, state)
    return reference.causal_conv(x, weight, bias, state)


def _assembles(x: Tensor, b: Tensor) -> bool:
    """Whether the scan of states of a size can be trusted.

    By an old ptxas states of 16 x 32 came out wrong in bfloat16, see the README.
    """
    from kvtool.kernels.tiles import has_sound_assembler

    whole = x.shape[-1] % 64 == 0 and b.shape[-1] % 64 == 0
    return whole or has_sound_assembler(x.device)


def _run_triton(x: Tensor, *others: Tensor | None) -> bool:
    wanted = any(part is not None and part.requires_grad for part in (x, *others))
    return use_triton(x) and not (wanted and torch.is_grad_enabled())
