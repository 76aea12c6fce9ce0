"""Linear layers whose weights were put once into the order in which the CPU reads them.

torch's own product packs the weight anew at every call, which for a few rows costs more than the
product. And its sums depend on how many rows there are; these do not, in float32 and from
:data:`LEAST_ROWS` rows on, so a text does not depend on what else is being decoded.
"""

import torch
from torch import Tensor

LEAST_ROWS = 2
"""A product with a single row adds up in an order of its own."""

_EXPECTED_ROWS = 8  # only a hint for the layout, which serves any number


def pack(weight: Tensor) -> Tensor | None:
    """`weight [out, in]` in oneDNN's order; None where there is no such kernel for it."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or not known or not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., in]` times what :func:`pack` made of `weight [out, in]`, plus `bias [out]`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
