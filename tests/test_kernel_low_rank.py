"""Thin factors of blocks: as good as singular vectors, and read as what they stand for."""

import pytest
import torch

from kvtool.kernels.low_rank import low_rank, low_rank_scores, low_rank_sums
from kvtool.kernels.quantise import fake_quantise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return u.float().mT @ w.float()


@pytest.mark.parametrize(("tokens", "width"), [(64, 64), (16, 80), (64, 24)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_what_has_the_rank_comes_back(tokens, width, rank):
    x = random(2, 5, tokens, rank) @ random(2, 5, rank, width, seed=1)
    u, w = low_rank(x, rank)
    assert u.shape == (2, 5, rank, tokens)
    assert w.shape == (2, 5, rank, width)
    torch.testing.assert_close(product(u, w), x, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_of_what_rounding_leaves_it_is_nearly_the_best(rank):
    """Rounding errors have a flat spectrum, of which power iteration finds most."""
    x = random(30, 64, 64) * (1 + 10 * random(64, seed=1).relu())
    left = x - fake_quantise(x.mT, 2, 64).mT
    found = (left - product(*low_rank(left, rank))).square().sum()
    values = torch.linalg.svdvals(left).square()
    best, first = values[:, rank:].sum(), values[:, :rank].sum()
    assert best * (1 - 1e-4) <= found < best + 0.2 * first


def test_a_block_has_the_same_factors_alone_and_none_when_it_is_empty():
    x = random(3, 64, 64)
    for found, alone in zip(low_rank(x, 2), low_rank(x[1], 2), strict=True):
        torch.testing.assert_close(found[1], alone, rtol=1e-2, atol=1e-2)
    assert product(*low_rank(torch.zeros(16, 24), 2)).abs().max() == 0
    assert product(*low_rank(1e6 * x, 2)).isfinite().all()


def test_thin_products_are_those_of_blocks():
    u, w = low_rank(random(2, 5, 16, 24), 3)
    dense = product(u, w).flatten(1, 2)
    q, weights = random(2, 4, 24, seed=1), random(2, 4, 5 * 16, seed=2)
    torch.testing.assert_close(low_rank_scores(q, u, w), q @ dense.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low_rank_sums(weights, u, w), weights @ dense, rtol=1e-4, atol=1e-4)
