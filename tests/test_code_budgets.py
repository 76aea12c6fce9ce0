"""Budgets of codes: never exceeded, nested, and optimal where losses add up."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.calibrate import palu
from kvtool.codes import STEP, CodePlan, Fitted, Projection, code_shapes, fit_codes, share_budget
from kvtool.errors import UsageError
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Base, Plan
from kvtool.slices import cut

Spectra = list[list[Tensor]]


@st.composite
def problems(draw: st.DrawFn, steps: int | None = None) -> tuple[list[CodePlan], Spectra]:
    """Codes of one to three layers with falling spectra; rows are whole `steps` where given."""
    codes, spectra = [], []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.integers(1, 2))
        rows = draw(st.integers(1, 30)) if steps is None else STEP * draw(st.integers(1, steps))
        found = []
        for _ in range(parts):
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
            steepness = draw(st.sampled_from([0, 1, 5, 40]))  # 0: all rows are worth the same
            losses = torch.rand(rows, generator=generator) ** steepness
            found.append(losses.sort(descending=True).values)
        codes.append(CodePlan("rotated", draw(st.integers(1, 3)), (rows,) * parts))
        spectra.append(found)
    return codes, spectra


def widths(codes: Sequence[CodePlan]) -> list[int]:
    return [width for code in codes for width in code.widths]


def lost(spectra: Spectra, chosen: Sequence[int]) -> float:
    parts = [x.double() for own in spectra for x in own]
    return math.fsum(float(x[n:].sum()) for x, n in zip(parts, chosen, strict=True))


@settings(derandomize=True, max_examples=60)
@given(problem=problems(), allocation=st.sampled_from(["even", "spectrum"]))
def test_a_budget_is_never_exceeded_and_a_larger_one_takes_nothing_away(problem, allocation):
    codes, spectra = problem
    rows = [len(x) for own in spectra for x in own]
    before = [0] * len(rows)
    for numbers in range(sum(rows) * 3 + 1):
        try:
            shared = share_budget(codes, spectra, allocation, numbers)
        except UsageError:
            assert not any(before)  # once there is room, there is room
            continue
        chosen = widths(shared)
        assert sum(chosen) <= numbers
        assert all(1 <= n <= most for n, most in zip(chosen, rows, strict=True))
        assert all(n >= less for n, less in zip(chosen, before, strict=True))
        assert [replace(x, widths=y.widths) for x, y in zip(shared, codes, strict=True)] == codes
        assert share_budget(shared, spectra, allocation, numbers) == shared  # of a slice the same
        before = chosen
    if allocation == "spectrum":
        assert before == rows


def least_loss(spectra: Spectra, options: Sequence[Sequence[int]]) -> list[float]:
    """By numbers stored: the least that any way of sharing so many or fewer would lose."""
    best = [math.inf] * (sum(max(own) for own in options) + 1)
    for way in itertools.product(*options):
        best[sum(way)] = min(best[sum(way)], lost(spectra, way))
    return list(itertools.accumulate(best, min))


@settings(derandomize=True, max_examples=40)
@given(problem=problems(steps=3))
def test_rows_are_shared_as_the_best_of_all_ways_would(problem):
    codes, spectra = problem
    rows = [len(x) for own in spectra for x in own]
    best = least_loss(spectra, [range(STEP, most + 1, STEP) for most in rows])
    for numbers in range(STEP * len(rows), sum(rows) + 1):
        chosen = widths(share_budget(codes, spectra, "spectrum", numbers))
        assert lost(spectra, chosen) == pytest.approx(best[numbers], rel=1e-6, abs=1e-9)


@settings(derandomize=True, max_examples=60)
@given(problem=problems())
def test_with_odd_numbers_of_rows_no_way_of_the_same_size_is_better(problem):
    codes, spectra = problem
    rows = [len(x) for own in spectra for x in own]
    least = [min(STEP, most) for most in rows]
    options = [
        sorted({*range(low, most, STEP), most}) for low, most in zip(least, rows, strict=True)
    ]
    best = least_loss(spectra, options)
    for numbers in range(sum(least), sum(rows) + 1):
        chosen = widths(share_budget(codes, spectra, "spectrum", numbers))
        assert lost(spectra, chosen) == pytest.approx(best[sum(chosen)], rel=1e-6, abs=1e-9)


def test_a_few_last_rows_compete_by_what_each_of_them_is_worth():
    spectra = [
        [torch.tensor([1.0] * STEP + [worth] * n)] for n, worth in ((3, 0.9), (5, 0.8), (8, 0.6))
    ]
    codes = [CodePlan("rotated", 1, (len(x),)) for (x,) in spectra]
    assert widths(share_budget(codes, spectra, "spectrum", 3 * STEP + 8)) == [11, 13, 8]


@settings(derandomize=True, max_examples=100)
@given(problem=problems(), context=st.integers(1, 5000), numbers=st.integers(0, 10**6))
def test_a_cache_takes_no_more_than_its_budget(problem, context, numbers):
    codes, spectra = problem
    exact = sum(2 * 16 * code.layers * (code.sink + code.window) for code in codes)
    for allocation in ("even", "spectrum"):
        try:
            shared = fit_codes(codes, spectra, allocation, numbers, context, 16)
        except UsageError:
            assert numbers < exact + context * len(codes) * STEP * 2 * 3
            continue
        assert sum(code.cache_bytes(context, 16, 1) for code in shared) <= numbers


def test_layers_get_the_same_however_many_share_a_code():
    codes = [CodePlan("rotated", n, (8 * n, 8 * n)) for n in (2, 2, 1)]
    spectra = [[torch.ones(8 * code.layers)] * 2 for code in codes]
    assert widths(share_budget(codes, spectra, "even", 5 * 7)) == [7, 7, 7, 7, 3, 3]
    with pytest.raises(UsageError, match="narrowest codes of all"):
        share_budget(codes, spectra, "even", 5)
    with pytest.raises(UsageError, match="narrowest codes of all store 48 numbers"):
        share_budget(codes, spectra, "spectrum", 47)


def test_a_slice_of_a_plan_with_few_rows_takes_what_is_there():
    """A plan need not store as many rows of its keys as of its values."""
    code, rows = CodePlan("rotated", 1, (2, 2)), [6, 3]
    tensors = {name: torch.ones(shape) for name, shape in code_shapes(0, code, 8, rows).items()}
    base = Base("m", "f", "c", layers=1, kv_heads=1, head_dim=8)
    plan = Plan(base, (LayerPlan((False,)),), codes=(code,), allocation="even", tensors=tensors)
    assert cut(plan, 10**6, 1000, 2).codes[0].widths == (3, 3)


def test_palu_shares_ranks_in_proportion_to_importance():
    """rank_i = total · F_i / Σ F, to the rows that are taken together."""
    importance = [1.0, 2.0, 5.0, 3.0, 9.0, 4.0]
    plain = torch.zeros(400, 400)
    fitted = Fitted(Projection(plain, plain, plain[0]), torch.ones(400))
    spectra = [[palu.ranked(fitted, x).spectrum] for x in importance]
    codes = [CodePlan("unrotated", 1, (400,))] * len(importance)
    for total in (120, 400, 900):
        chosen = widths(share_budget(codes, spectra, "spectrum", total))
        for rank, own in zip(chosen, importance, strict=True):
            assert abs(rank - total * own / sum(importance)) <= STEP
