"""Streaming attention in Triton is that of plain torch, for whole texts and pieces of them."""

import importlib

import pytest
import torch
from _kernel_tools import DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels import streaming_attention as operation
from kvtool.kernels.dispatch import VARIABLE
from kvtool.kernels.streaming_attention import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.streaming_attention.triton")
pytestmark = pytest.mark.usefixtures("fresh_numbers", "poison")


def heads(tokens, width=64, dtype=torch.float32, queries=4, kv_heads=2, batch=2):
    """As projections leave them: tokens before heads in memory."""
    counts = (queries, kv_heads, kv_heads)
    return [random(batch, tokens, n, width, dtype=dtype).transpose(1, 2) for n in counts]


def assert_same(found, parts, *options, dtype=torch.float32):
    expected = reference.streaming_attention(*(x.double() for x in parts), *options)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert rms_ratio(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 33, 100])
@pytest.mark.parametrize(("sink", "window"), [(4, 8), (0, 1), (0, 300), (70, 40), (300, 3)])
def test_a_text_of_any_length(tokens, sink, window):
    parts = heads(tokens, batch=1 if tokens > 50 else 2)
    found = kernel.streaming_attention(*parts, sink, window, 0.2)
    assert_same(found, parts, sink, window, 0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 80, 96, 128, 192, 256])
def test_heads_of_any_width(width, dtype):
    parts = heads(70, width, dtype, queries=3, kv_heads=1, batch=1)
    found = kernel.streaming_attention(*parts, 4, 20, width**-0.5)
    assert_same(found, parts, 4, 20, width**-0.5, dtype=dtype)


@pytest.mark.parametrize(("start", "more"), [(1, 0), (4, 5), (13, 0), (80, 5)])
def test_a_piece_needs_only_the_sinks_and_the_window_before_it(start, more):
    sink, window, tokens = 4, 8, 120
    q, k, v = heads(tokens, batch=1)
    oldest = max(sink, start - window + 1 - more)
    columns = [*range(min(sink, start)), *range(oldest, start), *range(start, tokens)]
    parts = q[:, :, start:], k[:, :, columns], v[:, :, columns]
    found = kernel.streaming_attention(*parts, sink, window, 0.2, start)
    assert_same(found, parts, sink, window, 0.2, start)


def test_what_no_query_sees_is_never_multiplied():
    q, k, v = heads(150, batch=1)
    k[:, :, 4:60], v[:, :, 4:60] = torch.nan, torch.nan
    found = kernel.streaming_attention(q[:, :, 80:], k, v, 4, 8, 0.2, 80)
    assert bool(found.isfinite().all())


def test_whoever_wants_gradients_gets_plain_torch(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    parts = heads(20)
    found = operation.streaming_attention(*parts, 2, 5, 0.2)
    assert_same(found, parts, 2, 5, 0.2)
    parts[0].requires_grad_()
    assert operation.streaming_attention(*parts, 2, 5, 0.2).requires_grad
