"""Scores of tokens are those of the papers' formulas; what is kept follows from them alone."""

import pytest
import torch

from kvtool.rope import Rope, rotate
from kvtool.runtime.selection import (
    FUTURE,
    SINKS,
    WINDOW,
    expected_logits,
    expected_scores,
    keep,
    rotated_moments,
    selector,
    snapkv_scores,
)

SCALING = 0.35
ROPE = Rope(10000.0 ** -(torch.arange(4) / 4))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "w"), [(40, 32), (33, 32), (40, 3), (12, 1)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_snapkv_counts_votes_pools_neighbours_and_averages_the_group(n, w, heads):
    q, keys = random(4, w, 8), random(heads, n, 8, seed=1)
    expected = torch.zeros(heads, n - w)
    for h in range(4):
        votes = torch.zeros(n - w)
        for row in range(w):
            seen = n - w + row + 1
            logits = SCALING * keys[h // (4 // heads), :seen] @ q[h, row]
            votes += logits.softmax(0)[: n - w]
        for j in range(n - w):
            expected[h // (4 // heads), j] += votes[max(0, j - 2) : j + 3].sum() / 5
    got = snapkv_scores(q, keys, SCALING)
    torch.testing.assert_close(got[:, : n - w], expected / (4 // heads))
    assert got[:, n - w :].isposinf().all()


def test_a_sink_logit_is_a_further_key_that_gets_no_vote():
    w, n, logits = 3, 12, 2 + 2 * random(4, seed=2)
    q, keys, values = random(4, w, 8), random(2, n, 8, seed=1), random(2, n, 8, seed=3)
    alone = []
    for h in range(4):
        scores = SCALING * q[h] @ keys[h // 2].T
        scores = scores.masked_fill(torch.ones(w, n).triu(n - w + 1) > 0, -torch.inf)
        votes = torch.cat((scores, logits[h].expand(w, 1)), dim=1).softmax(-1).sum(0)[: n - w]
        expected = [votes[max(0, j - 2) : j + 3].sum() / 5 for j in range(n - w)]
        alone.append(snapkv_scores(q[h, None], keys[h // 2, None], SCALING, logits[h, None]))
        torch.testing.assert_close(alone[h][0, : n - w], torch.stack(expected))
        mean = SCALING * keys[h // 2, SINKS:] @ q[h, 0]
        share = torch.cat((mean, logits[h, None])).softmax(-1)[:-1]
        got = expected_scores(
            q[h, :1], torch.zeros(1, 8, 8), keys[h // 2, None], values[h // 2, None], SCALING,
            logits[h, None],
        )  # fmt: skip
        expected = share * values[h // 2, SINKS:].norm(dim=-1)
        torch.testing.assert_close(got[0, SINKS:], expected)
    both = snapkv_scores(q, keys, SCALING, logits)
    torch.testing.assert_close(both, torch.cat(alone).view(2, 2, n).mean(1))


def test_a_prompt_no_longer_than_the_window_is_all_window():
    assert snapkv_scores(random(4, 5, 8), random(2, 5, 8), SCALING).isposinf().all()


def test_the_closed_form_is_the_mean_over_gaussian_queries():
    mean, factor = random(2, 8), 0.25 * random(2, 8, 8, seed=1)
    keys = random(1, 6, 8, seed=2)
    covariance = factor @ factor.mT
    spread = SCALING**2 * (keys @ covariance * keys).sum(-1)
    assert 0.3 < spread.max() < 2  # felt, and yet to be sampled
    noise = random(2, 100_000, 8, seed=3)
    q = mean[:, None] + noise @ factor.mT
    sampled = (SCALING * q @ keys.mT).double().exp().mean(1)
    got = expected_logits(mean, covariance, keys, SCALING).exp()
    torch.testing.assert_close(got.double(), sampled, rtol=0.02, atol=0.0)


def test_without_spread_expected_attention_is_that_of_the_mean_query():
    mean, keys, values = random(4, 8), random(2, 20, 8, seed=1), random(2, 20, 8, seed=2)
    got = expected_scores(mean, torch.zeros(4, 8, 8), keys, values, SCALING)
    for h in range(2):
        share = (SCALING * mean[2 * h : 2 * h + 2] @ keys[h, SINKS:].T).softmax(-1).mean(0)
        torch.testing.assert_close(got[h, SINKS:], share * values[h, SINKS:].norm(dim=-1))
    assert got[:, :SINKS].isposinf().all()


def test_moments_turn_as_the_queries_do():
    q = random(2, 500, 8)
    cos, sin = (table[0] for table in ROPE.tables(torch.tensor([37])))
    turned = rotate(q, cos, sin)
    got = rotated_moments(q.mean(1), torch.stack([x.T.cov() for x in q]), cos, sin)
    torch.testing.assert_close(got[0], turned.mean(1))
    torch.testing.assert_close(got[1], torch.stack([x.T.cov() for x in turned]))


@pytest.mark.parametrize("pieces", [[50], [1] * 50, [3, 40, 7], [33, 17]])
def test_policies_see_the_same_prompt_in_any_pieces(pieces):
    unrotated, keys, values = random(4, 50, 8), random(2, 50, 8, seed=1), random(2, 50, 8, seed=2)
    unrotated = unrotated + 3  # as biases do
    q = rotate(unrotated, *ROPE.tables(torch.arange(50)))
    for policy in ("snapkv", "expected"):
        observer, start = selector(policy, SCALING, ROPE), 0
        for size in pieces:
            piece = slice(start, start + size)
            observer.see(q[:, piece], unrotated[:, piece], start)
            start += size
        if policy == "snapkv":
            expected = snapkv_scores(q[:, -WINDOW:], keys, SCALING)
        else:
            bulk = unrotated[:, SINKS:]
            covariance = torch.stack([x.T.cov(correction=0) for x in bulk])
            tables = (t.mean(0) for t in ROPE.tables(torch.arange(50, 50 + FUTURE)))
            moments = rotated_moments(bulk.mean(1), covariance, *tables)
            expected = expected_scores(*moments, keys, values, SCALING)
        torch.testing.assert_close(observer.scores(keys, values), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["snapkv", "expected"])
@pytest.mark.parametrize("n", [1, SINKS, SINKS + 1, 40])
def test_short_prompts_have_scores_too(policy, n):
    observer = selector(policy, SCALING, ROPE)
    observer.see(random(4, n, 8), random(4, n, 8), 0)
    scores = observer.scores(random(2, n, 8), random(2, n, 8))
    assert scores.shape == (2, n)
    assert not scores.isnan().any()
    assert keep(scores[0], 2).tolist() == keep(scores[0], 2).sort().values.tolist()


def test_the_best_are_kept_in_their_order_and_of_equals_the_later():
    scores = torch.tensor([0.1, 3.0, 0.2, torch.inf, 3.0, 0.2])
    assert keep(scores, 1).tolist() == [3]
    assert keep(scores, 2).tolist() == [3, 4]
    assert keep(scores, 4).tolist() == [1, 3, 4, 5]
    assert keep(scores, 6).tolist() == keep(scores, 99).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_budget_below_the_window_keeps_its_end():
    scores = snapkv_scores(random(4, WINDOW, 8), random(2, 50, 8), SCALING)
    assert keep(scores[0], 5).tolist() == [45, 46, 47, 48, 49]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_fp32_whatever_the_model_runs_in(dtype):
    q, keys = random(4, WINDOW, 8).to(dtype), random(2, 50, 8).to(dtype)
    assert snapkv_scores(q, keys, SCALING).dtype == torch.float32
    observer = selector("expected", SCALING, ROPE)
    observer.see(q, q, 0)
    assert observer.scores(keys, keys).dtype == torch.float32
