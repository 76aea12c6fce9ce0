"""Few tokens are read: those that labels choose, and what they hold exactly."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvtool.kernels.decode_attention import decode_attention
from kvtool.kernels.sparse_reading import choose, sparse_attention

SCALING = 0.3
heads_of = pytest.mark.parametrize(("queries", "heads"), [(6, 3), (6, 1), (4, 4)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cached(heads: int, length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Keys and values of so many tokens, and NaN where nothing was stored."""
    keys, values = random(heads, length + 7, width, seed=1), random(heads, length + 7, 12, seed=2)
    keys[:, length:], values[:, length:] = torch.nan, torch.nan
    return keys, values


def dense(q: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    return decode_attention(q[None], keys[None], values[None], [length], SCALING)[0]


@heads_of
def test_all_tokens_read_are_dense_attention_whatever_the_labels(queries, heads):
    q, (keys, values) = random(queries, 16), cached(heads, 40)
    got = sparse_attention(q, keys, values, 40, 2, 40, 4, 3, SCALING)
    torch.testing.assert_close(got, dense(q, keys, values, 40))


@heads_of
def test_the_result_is_attention_over_the_chosen_tokens_alone(queries, heads):
    q, (keys, values) = random(queries, 16), cached(heads, 50)
    how = (50, 5, 12, 2, 3, SCALING)
    chosen, got = choose(q, keys, *how), sparse_attention(q, keys, values, *how)
    for head in range(queries):
        own = head // (queries // heads)
        at = chosen[own].sort().values
        weights = (SCALING * keys[own, at] @ q[head]).softmax(0)  # of all channels, not of labels
        torch.testing.assert_close(got[head], weights @ values[own, at])


def test_with_all_channels_as_labels_the_largest_products_are_chosen():
    q, (keys, _) = random(3, 16), cached(3, 60)
    chosen = choose(q, keys, 60, 16, 9, 0, 1, SCALING)
    for head in range(3):
        products = keys[head, :60] @ q[head]
        products[59] = torch.inf  # itself
        assert set(chosen[head].tolist()) == set(products.topk(9).indices.tolist())


@heads_of
def test_labels_choose_what_their_heads_would_attend_to_most_together(queries, heads):
    q, (keys, _) = random(queries, 16), cached(heads, 60)
    chosen = choose(q, keys, 60, 4, 9, 0, 1, SCALING)
    for head in range(heads):
        group = q.view(heads, -1, 16)[head]
        shares = (SCALING * group[:, :4] @ keys[head, :60, :4].T).softmax(-1).sum(0)
        shares[59] = torch.inf
        assert set(chosen[head].tolist()) == set(shares.topk(9).indices.tolist())


def test_the_first_and_the_last_tokens_are_always_read():
    q, (keys, _) = random(4, 16), cached(2, 50)
    keys[:, :3], keys[:, 45:50] = -1e3 * q[::2, None], -1e3 * q[1::2, None]
    for row in choose(q, keys, 50, 16, 10, 3, 5, SCALING).tolist():
        assert set(row) > {0, 1, 2, 45, 46, 47, 48, 49}
        assert len(set(row)) == 10


def test_the_order_of_the_channels_behind_the_labels_does_not_matter():
    q, (keys, values) = random(4, 16), cached(2, 50)
    order = torch.cat((torch.arange(4), 4 + torch.randperm(12)))
    how = (50, 4, 10, 2, 3, SCALING)
    got = sparse_attention(q[:, order], keys[..., order].contiguous(), values, *how)
    torch.testing.assert_close(got, sparse_attention(q, keys, values, *how))


def test_more_labels_and_more_tokens_hold_more_of_the_attention():
    """On keys whose channels differ in size, which is what makes labels possible."""
    sizes = 2.0 ** -torch.arange(16).div(4)
    q, keys = random(64, 1, 16), 3 * sizes * random(1, 400, 16, seed=1)

    def held(labels: int, tokens: int) -> float:
        total = 0.0
        for one in q:
            at = choose(one, keys, 400, labels, tokens, 0, 1, SCALING)[0]
            total += float((SCALING * keys[0] @ one[0]).softmax(0)[at].sum())
        return total / len(q)

    by_labels = [held(labels, 40) for labels in (1, 2, 4, 8, 16)]
    by_tokens = [held(4, tokens) for tokens in (10, 20, 40, 80, 400)]
    for grows in (by_labels, by_tokens):
        assert all(a + 0.01 < b for a, b in pairwise(grows)), grows
    assert by_tokens[-1] == pytest.approx(1.0)
