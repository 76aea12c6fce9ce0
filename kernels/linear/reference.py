"""Linear layer in plain torch; on the CPU with all threads, also for a single token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 8
"""Up to here a matrix product is bound by reading the weight."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., in]` times `weight [out, in]` transposed, plus `bias [out]`.

    For one token torch's CPU build calls a matrix-vector product that runs on one thread, and one
    core cannot draw what memory gives. Cut into a block of rows per thread, the same product is a
    batched one, whose batch the threads share.
    """
    tokens = x.numel() // x.shape[-1]
    parts = math.gcd(weight.shape[0], torch.get_num_threads())
    if x.device.type != "cpu" or tokens > FEW_TOKENS or parts == 1:
        return F.linear(x, weight, bias)
    columns = x.reshape(tokens, -1).T.expand(parts, -1, -1)  # [parts, in, tokens]
    blocks = torch.bmm(weight.view(parts, -1, weight.shape[1]), columns)
    out = blocks.reshape(weight.shape[0], tokens).T.reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias
