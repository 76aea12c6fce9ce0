"""Linear layer in plain torch; on the CPU with all threads, also for a single token."""

import math
from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 8
"""Up to here a matrix product is bound by reading the weight."""

_PROBE = (16384, 2048)  # a weight that no cache holds: of one that it does, one core reads enough
_CLEAR = 0.8  # of the time, lest chance decides


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., in]` times `weight [out, in]` transposed, plus `bias [out]`.

    For one token torch's CPU build calls a matrix-vector product, which on some processors (AMD's)
    runs on one thread, and one core cannot draw what memory gives. There the weight is cut into a
    block of rows per thread: the same product is a batched one, whose batch the threads share.
    """
    tokens = x.numel() // x.shape[-1]
    few = x.device.type == "cpu" and tokens <= FEW_TOKENS
    if few and _blocks_are_faster(weight.dtype, torch.get_num_threads()):
        return in_blocks(x, weight, bias)
    return F.linear(x, weight, bias)


def in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with a block of the weight's rows per thread."""
    tokens = x.numel() // x.shape[-1]
    parts = math.gcd(weight.shape[0], torch.get_num_threads())
    if parts == 1:
        return F.linear(x, weight, bias)
    columns = x.reshape(tokens, -1).T.expand(parts, -1, -1)  # [parts, in, tokens]
    blocks = torch.bmm(weight.view(parts, -1, weight.shape[1]), columns)
    out = blocks.reshape(weight.shape[0], tokens).T.reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


@cache
def _blocks_are_faster(dtype: torch.dtype, threads: int) -> bool:
    """Measured once, in a tenth of a second: the two differ by a factor of two and more."""
    if threads == 1:
        return False
    weight, x = torch.ones(_PROBE, dtype=dtype), torch.ones(1, _PROBE[1], dtype=dtype)
    plain, blocks = [], []
    for _ in range(5):
        plain.append(_seconds(F.linear, x, weight))
        blocks.append(_seconds(in_blocks, x, weight))
    return min(blocks) < _CLEAR * min(plain)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    started = perf_counter()
    product(x, weight)
    return perf_counter() - started
