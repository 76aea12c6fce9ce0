"""Merged parts are what attention over all their tokens gives, and the same in Triton."""

import importlib

import pytest
import torch
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.decode_attention import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.decode_attention.merge_triton")
pytestmark = [pytest.mark.usefixtures("fresh_numbers"), pytest.mark.usefixtures("poison")]


def test_merged_parts_are_attention_over_all_tokens():
    """Cut anywhere, also where a part gets nothing."""
    q, k, v = random(2, 6, 32), random(2, 3, 50, 32), random(2, 3, 50, 20)

    def attend(*tokens: slice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        found = [
            reference.paged_decode_attention(
                q, k[:, :, own], v[:, :, own], torch.full((2,), len(range(50)[own])), 0.3
            )
            for own in tokens
        ]
        return [x for x, _ in found], [mass for _, mass in found]

    (expected,), _ = attend(slice(0, 50))
    for cut in (0, 1, 30, 50):
        parts, masses = attend(slice(0, cut), slice(cut, 50), slice(0, 0))
        for merge in (reference.merge, kernel.merge):
            assert rms_ratio(merge(parts, masses), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 128), (2, 9, 80), (5, 2, 512)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_kernel_is_the_reference(count, shape, dtype):
    parts = [random(*shape, dtype=dtype) for _ in range(count)]
    masses = [5 * random(*shape[:2]) + 100 for _ in range(count)]
    for i, (part, mass) in enumerate(zip(parts, masses, strict=True)):
        if 0 < i < count - 1 or (count == 2 and not i):  # some rows have nothing here
            part[0], mass[0] = 0, -torch.inf
    found = kernel.merge(parts, masses)
    assert found.dtype == dtype
    expected = reference.merge([x.double() for x in parts], masses)
    assert rms_ratio(found, expected) <= TOLERANCE[dtype]


def test_parts_are_read_where_they_lie_and_in_what_they_are():
    parts = [
        random(4, 3, 32, dtype=torch.bfloat16).transpose(0, 1),
        random(3, 64, 4).mT[..., ::2],
        random(3, 1, 32).expand(3, 4, 32),
    ]
    masses = [random(3, 4), random(4, 3).T, random(3, 1).expand(3, 4)]
    found = kernel.merge(parts, masses)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    expected = reference.merge([x.double() for x in parts], masses)
    assert rms_ratio(found, expected) <= TOLERANCE[torch.bfloat16]


def test_no_rows_are_none():
    assert kernel.merge([random(0, 3, 8)] * 2, [random(0, 3)] * 2).shape == (0, 3, 8)
