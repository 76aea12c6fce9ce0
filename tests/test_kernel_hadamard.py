"""The Hadamard transform is its matrix, its own inverse, and the same in Triton."""

import importlib

import pytest
import torch
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.hadamard import hadamard
from kvtool.kernels.hadamard.reference import hadamard as reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.hadamard.triton")
pytestmark = pytest.mark.usefixtures("fresh_numbers")


def matrix(width: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < width:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / width**0.5


@pytest.mark.parametrize("width", [1, 2, 8, 64, 128, 512])
def test_the_reference_is_a_product_with_the_matrix(width):
    x = random(3, width).double().cpu()
    torch.testing.assert_close(reference(x), x @ matrix(width))
    torch.testing.assert_close(reference(reference(x)), x)


@pytest.mark.parametrize("width", [0, 3, 80, 1024])
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"of {width} channels"):
        hadamard(torch.zeros(2, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4097,)])
@pytest.mark.usefixtures("poison")
def test_the_kernel_is_the_reference(shape, width, dtype):
    if len(shape) == 1 and shape[0] * width > 2**17:
        shape = (2**17 // width + 1,)
    x = random(*shape, width, dtype=dtype)
    got = kernel.hadamard(x)
    assert got.dtype == dtype
    assert rms_ratio(got, reference(x.double())) <= TOLERANCE[dtype]


def test_rows_that_do_not_lie_together_are_transformed_too():
    x = random(6, 64, 5).mT
    assert rms_ratio(kernel.hadamard(x), reference(x)) <= TOLERANCE[torch.float32]
    assert kernel.hadamard(x[:0]).shape == (0, 5, 64)
