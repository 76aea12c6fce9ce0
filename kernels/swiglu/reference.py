"""SwiGLU in plain torch: the contract, and the CPU path.

y = silu(g) · u with silu(g) = g / (1 + exp(-g)) (arXiv 2002.05202, section 2).
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """What a gated MLP hands to its last product.

    Args:
        gate_up: `[..., 2 I]`, g and behind it u.

    Returns:
        `[..., I]` in the same dtype; computed in fp32 and rounded once.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
