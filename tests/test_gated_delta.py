"""Gated DeltaNet: chunks are the recurrence, a step in Triton is one in torch, gradients pass."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, random, rms_ratio

from kvtool.kernels.gated_delta import gated_delta_chunked, gated_delta_recurrence, reference

pytestmark = pytest.mark.usefixtures("fresh_numbers", "poison")


def inputs(batch, tokens, heads, groups, p, n, dtype=torch.float32, strength=1.0):
    """q, k, v, g, beta and a state; keys of norm 1, as the mixer has them."""
    q, k = (F.normalize(random(batch, tokens, groups, n), dim=-1).to(dtype) for _ in range(2))
    v, g = random(batch, tokens, heads, p, dtype=dtype), random(batch, tokens, heads)
    beta = random(batch, tokens, heads).sigmoid()
    return q, k, v, -strength * g.exp(), beta, random(batch, heads, p, n)


def defined(q, k, v, g, beta, state):
    """Equation 10 of the paper as matrices in float64, apart from the loop over tokens."""
    q, k, v, g, beta, state = (x.double() for x in (q, k, v, g, beta, state))
    groups, n = k.shape[2:]
    y = torch.empty_like(v)
    state = state.clone()
    for t in range(v.shape[1]):
        for head in range(v.shape[2]):
            key, query = (x[:, t, head // (v.shape[2] // groups)] for x in (k, q))
            strength = beta[:, t, head, None, None]
            replaced = torch.eye(n, device=k.device) - strength * key[:, :, None] * key[:, None]
            kept = g[:, t, head].exp()[:, None, None] * state[:, head] @ replaced
            state[:, head] = kept + strength * v[:, t, head, :, None] * key[:, None]
            y[:, t, head] = (state[:, head] @ query[:, :, None])[..., 0]
    return y, state


def close(found, wanted, tolerance=1e-5):
    for got, expected in zip(found, wanted, strict=True):
        assert got.shape == expected.shape
        assert rms_ratio(got, expected) <= tolerance


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_loop_is_the_definition(groups):
    parts = inputs(2, 20, 6, groups, 5, 7)
    state = parts[-1].clone()
    close(gated_delta_recurrence(*parts), defined(*parts))
    assert torch.equal(parts[-1], state)  # inputs stay


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("tokens", [1, 3, 64, 130])
@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_chunks_change_nothing(tokens, chunk, groups):
    parts = inputs(2, tokens, 6, groups, 5, 7)
    close(gated_delta_chunked(*parts, chunk), gated_delta_recurrence(*parts))
    close(gated_delta_chunked(*parts[:-1], chunk=chunk), gated_delta_recurrence(*parts[:-1]))


@pytest.mark.parametrize("strength", [1e-4, 30.0])
def test_slow_and_fast_decays_stay_exact(strength):
    parts = inputs(1, 200, 2, 1, 16, 8, strength=strength)
    close(gated_delta_chunked(*parts), defined(*parts))


def test_pieces_carry_the_state():
    *parts, state = inputs(2, 100, 4, 2, 6, 8)
    whole, last = gated_delta_chunked(*parts, state)
    found = []
    for piece in zip(*(x.split([37, 1, 62], dim=1) for x in parts), strict=True):
        y, state = gated_delta_chunked(*piece, state)
        found.append(y)
    close((torch.cat(found, dim=1), state), (whole, last))


def test_gradients_are_those_of_the_recurrence():
    """Which is written here once more: the step works in place."""
    parts = [x.requires_grad_() for x in inputs(1, 70, 2, 1, 3, 4)]
    y, state = gated_delta_chunked(*parts)
    found = torch.autograd.grad(y.square().sum() + state.sum(), parts)
    q, k, v, g, beta, now = parts
    total = 0
    for t in range(70):
        now = now * g[:, t].exp()[..., None, None]
        known = (now * k[:, t, :, None]).sum(-1)
        now = now + (beta[:, t, :, None] * (v[:, t] - known))[..., None] * k[:, t, :, None]
        total = total + (now * q[:, t, :, None]).sum(-1).square().sum()
    for got, wanted in zip(found, torch.autograd.grad(total + now.sum(), parts), strict=True):
        assert rms_ratio(got, wanted) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "p", "n"),
    [(1, 3, 1, 64, 64), (3, 4, 2, 5, 7), (2, 2, 2, 128, 128), (1, 1, 1, 64, 256)],
)
def test_a_step_in_triton_updates_the_state_where_it_is(batch, heads, groups, p, n, dtype):
    pytest.importorskip("triton")
    kernel = importlib.import_module("kvtool.kernels.gated_delta.triton")
    q, k, v, g, beta, state = inputs(batch, 1, heads, groups, p, n, dtype)
    plane = torch.full((2 * batch + 1, *state.shape[1:]), torch.nan, device=DEVICE)
    plane[1::2] = state  # strided rows, poison between them
    now = [x[:, 0] for x in (q, k, v, g, beta)]
    y = kernel.gated_delta_step(*now, plane[1::2])
    assert y.dtype == dtype
    expected = reference.gated_delta_step(*(x.float() for x in now), state)  # in place
    assert rms_ratio(y, expected) <= TOLERANCE[dtype]
    assert rms_ratio(plane[1::2], state) <= TOLERANCE[torch.float32]
    assert bool(plane[::2].isnan().all())
