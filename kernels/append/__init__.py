"""Rotates the keys of new tokens and writes them, their values and their codes into pages."""

from torch import Tensor

from kvtool.kernels.append.reference import Encoder
from kvtool.kernels.append.reference import append as _reference
from kvtool.kernels.dispatch import use_triton

__all__ = ["Encoder", "append"]


def append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    q: Tensor | None = None,
    *,
    out: Tensor | None = None,
    key_code: Encoder | None = None,
    value_code: Encoder | None = None,
    code_slots: Tensor | None = None,
    code_rotated: bool = True,
    scales: tuple[Tensor, Tensor] | None = None,
    rings: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Writes one new token per sequence and returns its rotated queries; see `reference.py`."""
    if use_triton(k):
        from kvtool.kernels.append.triton import append as run
    else:
        run = _reference
    return run(
        k, v, cos, sin, key_pages, value_pages, slots, q, out=out,
        key_code=key_code, value_code=value_code, code_slots=code_slots, code_rotated=code_rotated,
        scales=scales, rings=rings,
    )  # fmt: skip
