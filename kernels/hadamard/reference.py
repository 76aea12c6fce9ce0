"""The fast Walsh-Hadamard transform in plain torch: the contract, and the CPU path.

H_1 = 1, H_2W = (H_W  H_W; H_W  -H_W), and x is multiplied by H_W / √W, which is orthogonal and
symmetric: applied twice it gives x back. W log2 W additions instead of W².
"""

import torch
from torch import Tensor

WIDEST = 512
"""Largest width."""


def stages(width: int) -> int:
    """log2 of a width.

    Raises:
        ValueError: It is no power of two, or wider than :data:`WIDEST`.
    """
    if width < 1 or width & (width - 1) or width > WIDEST:
        raise ValueError(
            f"a Hadamard transform of {width} channels is none; a power of two up to {WIDEST} is"
        )
    return width.bit_length() - 1


def hadamard(x: Tensor) -> Tensor:
    """`x H / √W`.

    Args:
        x: `[..., W]`, any float dtype; W is a power of two up to :data:`WIDEST`. Other widths have
            a transform by blocks: `x.unflatten(-1, (blocks, W))`.

    Returns:
        `[..., W]` in the dtype of `x`; added up in fp32 (fp64 for fp64), rounded once.
    """
    width = x.shape[-1]
    y = x if x.dtype == torch.float64 else x.float()
    for _ in range(stages(width)):
        # Sums and differences of neighbours; their index bit becomes the highest. After all stages
        # every bit is where it was.
        even, odd = y.unflatten(-1, (-1, 2)).unbind(dim=-1)
        y = torch.cat((even + odd, even - odd), dim=-1)
    transformed: Tensor = y * width**-0.5
    return transformed.to(x.dtype)
