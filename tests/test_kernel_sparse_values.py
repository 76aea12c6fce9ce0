"""Sparse tokens: what is kept comes back bit for bit, in the bytes that were computed."""

import pytest
import torch

from kvtool.kernels.sparse_values import (
    bitmap_bytes,
    compress,
    decompress,
    reference,
    sparse_bytes,
    sparse_sums,
)

widths = pytest.mark.parametrize(
    ("width", "kept"), [(64, 32), (64, 20), (128, 39), (80, 1), (20, 7), (16, 16), (9, 9)]
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that fp16 holds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


def masked(x: torch.Tensor, kept: int) -> torch.Tensor:
    """Written out, number by number."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.zeros_like(rows)
    for row, into in zip(rows.tolist(), out, strict=True):
        for c in sorted(range(len(row)), key=lambda c: (-abs(row[c]), c))[:kept]:
            into[c] = row[c]
    return out.view_as(x)


@widths
def test_what_is_kept_comes_back_bit_for_bit(width, kept):
    """Also of tokens of zeros, of equal numbers, of numbers of one size, and with the largest."""
    x = random(2, 6, width)
    x[0, 0] = 0
    x[0, 1] = -0.5
    x[0, 2, 1::2] = 0
    x[0, 3] = x[0, 3].sign()
    x[0, 4, 2] = 65504
    bitmap, numbers = compress(x, kept)
    assert torch.equal(decompress(bitmap, numbers, width), masked(x, kept))
    set_ = [bin(int.from_bytes(bytes(row), "little")).count("1") for row in bitmap.view(12, -1)]
    assert set_ == [kept] * 12
    assert bitmap.nbytes + numbers.nbytes == 12 * sparse_bytes(width, kept)
    assert bitmap.shape == (2, 6, bitmap_bytes(width))


def test_a_bit_is_the_channel_that_it_counts():
    x = torch.zeros(16)
    x[[0, 3, 9, 15]] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    bitmap, numbers = compress(x, 4)
    assert bitmap.tolist() == [0b00001001, 0b10000010]
    assert numbers.tolist() == [1, -2, 3, -4]


def test_numbers_beyond_fp16_and_undefined_ones_stay_in_their_place():
    x = random(3, 16)
    x[0, 2], x[1, 5], x[2, 7] = 1e6, -torch.inf, torch.nan
    found = decompress(*compress(x, 8), 16)
    assert found[0, 2] == 65504
    assert found[1, 5] == -65504
    assert found.isnan().nonzero().tolist() == [[2, 7]]


def test_tokens_are_compressed_alone_and_in_any_dtype():
    x = random(3, 5, 24)
    whole = compress(x, 10)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for found, expected in zip(compress(x[1, 2:4].to(dtype), 10), whole, strict=True):
            assert torch.equal(found, expected[1, 2:4])
    turned = compress(x.mT.contiguous().mT, 10)  # not contiguous
    assert all(torch.equal(a, b) for a, b in zip(turned, whole, strict=True))


@widths
def test_sums_are_those_of_masked_values(width, kept, monkeypatch):
    """Over several tiles, the last of which is not full; all kept, they are those of all values."""
    monkeypatch.setattr(reference, "TILE", 8)
    x, weights = random(2, 21, width), random(2, 3, 21, seed=1)
    found = sparse_sums(weights, *compress(x, kept), width)
    torch.testing.assert_close(found, weights @ masked(x, kept), rtol=1e-5, atol=1e-5)
    everything = sparse_sums(weights, *compress(x, width), width)
    torch.testing.assert_close(everything, weights @ x, rtol=1e-5, atol=1e-5)
    assert sparse_sums(weights[..., :0], *compress(x[:, :0], kept), width).abs().max() == 0
