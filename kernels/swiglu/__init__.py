"""The activation of a gated MLP."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate_up [..., 2 I]` to `[..., I]`; see `reference.py`."""
    run = reference.swiglu
    if use_triton(gate_up):
        from kvtool.kernels.swiglu.triton import swiglu as run
    return run(gate_up)
