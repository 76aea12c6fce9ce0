"""Budgets: exact totals within bounds, what each rule maximises, and what must not matter."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.calibrate.allocate import (
    ada,
    ada_layers,
    allocate,
    compress,
    prefix,
    pyramid,
    round_exactly,
    uncomp,
    uniform,
)
from kvtool.errors import CalibrationError, UsageError

property_test = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at_random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed))


def masses(*shape: int, seed: int, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative masses `[*shape, K]` of sorted attention rows, and a grid `[K]` of budgets."""
    peaked = torch.randn(*shape, tokens, dtype=torch.float64, generator=generator(seed)) * 3
    mass = peaked.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    grid = torch.tensor([0, 1, 2, 4, 8, 16, 32, tokens])
    return torch.cat((torch.zeros(*shape, 1, dtype=torch.float64), mass), dim=-1)[..., grid], grid


def at(curves: torch.Tensor, grid: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Values `[U]` of curves `[U, K]` at whole budgets `[U]`, linear between grid points."""
    k = torch.searchsorted(grid, budget).clamp(min=1)
    left, right = (curves.gather(1, i[:, None])[:, 0] for i in (k - 1, k))
    return left + (right - left) * (budget - grid[k - 1]) / (grid[k] - grid[k - 1])


def majorant(values: torch.Tensor) -> torch.Tensor:
    """Least concave function over 0 .. N that is nowhere below `values [U, N + 1]`: best chords."""
    n = values.shape[1]
    best = values.clone()
    for x, i, j in itertools.product(range(n), repeat=3):
        if i < x < j:
            chord = values[:, i] + (values[:, j] - values[:, i]) * (x - i) / (j - i)
            best[:, x] = torch.maximum(best[:, x], chord)
    return best


def choices(total: int, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Every tuple of budgets `[n, U]` that the bounds allow and that sums to the total."""
    axes = [torch.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    every = torch.cartesian_prod(*axes).view(-1, len(axes))
    return every[every.sum(1) == total]


@st.composite
def small(draw, lowest: int = -4):
    """Up to three units on a grid that ends at 7: curves full of ties, bounds, a total in reach."""
    units = draw(st.integers(1, 3))
    inner = draw(st.lists(st.integers(1, 6), unique=True, max_size=4))
    grid = torch.tensor([0, *sorted(inner), 7])
    steps = [[draw(st.integers(lowest, 4)) for _ in range(len(grid) - 1)] for _ in range(units)]
    curves = torch.tensor([[0, *row] for row in steps], dtype=torch.float64).cumsum(1)
    bounds = [sorted((draw(st.integers(0, 7)), draw(st.integers(0, 7)))) for _ in range(units)]
    low, high = torch.tensor(bounds).T
    total = draw(st.integers(int(low.sum()), int(high.sum())))
    return curves, grid, total, low, high


@st.composite
def bounded(draw, layers: int = 4, heads: int = 3):
    """A seed, a total and bounds `[L, H]` that it fits, over budgets of up to 40 tokens."""
    seed = draw(seeds)
    low, high = torch.randint(0, 41, (2, layers, heads), generator=generator(seed)).sort(0).values
    total = draw(st.integers(int(low.sum()), int(high.sum())))
    return seed, total, low, high


METHODS = {
    "uniform": lambda seed, *rest: uniform((4, 3), *rest),
    "pyramid": lambda seed, *rest: pyramid(4, 3, *rest),
    "allocate": lambda seed, *rest: allocate(*masses(4, 3, seed=seed), *rest),
    "ada_layers": lambda seed, *rest: ada_layers(*masses(4, 3, seed=seed), *rest),
    "prefix": lambda seed, *rest: prefix(*masses(4, 3, seed=seed), *rest),
    "uncomp": lambda seed, *rest: uncomp(at_random(seed, 4, 3), *rest),
    "compress": lambda seed, *rest: compress(at_random(seed, 4, 3), *rest),
}


@pytest.mark.parametrize("method", METHODS)
@property_test
@given(bounded())
def test_totals_are_met_exactly_within_the_bounds(method, case) -> None:
    seed, total, low, high = case
    budget = METHODS[method](seed, total, low, high)
    assert budget.dtype == torch.int64
    assert budget.shape == (4, 3)
    assert int(budget.sum()) == total
    assert bool(((low <= budget) & (budget <= high)).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_total_out_of_reach_is_refused_with_the_reach(method) -> None:
    for total in (23, 121):
        with pytest.raises(UsageError, match=f"{total} tokens.* between 24 and 120 tokens"):
            METHODS[method](0, total, 2, 10)
    with pytest.raises(UsageError, match="from 9 to 5 tokens are impossible"):
        METHODS[method](0, 84, 9, 5)
    with pytest.raises(UsageError, match="negative"):
        METHODS[method](0, 24, -1, 5)


@property_test
@given(small(), st.lists(st.floats(-3, 10), min_size=3, max_size=3))
def test_rounding_finds_the_nearest_integers(case, shares) -> None:
    _, _, total, low, high = case
    wanted = torch.tensor(shares[: len(low)], dtype=torch.float64)
    distances = ((choices(total, low, high) - wanted) ** 2).sum(1)
    found = round_exactly(wanted, total, low, high)
    assert float(((found - wanted) ** 2).sum()) <= float(distances.min()) + 1e-9


def test_equal_remainders_go_by_priority_and_then_by_index() -> None:
    shares = torch.tensor([1.5, 1.5, 1.75, 1.5], dtype=torch.float64)
    priority = torch.tensor([0.0, 2.0, 0.0, 2.0])
    by_index = round_exactly(shares, 6, 0, 9)
    by_priority = round_exactly(shares, 6, 0, 9, priority)
    assert by_index.tolist() == [2, 1, 2, 1]
    assert by_priority.tolist() == [1, 2, 2, 1]


@property_test
@given(small())
def test_allocate_is_optimal_for_the_concave_majorant(case) -> None:
    curves, grid, total, low, high = case
    units = range(len(curves))
    line = torch.stack([at(curves, grid, torch.full((len(units),), b)) for b in range(8)], dim=1)
    value = majorant(line)  # [U, 8]
    best = sum(value[u][choices(total, low, high)[:, u]] for u in units).max()
    found = allocate(curves, grid, total, low, high)
    assert float(sum(value[u][found[u]] for u in units)) == pytest.approx(float(best), abs=1e-9)


@property_test
@given(small(), st.permutations(range(3)))
def test_allocate_does_not_depend_on_the_order_of_units_even_where_gains_tie(case, shuffle) -> None:
    # Equal units get budgets that differ by one token at most; which of them does is their order.
    curves, grid, total, low, high = case
    order = torch.tensor([i for i in shuffle if i < len(curves)])
    units = torch.cat((curves, low[:, None], high[:, None]), dim=1).tolist()
    plain = allocate(curves, grid, total, low, high)
    shuffled = allocate(curves[order], grid, total, low[order], high[order])
    for a, b in itertools.product(range(len(units)), repeat=2):
        if units[a] == units[b]:
            assert abs(int(plain[a] - plain[b])) <= 1
    expected = sorted(zip(units, plain.tolist(), strict=True))
    assert sorted(zip([units[i] for i in order], shuffled.tolist(), strict=True)) == expected


def test_tied_units_share_evenly_and_the_odd_token_goes_by_what_a_unit_is() -> None:
    grid = torch.tensor([0, 4, 7])
    curves = torch.tensor([[0, 4, 7], [0, 4, 7], [0, 4, 4]], dtype=torch.float64)
    assert allocate(curves, grid, 9, 0, 7).tolist() == [3, 3, 3]
    assert allocate(curves, grid, 16, 0, 7).tolist() == [6, 6, 4]
    equal = curves[:2]
    high = torch.tensor([5, 7])
    odd = allocate(equal, grid, 7, 0, high)
    assert allocate(equal, grid, 7, 0, high.flip(0)).equal(odd.flip(0))


# To `uniform` and `pyramid` a unit is its bounds and its layer, so there is nothing to permute.
@pytest.mark.parametrize(
    ("method", "kind"),
    [(allocate, "curves"), (ada, "curves"), (prefix, "curves"), (compress, "errors")],
    ids=lambda x: getattr(x, "__name__", ""),
)
@property_test
@given(bounded(1, 6), st.permutations(range(6)))
def test_permuted_units_get_permuted_budgets(method, kind, case, shuffle) -> None:
    seed, total, low, high = case
    order = torch.tensor(shuffle)
    low, high = low[0], high[0]
    if kind == "curves":
        units, grid = masses(6, seed=seed)
        grids = (grid,)
    else:
        units, grids = at_random(seed, 6), ()
    plain = method(units, *grids, total, low, high)
    assert method(units[order], *grids, total, low[order], high[order]).equal(plain[order])


@property_test
@given(seeds, st.integers(0, 60), st.permutations(range(5)))
def test_permuted_heads_of_a_layer_get_permuted_budgets_by_entropy(seed, total, shuffle) -> None:
    entropy = at_random(seed, 1, 5)
    plain = uncomp(entropy, total, 0, 12)
    assert uncomp(entropy[:, shuffle], total, 0, 12).equal(plain[:, shuffle])


# The others are not monotone by nature: shares that change with the total are rounded anew, so that
# a token more may move one from unit to unit (compress, pyramid, uncomp, and ada's blend).
@pytest.mark.parametrize("method", ["allocate", "prefix", "uniform"])
@property_test
@given(bounded())
def test_a_larger_total_never_takes_a_token_from_a_unit(method, case) -> None:
    seed, total, low, high = case
    before = METHODS[method](seed, total, low, high)
    for larger in range(total + 1, min(total + 6, int(high.sum())) + 1):
        after = METHODS[method](seed, larger, low, high)
        assert bool((after >= before).all())
        before = after


@pytest.mark.parametrize("method", [allocate, prefix])
@property_test
@given(small(lowest=0))
def test_a_larger_total_never_takes_a_token_where_units_tie(method, case) -> None:
    curves, grid, _, low, high = case
    before = low
    for larger in range(int(low.sum()), int(high.sum()) + 1):
        after = method(curves / 20, grid, larger, low, high)
        assert bool((after >= before).all())
        before = after


@property_test
@given(st.lists(st.floats(-20, 60), min_size=1, max_size=6), st.integers(0, 100))
def test_rounding_fixed_shares_is_monotone(shares, total) -> None:
    fixed = torch.tensor(shares, dtype=torch.float64)
    total = min(total, 40 * len(shares) - 1)
    less, more = (round_exactly(fixed, n, 0, 40) for n in (total, total + 1))
    assert bool((more >= less).all())


@property_test
@given(bounded(1, 6))
def test_ada_without_a_floor_is_allocate_and_with_a_floor_of_one_uniform(case) -> None:
    seed, total, low, high = case
    curves, grid = masses(6, seed=seed)
    bounds = (total, low[0], high[0])
    assert ada(curves, grid, *bounds, floor=0).equal(allocate(curves, grid, *bounds))
    even = ada(curves, grid, 90, 0, 40, floor=1)
    assert even.tolist() == [15] * 6


@property_test
@given(seeds, st.integers(1, 200))
def test_ada_counts_the_winners_among_pooled_scores(seed, total) -> None:
    scores = torch.randn(5, 40, dtype=torch.float64, generator=generator(seed)).softmax(-1)
    mass = scores.sort(-1, descending=True).values.cumsum(-1)
    curves = torch.cat((torch.zeros(5, 1, dtype=torch.float64), mass), dim=1)
    winners = scores.flatten().topk(total).indices // 40
    budget = ada(curves, torch.arange(41), total, 0, 40, floor=0)
    assert budget.equal(torch.bincount(winners, minlength=5))


def test_ada_blends_the_winners_with_an_even_share() -> None:
    curves = torch.tensor([[0, 0.9, 0.9], [0, 0.1, 0.2]], dtype=torch.float64)
    grid = torch.tensor([0, 100, 200])
    assert ada(curves, grid, 100, 0, 200).tolist() == [90, 10]
    assert ada(curves, grid, 100, 0, 200, floor=0.5).tolist() == [75, 25]


def test_ada_layers_gives_every_layer_the_same_total() -> None:
    curves, grid = masses(4, 3, seed=0)
    budget = ada_layers(curves, grid, 122, 2, 30)
    assert budget.sum(1).tolist() == [31, 31, 30, 30]
    for layer in range(4):
        assert budget[layer].equal(ada(curves[layer], grid, int(budget[layer].sum()), 2, 30))


@property_test
@given(small(lowest=0))
def test_prefix_maximises_the_smallest_mass(case) -> None:
    curves, grid, total, low, high = case
    curves = curves / 20
    best = max(float(at(curves, grid, b).min()) for b in choices(total, low, high))
    found = at(curves, grid, prefix(curves, grid, total, low, high))
    assert float(found.min()) == pytest.approx(best, abs=1e-12)


@property_test
@given(seeds, st.integers(1, 240))
def test_prefix_keeps_the_shortest_prefixes_that_reach_one_mass(seed, total) -> None:
    curves, grid = masses(6, seed=seed)
    budget = prefix(curves, grid, total, 0, 40)
    reached = at(curves, grid, budget)
    one_less = at(curves, grid, (budget - 1).clamp(min=0))
    assert float(one_less[budget > 0].max()) <= float(reached.min()) + 1e-12


def test_prefix_spreads_evenly_what_is_left_when_layers_have_all_their_mass() -> None:
    curves = torch.tensor([[0, 1, 1, 1], [0, 0.5, 1, 1]], dtype=torch.float64)
    grid = torch.tensor([0, 2, 6, 20])
    assert prefix(curves, grid, 8, 0, 20).tolist() == [2, 6]
    assert prefix(curves, grid, 18, 0, 20).tolist() == [7, 11]


def test_pyramid_falls_from_the_first_layer_to_the_last() -> None:
    # c = 100 per head: from 2c - c / 20 = 195 down to c / 20 = 5, in steps of 190 / 19.
    budget = pyramid(20, 2, 100 * 40, 0, 1000)
    assert budget[:, 0].tolist() == [195 - 10 * layer for layer in range(20)]
    assert budget[:, 1].equal(budget[:, 0])
    # Where 195 tokens are not to be had: from 150 down to 2c - 150.
    flatter = pyramid(11, 1, 100 * 11, 0, 150)
    assert flatter[:, 0].tolist() == [150 - 10 * layer for layer in range(11)]
    assert pyramid(1, 3, 100, 0, 90).tolist() == [[34, 33, 33]]


@property_test
@given(bounded(1, 8))
def test_compress_clips_rounded_shares_and_repairs_the_total_by_importance(case) -> None:
    seed, total, low, high = case
    errors = at_random(seed, 8)
    low, high = low[0], high[0]
    weight = errors / errors.sum()
    expected = (low + (weight * (total - low.sum())).round()).long().clamp(low, high)
    important = errors.argsort(descending=True).tolist()
    while (missing := total - int(expected.sum())) != 0:
        step = 1 if missing > 0 else -1
        can_move = (low <= expected + step) & (expected + step <= high)
        movable = [layer for layer in important[::step] if can_move[layer]]
        expected[movable[: abs(missing)]] += step
    assert compress(errors, total, low, high).equal(expected)


def test_uncomp_gives_twice_as_much_to_the_half_of_higher_entropy() -> None:
    entropy = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.5, 0.6, 0.5]], dtype=torch.float64)
    assert uncomp(entropy, 120, 0, 40).tolist() == [[10, 20, 20, 10], [20, 10, 20, 10]]
    odd = torch.tensor([[0.1, 0.3, 0.2]], dtype=torch.float64)
    assert uncomp(odd, 40, 0, 40).tolist() == [[10, 20, 10]]
    assert uncomp(torch.rand(6, 1), 60, 0, 40).tolist() == [[10]] * 6


