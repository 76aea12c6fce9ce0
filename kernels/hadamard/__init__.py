"""The fast Walsh-Hadamard transform: a rotation that spreads what single channels hold."""

from torch import Tensor

from kvtool.kernels.dispatch import use_triton
from kvtool.kernels.hadamard.reference import WIDEST
from kvtool.kernels.hadamard.reference import hadamard as _reference

__all__ = ["WIDEST", "hadamard", "turn"]


def hadamard(x: Tensor) -> Tensor:
    """`x [..., W]` times the normalised Hadamard matrix; see `reference.py`."""
    if use_triton(x):
        from kvtool.kernels.hadamard.triton import hadamard as kernel

        return kernel(x)
    return _reference(x)


def turn(x: Tensor) -> Tensor:
    """The transform of the channels `[..., D]` of any head, in the largest blocks that D has."""
    width = min(x.shape[-1] & -x.shape[-1], WIDEST)
    return hadamard(x.unflatten(-1, (-1, width))).flatten(-2)
