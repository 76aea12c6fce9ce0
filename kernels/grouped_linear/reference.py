"""A linear layer per KV head in plain torch: the contract, and the CPU path."""

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_q = x_q W_h + b_h for the query heads q of every KV head h.

    Args:
        x: `[B, Q, K]`, any strides; the query heads of a KV head are neighbours.
        weight: `[H, K, N]`, H divides Q, in the dtype of `x`.
        bias: `[H, N]`.

    Returns:
        `[B, Q, N]` in the dtype of `x`; summed up in fp32.
    """
    y = torch.matmul(x.unflatten(1, (len(weight), -1)), weight)  # [B, H, Q/H, N]
    if bias is not None:
        y += bias[:, None]
    return y.flatten(1, 2)
