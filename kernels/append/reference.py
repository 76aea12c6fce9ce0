"""What a decode step stores of its tokens, in plain torch: the contract, and the CPU path.

RoPE turns the pair of channels l and l + D/2 by the angle of the token's position (arXiv
2104.09864, section 3.2.2; halves, not neighbours, as transformers has it):

    x'_l       = x_l       cos_l       - x_{l + D/2} sin_l
    x'_{l+D/2} = x_{l+D/2} cos_{l+D/2} + x_l         sin_{l+D/2}
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0
"""Of e4m3."""


class Encoder(NamedTuple):
    """How the keys, or the values, of a token become a code, and where that is stored.

    Attributes:
        weight: `[H · D, R]`, any strides, in the dtype of what is encoded: code = x W + b with the
            heads of x one behind the other.
        bias: `[R]`, or None.
        pages: `[P, 1, page, R]`.
    """

    weight: Tensor
    bias: Tensor | None
    pages: Tensor


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
    """Rotates keys and queries of one new token per sequence, and writes keys, values and codes.

    Args:
        k: `[B, H, D]`, before RoPE; D even. Channels lie together, as in all tensors here.
        v: `[B, H, Dv]`.
        cos, sin: `[B, D]`, of each row's position.
        key_pages: `[P, H, page, D]`, changed in place.
        value_pages: `[P, H, page, Dv]`, changed in place.
        slots: `[B]` int64: page · page size + place in the page. Rows with a negative one are
            padding, and nothing is written for them. No two rows have the same.
        q: `[B, Q, D]`, before RoPE.
        out: `[B, Q, D]` for the rotated queries: `q` itself, or apart from it.
        key_code, value_code: Code keys, or values, too.
        code_slots: As `slots`, in the pages of codes; the same if not given.
        code_rotated: Whether the code of a key is taken after RoPE, of what is written; before it
            otherwise.
        scales: `[H]` fp32 each: what keys and values are divided by in pages of e4m3, into which
            larger numbers than it has go as its largest.
        rings: Where the last H' of the heads go instead, without codes or scales: keys and values
            `[R, H', C, D and Dv]`, and `[B]` int64 slots in them, place · C + where in it.

    Returns:
        The rotated `q`, `[B, Q, D]`; what it has in padding means nothing.
    """
    rotated = _rotate(k, cos, sin)
    if rings is not None:
        *planes, places = rings
        count = key_pages.shape[1]
        for plane, x in zip(planes, (rotated, v), strict=True):
            _write(plane, places, x[:, count:])
        rotated, v = rotated[:, :count], v[:, :count]
    for pages, x, of in zip(
        (key_pages, value_pages), (rotated, v), scales or (None, None), strict=True
    ):
        _write(pages, slots, x if of is None else _scaled(x, of))
    for code, x in ((key_code, rotated if code_rotated else k), (value_code, v)):
        if code is not None:
            encoded = x.flatten(1).float() @ code.weight.float()
            if code.bias is not None:
                encoded += code.bias
            where = slots if code_slots is None else code_slots
            _write(code.pages, where, encoded[:, None])
    if q is None:
        return None
    turned = _rotate(q, cos, sin)
    return turned if out is None else out.copy_(turned)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, H, D]`, in fp32 and rounded once."""
    cos, sin = (table[:, None].float() for table in (cos, sin))
    real, imag = x.float().chunk(2, dim=-1)
    turned = torch.cat((real, imag), dim=-1) * cos + torch.cat((-imag, real), dim=-1) * sin
    return turned.to(x.dtype)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """`clamp(x / s, ±448)` of `x [B, H, D]`, fp32."""
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST)


def _write(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Puts `rows [B, H, D]` into `pages [P, H, page, D]`."""
    kept = slots >= 0
    slots, size = slots[kept], pages.shape[2]
    pages[slots // size, :, slots % size] = rows[kept].to(pages.dtype)
