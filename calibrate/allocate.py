"""Budgets: how many tokens each head or layer keeps. Curves in, integers out, exact totals.

A *unit* is what gets a budget: a KV head, or a layer whose heads all keep the same number. Units of
one call are equally wide, so a token costs the same bytes in each: tokens stand for bytes.

Everywhere below, `total` is the sum of all budgets, met exactly; `low` and `high` bound each single
budget; budgets are int64. A total that the bounds cannot meet is a UsageError. `curves [..., K]`
float64 say what a unit retains with `grid [K]` tokens (int64, ascending from 0), linear in between;
no bound may lie beyond the grid.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.errors import CalibrationError, UsageError

Bound = int | Tensor
"""One number for all units, or int64 that broadcasts to one for each."""


def allocate(curves: Tensor, grid: Tensor, total: int, low: Bound, high: Bound) -> Tensor:
    """Maximises Σ_u f_u(b_u) over budgets `[...]`, f_u being the concave majorant of curve u.

    For concave f, taking tokens by falling marginal gain is optimal, so a larger total never takes
    a token from a unit. Units tied at the last gain share what is left evenly, the odd tokens go
    by `_rank`: the order of the units matters only to units that are equal in everything.
    """
    lows, highs = _curve_bounds(curves, grid, total, low, high)
    gain = majorant_slopes(curves, grid)  # [..., K-1], falling
    room = grid.clamp(lows[..., None], highs[..., None]).diff(dim=-1)  # tokens at each gain
    falling = gain.flatten().argsort(descending=True)
    filled = room.flatten()[falling].cumsum(0)
    last = gain.flatten()[falling][torch.searchsorted(filled, total - int(lows.sum()))]
    budget = lows + (room * (gain > last)).sum(-1)
    tied = (room * (gain == last)).sum(-1)
    rest = total - int(budget.sum())
    even = torch.zeros_like(tied, dtype=torch.float64)
    return budget + round_exactly(even, rest, 0, tied, _rank(curves, lows, highs))


def majorant_slopes(curves: Tensor, grid: Tensor) -> Tensor:
    """Slopes `[..., K-1]` of the least concave majorant of each curve, by gift wrapping."""
    slopes = torch.empty_like(curves[..., 1:])
    vertex = torch.zeros(curves.shape[:-1], dtype=torch.int64)
    slope = torch.zeros_like(curves[..., 0])
    for k in range(len(grid) - 1):
        chords = (curves[..., k + 1 :] - curves[..., k, None]) / (grid[k + 1 :] - grid[k])
        steepest, ahead = chords.max(dim=-1)
        here = vertex == k
        slope = torch.where(here, steepest, slope)
        vertex = torch.where(here, k + 1 + ahead, vertex)
        slopes[..., k] = slope
    return slopes


def round_exactly(
    shares: Tensor, total: int, low: Bound, high: Bound, priority: Tensor | None = None
) -> Tensor:
    """The integers that sum to `total` and lie nearest to `shares` in squares, within the bounds.

    All shares move by one whole number. The rest, less than one token per unit, goes to the largest
    remainders; of equal ones to those of higher `priority`, then of lower index. For fixed shares a
    larger total never takes a token from a unit.

    Args:
        shares: Float64 of any shape and any sum.
        priority: Of the same shape.
    """
    lows, highs = (bound.flatten() for bound in _bounds(shares.shape, total, low, high))
    whole = shares.flatten().floor().long()
    remainder = shares.flatten() - whole

    def shifted(by: int) -> Tensor:
        return (whole + by).clamp(lows, highs)

    shifts = range(int((lows - whole).min()), int((highs - whole).max()) + 1)
    shift = shifts[bisect_right(shifts, total, key=lambda by: int(shifted(by).sum())) - 1]
    budget = shifted(shift)
    order = torch.arange(len(budget))
    for key in (priority, remainder):  # stable sorts, so the last key counts first
        if key is not None:
            order = order[key.flatten()[order].argsort(descending=True, stable=True)]
    order = order[(shifted(shift + 1) > budget)[order]]  # those that have room
    budget[order[: total - int(budget.sum())]] += 1
    return budget.view(shares.shape)


def uniform(units: int | tuple[int, ...], total: int, low: Bound, high: Bound) -> Tensor:
    """The same budget for all units, as far as the bounds allow; odd tokens go to the first."""
    return round_exactly(torch.zeros(units, dtype=torch.float64), total, low, high)


def pyramid(
    layers: int, heads: int, total: int, low: Bound, high: Bound, beta: float = 20
) -> Tensor:
    """PyramidKV (arXiv 2406.02069): budgets `[L, H]` on a line that falls with depth.

    The last layer has c / beta tokens per head and the first 2c - c / beta, c being the mean; where
    the first would exceed `high`, the line is flatter.
    """
    mean = total / (layers * heads)
    first = min(2 * mean - mean / beta, int(torch.as_tensor(high).max()))
    line = torch.linspace(first, 2 * mean - first, layers, dtype=torch.float64)
    return round_exactly(line[:, None].expand(layers, heads), total, low, high)


def ada(
    curves: Tensor, grid: Tensor, total: int, low: Bound, high: Bound, floor: float = 0.2
) -> Tensor:
    """AdaKV (arXiv 2407.11550): budgets `[H]` of one layer's heads.

    A head gets as many tokens as it has among the best of all heads' pooled scores, which is what
    maximises the retained mass; b_h = (1 - floor) n_h + floor · total / H guards against the rest.

    Args:
        curves: `[H, K]`, cumulative attention mass of a head's tokens, best first.
        floor: Share of the total that is spread evenly.
    """
    lows, highs = _curve_bounds(curves, grid, total, low, high)
    winners = allocate(curves, grid, total, lows, highs)
    blend = (1 - floor) * winners.double() + floor * total / len(winners)
    return round_exactly(blend, total, lows, highs, _rank(curves, lows, highs))


def ada_layers(
    curves: Tensor, grid: Tensor, total: int, low: Bound, high: Bound, floor: float = 0.2
) -> Tensor:
    """AdaKV in every layer: budgets `[L, H]`, the same total per layer, from `curves [L, H, K]`."""
    lows, highs = _curve_bounds(curves, grid, total, low, high)
    totals = uniform(len(curves), total, lows.sum(1), highs.sum(1))
    layers = zip(curves, totals.tolist(), lows, highs, strict=True)
    return torch.stack([ada(c, grid, share, lo, hi, floor) for c, share, lo, hi in layers])


def prefix(curves: Tensor, grid: Tensor, total: int, low: Bound, high: Bound) -> Tensor:
    """PrefixKV (arXiv 2412.03409): each layer keeps its shortest prefix with a mass of at least p.

    The one p of all layers is bisected until the prefixes meet the total. This maximises the
    smallest retained mass, where `allocate` maximises the sum. A larger total never takes a token
    from a layer.

    Args:
        curves: `[L, K]`, cumulative attention mass of a layer's tokens, best first: to 1 from 0, or
            from what no token holds; never falling.
    """
    lows, highs = _curve_bounds(curves, grid, total, low, high)

    def kept(p: float) -> Tensor:
        share = (p - curves[..., :-1]) / curves.diff(dim=-1)  # of each segment; 0/0 at its end
        tokens = share.nan_to_num(0.0).clamp(0, 1) @ grid.diff().double()
        return tokens.ceil().long().clamp(lows, highs)

    left, right = 0.0, 2.0  # no layer reaches 2, so there all keep what they can
    for _ in range(60):
        p = (left + right) / 2
        left, right = (p, right) if int(kept(p).sum()) <= total else (left, p)
    least, most = kept(left), kept(right)
    return round_exactly(least.double(), total, least, most, _rank(curves, lows, highs))


def compress(errors: Tensor, total: int, low: Bound, high: Bound) -> Tensor:
    """CompressKV (arXiv 2508.02401): budgets `[L]` above `low` in proportion to eviction error.

    b_l = clip(low + round(w_l (B - Σ low)), low, high) with w = errors / Σ errors, then token by
    token in order of importance until the total is met.

    Args:
        errors: `[L]` float64, what a layer's output loses with a small cache; not negative.

    Raises:
        CalibrationError: An error is negative, or all are zero.
    """
    _check_finite("eviction errors", errors)
    if bool((errors < 0).any()) or not bool(errors.any()):
        raise CalibrationError(
            "eviction errors of layers are negative, or all zero, so they say nothing about layers",
            hint="calibrate with windows longer than the small cache that they are measured with",
        )
    lows, highs = _bounds(errors.shape, total, low, high)
    weight = errors / errors.sum()
    budget = lows + (weight * (total - int(lows.sum()))).round()
    return round_exactly(budget.clamp(lows, highs), total, lows, highs, priority=errors)


def uncomp(entropy: Tensor, total: int, low: Bound, high: Bound) -> Tensor:
    """UNComp (arXiv 2410.03090): budgets `[L, H]`, twice as large for the half of higher entropy.

    The paper's 1.5c and 0.75c tokens keep more than c on average; here their ratio is kept and the
    total is exact. Of an odd number of heads the smaller half is the one with larger budgets.

    Args:
        entropy: `[L, H]` float64, truncated matrix entropy of a head.
    """
    _check_finite("entropies of heads", entropy)
    upper = entropy.argsort(dim=-1, descending=True, stable=True)[:, : entropy.shape[1] // 2]
    weight = torch.ones_like(entropy).scatter(1, upper, 2.0)
    return round_exactly(weight * total / weight.sum(), total, low, high, priority=entropy)


def choose(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """One option per unit, so that Σ losses is small and Σ costs at most the budget.

    Along the lower convex hull of each unit's options, the steps that save most per cost are taken
    first: optimal for the hulls, and for the options themselves but for the last step. A larger
    budget never takes a step back.

    Args:
        costs, losses: Of each unit's options, in any order.

    Returns:
        The index of each unit's option.

    Raises:
        UsageError: The cheapest options of all exceed the budget.
    """
    chosen, left, steps = [], budget, []
    for unit, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        at = min(range(len(cost)), key=lambda i: (cost[i], loss[i]))
        chosen.append(at)
        left -= cost[at]
        while True:
            ahead = [
                ((loss[at] - loss[i]) / (cost[i] - cost[at]), cost[i], i)
                for i in range(len(cost))
                if cost[i] > cost[at] and loss[i] < loss[at]
            ]
            if not ahead:
                break
            gain, _, after = max(ahead)
            steps.append((-gain, unit, after, cost[after] - cost[at]))
            at = after
    if left < 0:
        raise UsageError(
            f"a budget of {budget} bytes is too small: the least that can be stored is "
            f"{budget - left}"
        )
    for _, unit, after, more in sorted(steps):
        if more > left:
            break
        chosen[unit] = after
        left -= more
    return chosen


def _bounds(shape: tuple[int, ...], total: int, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """`low` and `high` as int64 of `shape`, which `total` can be met with."""
    lows = torch.as_tensor(low, dtype=torch.int64).expand(shape)
    highs = torch.as_tensor(high, dtype=torch.int64).expand(shape)
    if bool(((lows < 0) | (lows > highs)).any()):
        raise UsageError(
            f"budgets from {int(lows.min())} to {int(highs.max())} tokens are impossible: for some "
            "head or layer the lower bound is negative or above the upper one"
        )
    least, most = int(lows.sum()), int(highs.sum())
    if not least <= total <= most:
        raise UsageError(
            f"a budget of {total} tokens in all cannot be met: with their bounds, the "
            f"{lows.numel()} heads or layers keep between {least} and {most} tokens together",
            hint=f"ask for {least} to {most} tokens, or change the bounds",
        )
    return lows, highs


def _curve_bounds(
    curves: Tensor, grid: Tensor, total: int, low: Bound, high: Bound
) -> tuple[Tensor, Tensor]:
    """`_bounds` of units with curves, which must say something about every budget in them."""
    _check_finite("curves", curves)
    lows, highs = _bounds(curves.shape[:-1], total, low, high)
    if int(highs.max()) > int(grid[-1]):
        raise UsageError(
            f"budgets of up to {int(highs.max())} tokens cannot be chosen from curves that were "
            f"measured up to {int(grid[-1])}",
            hint="lower the largest budget, or calibrate with longer windows",
        )
    return lows, highs


def _rank(curves: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """A number per unit `[...]` that says which it is, whatever the order of the units."""
    units = torch.cat((curves, lows[..., None], highs[..., None]), dim=-1)
    rank: Tensor = torch.unique(units.flatten(0, -2), dim=0, return_inverse=True)[1]
    return rank.view(lows.shape)


def _check_finite(what: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CalibrationError(f"{what} hold values that are not finite (NaN or infinity)")