def test_budgets_beyond_the_measured_curves_are_refused() -> None:
    curves, grid = masses(2, 3, seed=0)
    for method in (allocate, ada_layers, prefix):
        with pytest.raises(UsageError, match=r"up to 41 tokens .* measured up to 40"):
            method(curves, grid, 60, 0, 41)


def test_numbers_that_mean_nothing_are_refused() -> None:
    nan = torch.full((2, 3), torch.nan, dtype=torch.float64)
    grid = torch.tensor([0, 1, 2])
    calls = [
        lambda: allocate(nan, grid, 2, 0, 2),
        lambda: ada(nan, grid, 2, 0, 2),
        lambda: prefix(nan, grid, 2, 0, 2),
        lambda: uncomp(nan, 2, 0, 2),
        lambda: compress(nan[0], 2, 0, 2),
        lambda: compress(torch.zeros(3), 2, 0, 2),
        lambda: compress(torch.tensor([1.0, -0.5]), 2, 0, 2),
    ]
    for call in calls:
        with pytest.raises(CalibrationError):
            call()


def test_a_thousand_units_and_a_hundred_thousand_tokens_take_no_time() -> None:
    slopes = at_random(0, 1000, 64).sort(1, descending=True).values
    curves = torch.cat((torch.zeros(1000, 1, dtype=torch.float64), slopes), dim=1).cumsum(1)
    grid = torch.arange(65) * 1600
    for method in (allocate, prefix, ada):
        start = time.process_time()
        budget = method(curves / curves.max(), grid, 40_000_001, 16, 100_000)
        assert time.process_time() - start < 1
        assert int(budget.sum()) == 40_000_001
