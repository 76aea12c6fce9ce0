"""Every query head is multiplied by the weight of its KV head, and the same in Triton."""

import importlib

import pytest
import torch
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.grouped_linear import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.grouped_linear.triton")
pytestmark = [pytest.mark.usefixtures("fresh_numbers"), pytest.mark.usefixtures("poison")]


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    group = x.shape[1] // len(weight)
    heads = weight.double().repeat_interleave(group, 0)  # [Q, K, N]
    y = torch.einsum("bqk,qkn->bqn", x.double(), heads)
    return y if bias is None else y + bias.double().repeat_interleave(group, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "inner", "width"),
    [(1, 1, 1, 1, 1), (2, 9, 3, 64, 80), (8, 8, 2, 130, 24), (3, 6, 6, 32, 96), (70, 4, 2, 5, 17)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_is_the_reference(batch, queries, heads, inner, width, biased, dtype):
    x, weight = random(batch, queries, inner, dtype=dtype), random(heads, inner, width, dtype=dtype)
    bias = random(heads, width, dtype=dtype) if biased else None
    expected = exact(x, weight, bias)
    # Of a single product a bias may leave little; its rounding is still that of the product.
    size = max(float(part.norm()) for part in (expected, exact(x, weight, None)))
    for module in (reference, kernel):
        found = module.grouped_linear(x, weight, bias)
        assert found.dtype == dtype
        assert found.shape == (batch, queries, width)
        assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * size


def test_all_is_read_where_it_lies():
    x, weight = random(6, 3, 4, 40)[:, 1].transpose(0, 1)[..., 3:37], random(2, 50, 34).mT
    bias = random(2, 99)[:, 7:57]
    for _ in range(2):
        found = kernel.grouped_linear(x, weight, bias)
        assert found.is_contiguous()
        assert rms_ratio(found, exact(x, weight, bias)) <= TOLERANCE[torch.float32]
        weight = weight.contiguous()


def test_no_rows_are_none():
    assert kernel.grouped_linear(random(0, 4, 8), random(2, 8, 3)).shape == (0, 4, 3)
