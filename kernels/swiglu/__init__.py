"""The activation of a gated MLP."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.swiglu.reference import swiglu as _reference

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate_up [..., 2 I]` to `[..., I]`; see `reference.py`."""
    if use_triton(gate_up):
        from kvtool.kernels.swiglu.triton import swiglu as kernel

        return kernel(gate_up)
    return _reference(gate_up)
