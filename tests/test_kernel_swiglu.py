"""The activation of a gated MLP is what transformers computes, and the same in Triton."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.swiglu import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.swiglu.triton")
pytestmark = [pytest.mark.usefixtures("fresh_numbers"), pytest.mark.usefixtures("poison")]


def exact(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (8, 2048), (3, 1, 77), (2, 5, 1025), (64, 1), (0, 8)])
def test_the_kernel_is_the_reference(shape, dtype):
    x = 3 * random(*shape[:-1], 2 * shape[-1], dtype=dtype)
    for module in (reference, kernel):
        found = module.swiglu(x)
        assert found.dtype == dtype
        assert found.shape == shape
        if found.numel():
            assert rms_ratio(found, exact(x)) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow")  # exp(500), whose inverse is 0
def test_gates_far_from_zero_are_shut_or_open():
    x = torch.tensor([[-500.0, 500.0, 0.0, 2.0, 3.0, 4.0]]).to(random(1).device)
    assert kernel.swiglu(x).tolist() == [[0.0, 1500.0, 0.0]]


def test_rows_that_do_not_lie_together_are_read_too():
    x = random(5, 100)[:, 7:71]
    assert rms_ratio(kernel.swiglu(x), exact(x)) <= TOLERANCE[torch.float32]
    x = random(64, 5).T
    assert rms_ratio(kernel.swiglu(x), exact(x)) <= TOLERANCE[torch.float32]
