"""The scan, the step and the convolution in Triton do what plain torch does."""

import importlib

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, any_size, needs_any_size, random, rms_ratio

from kvtool.kernels import ssd
from kvtool.kernels.dispatch import VARIABLE
from kvtool.kernels.ssd import reference

pytest.importorskip("triton")
kernel = importlib.import_module("kvtool.kernels.ssd.triton")
pytestmark = pytest.mark.usefixtures("fresh_numbers", "poison")


def inputs(batch, tokens, heads, groups, p, n, dtype=torch.float32, strength=1.0):
    """As a mixer has them: x, b and c are parts of one row."""
    sizes = (heads * p, groups * n, groups * n)
    parts = random(batch, tokens, sum(sizes), dtype=dtype).split(sizes, dim=-1)
    counts = (heads, groups, groups)
    x, b, c = (part.unflatten(-1, (k, -1)) for part, k in zip(parts, counts, strict=True))
    dt = strength * random(batch, tokens, heads).exp()
    return x, dt, -random(heads).exp(), b, c, random(batch, heads, p, n)


def exact(x, dt, A, b, c, state=None):
    """The recurrence on the same numbers, in float32 throughout."""
    return reference.ssd_recurrence(x.float(), dt, A, b.float(), c.float(), state)


def assert_same(found, expected, dtype):
    """What y is summed from is rounded as y is; in bfloat16 the interpreter cuts off instead."""
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        assert rms_ratio(got, wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize(("batch", "heads", "groups"), [(2, 1, 1), (1, 4, 2)])
def test_a_text_of_any_length_is_scanned(tokens, batch, heads, groups, dtype):
    # Small states are not for an old assembler, see `kvtool.kernels.ssd`.
    size = (16, 32) if any_size() else (64, 64)
    parts = inputs(batch, tokens, heads, groups, *size, dtype)
    assert_same(kernel.ssd_chunked(*parts), exact(*parts), dtype)
    assert_same(kernel.ssd_chunked(*parts[:-1]), exact(*parts[:-1]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "n"), [(5, 7), (64, 64), (80, 16), (64, 128), (128, 128), (32, 256)])
def test_states_of_any_size_are_kept(p, n, dtype):
    if dtype == torch.bfloat16 and (p % 64 or n % 64):
        needs_any_size()
    parts = inputs(1, 150, 2, 1, p, n, dtype)
    assert_same(kernel.ssd_chunked(*parts), exact(*parts), dtype)


@pytest.mark.parametrize("segments", [2, 5])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_the_number_of_segments_does_not_matter(segments, strength):
    parts = inputs(1, 300, 2, 1, 16, 16, strength=strength)
    assert_same(kernel.ssd_chunked(*parts, segments=segments), exact(*parts), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "p", "n"),
    [(1, 3, 1, 64, 64), (3, 4, 2, 5, 7), (2, 2, 2, 128, 128), (1, 1, 1, 64, 256)],
)
def test_a_step_updates_the_state_where_it_is(batch, heads, groups, p, n, dtype):
    x, dt, A, b, c, state = inputs(batch, 1, heads, groups, p, n, dtype)
    expected = exact(x, dt, A, b, c, state)
    plane = torch.full((2 * batch + 1, *state.shape[1:]), torch.nan, device=DEVICE)
    plane[1::2] = state  # strided rows, poison between them
    y = kernel.ssd_step(x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], plane[1::2])
    assert_same((y[:, None], plane[1::2]), expected, dtype)
    assert bool(plane[::2].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (130, 4), (64, 2)])
def test_the_convolution_carries_its_state(channels, taps, tokens, dtype):
    x = random(2, tokens, channels + 3, dtype=dtype)[..., :channels]
    weight, bias = random(channels, taps, dtype=dtype), random(channels, dtype=dtype)
    state = random(2, channels, taps - 1, dtype=dtype)
    for more in ((bias, state), (None, None)):
        y, after = kernel.causal_conv(x, weight, *more)
        wide = (None if part is None else part.float() for part in more)
        expected, kept = reference.causal_conv(x.float(), weight.float(), *wide)
        assert y.dtype == dtype
        assert rms_ratio(y, expected) <= TOLERANCE[dtype]
        assert torch.equal(after, kept.to(dtype))


def test_whoever_wants_gradients_gets_plain_torch(monkeypatch):
    parts = inputs(1, 20, 2, 1, 8, 8)
    monkeypatch.setenv(VARIABLE, "triton")
    y, state = ssd.ssd_chunked(*parts)
    assert_same((y, state), exact(*parts), torch.float32)
    parts[0].requires_grad_()
    y, _ = ssd.ssd_chunked(*parts)
    assert y.requires_grad
    with torch.no_grad():
        assert not ssd.ssd_chunked(*parts)[0].requires_grad
