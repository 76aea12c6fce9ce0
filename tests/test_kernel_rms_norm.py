"""The norm is its equation, with the addition before it or without, and the same in Triton."""

import importlib

import pytest
import torch
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.rms_norm import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.rms_norm.triton")
pytestmark = [pytest.mark.usefixtures("fresh_numbers"), pytest.mark.usefixtures("poison")]

EPS = 1e-5
SHAPES = [(1, 64), (8, 4096), (1, 5, 77), (3, 1, 1), (40, 128), (2, 2, 1025), (300, 24)]


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_normalised(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    for module in (reference, kernel):
        found = module.rms_norm(x, weight, EPS)
        assert found.dtype == dtype
        assert found.shape == shape
        assert rms_ratio(found, exact(x, weight)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_normalised_as_it_is_rounded(shape, dtype):
    x, other = (random(*shape, dtype=dtype) for _ in range(2))
    weight, before = random(shape[-1], dtype=dtype), [x.clone(), other.clone()]
    for module in (reference, kernel):
        both, found = module.add_rms_norm(x, other, weight, EPS)
        assert both.dtype == found.dtype == dtype
        assert rms_ratio(both, x.double() + other.double()) <= TOLERANCE[dtype]
        assert rms_ratio(found, exact(both, weight)) <= TOLERANCE[dtype]
        assert torch.equal(x, before[0])
        assert torch.equal(other, before[1])


def test_eps_and_the_size_of_a_row_count():
    """Rows so small that epsilon decides; and a row of zeros is one."""
    x, weight = 1e-3 * random(4, 96), random(96)
    x[2] = 0
    found = kernel.rms_norm(x, weight, 1e-4)
    assert rms_ratio(found, exact(x, weight, 1e-4)) <= TOLERANCE[torch.float32]
    assert not found[2].any()


def test_heads_of_a_projection_are_read_where_they_lie(monkeypatch):
    projected, weight = random(3, 5, 7 * 16 + 3), random(16)
    views = {
        "a token": projected[:, :1, 3:].unflatten(-1, (7, 16)).transpose(1, 2),  # [B, H, 1, D]
        "a row": projected[:1, :, 3:].unflatten(-1, (7, 16)).transpose(1, 2),  # [1, H, T, D]
        "broadcast": projected[:, :1, 3:19].expand(3, 4, 16),
        "all": projected[:, :, 3:].unflatten(-1, (7, 16)).transpose(1, 2),
        "columns": random(16, 6).T,
    }
    copied = []
    contiguous = torch.Tensor.contiguous

    def counted(x):
        copied.append(x)
        return contiguous(x)

    monkeypatch.setattr(torch.Tensor, "contiguous", counted)
    copies = {}
    for name, x in views.items():
        copied.clear()
        found = kernel.rms_norm(x, weight, EPS)
        copies[name] = len(copied)
        assert found.is_contiguous()
        assert rms_ratio(found, exact(x, weight)) <= TOLERANCE[torch.float32]
        both, found = kernel.add_rms_norm(x, x.mul(2), weight, EPS)
        assert rms_ratio(both, 3 * x) <= TOLERANCE[torch.float32]
        assert rms_ratio(found, exact(3 * x, weight)) <= TOLERANCE[torch.float32]
    assert copies == {"a token": 0, "a row": 0, "broadcast": 0, "all": 1, "columns": 1}


@pytest.mark.parametrize("limit", ["_WIDEST", "_MOST"])
def test_what_is_too_large_for_the_kernel_is_left_to_torch(monkeypatch, limit):
    x, weight = random(3, 8), random(8)
    monkeypatch.setattr(kernel, limit, 7)
    monkeypatch.setattr(kernel, "_launch", None)
    assert rms_ratio(kernel.rms_norm(x, weight, EPS), exact(x, weight)) <= 1e-5
    both, found = kernel.add_rms_norm(x, x, weight, EPS)
    assert torch.equal(both, 2 * x)
    assert rms_ratio(found, exact(both, weight)) <= 1e-5


def test_no_rows_are_none():
    assert kernel.rms_norm(random(0, 3, 8), random(8), EPS).shape == (0, 3, 8)
