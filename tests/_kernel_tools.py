"""What tests of kernels share."""

import zlib

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)


def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of their own for each test, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


def draw(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the device of the kernels."""
    return torch.randn(shape, generator=source).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that nobody has written, as bad as it can be."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def rms_ratio(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖; NaN if anything is."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The same up to the rounding of numbers and operands of that dtype."""
    assert got.shape == expected.shape
    allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    ratio = rms_ratio(got, expected)
    assert ratio <= allowed, f"RMS ratio {ratio:.2e} > {allowed:.0e}"
