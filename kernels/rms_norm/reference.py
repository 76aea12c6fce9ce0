"""RMSNorm in plain torch: the contract, and the CPU path.

y = x / √(mean(x²) + ε) · w (arXiv 1910.07467, equation 4).
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises rows, in fp32 and rounded once.

    Args:
        x: `[..., W]`, any strides.
        weight: `[W]`.
        eps: ε.

    Returns:
        `[..., W]` in the dtype of `x`.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalises the sum of two tensors `[..., W]` of the same dtype, as that is rounded.

    Returns:
        The sum, and what :func:`rms_norm` makes of it.
    """
    both = x + other
    return both, rms_norm(both, weight, eps)
