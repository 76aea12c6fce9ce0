"""The chunked scan is the recurrence, in any chunks and any pieces, and can be trained through."""

import pytest
import torch

from kvtool.kernels.ssd import causal_conv, ssd_chunked, ssd_recurrence, ssd_step

HEADS, SIZE, STATE = 6, 5, 7


def draw(tokens, groups=6, batch=2, strength=1.0):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(batch, tokens, HEADS, SIZE)
    dt = strength * normal(batch, tokens, HEADS).exp()
    A = -normal(HEADS).exp()
    b, c = normal(batch, tokens, groups, STATE), normal(batch, tokens, groups, STATE)
    return x, dt, A, b, c, normal(batch, HEADS, SIZE, STATE)


def defined(x, dt, A, b, c, state):
    """The definition, number by number in float64, apart from the loop over tokens."""
    x, dt, A, b, c, s = (part.double() for part in (x, dt, A, b, c, state))
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        for head in range(HEADS):
            group = head // (HEADS // b.shape[2])
            outer = x[:, t, head, :, None] * b[:, t, group, None, :]
            decay, step = (dt[:, t, head] * A[head]).exp(), dt[:, t, head]
            s[:, head] = decay[:, None, None] * s[:, head] + step[:, None, None] * outer
            y[:, t, head] = (s[:, head] * c[:, t, group, None, :]).sum(-1)
    return y.float(), s.float()


def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 3, 16, 37])
def test_the_loop_is_the_definition(tokens, groups):
    inputs = draw(tokens, groups)
    close(ssd_recurrence(*inputs), defined(*inputs))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 130, 300])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 256])
def test_chunks_change_nothing(tokens, chunk, groups):
    inputs = draw(tokens, groups)
    close(ssd_chunked(*inputs, chunk), ssd_recurrence(*inputs))
    close(ssd_chunked(*inputs[:-1], chunk=chunk), ssd_recurrence(*inputs[:-1]))


@pytest.mark.parametrize("strength", [1e-4, 30.0])
def test_slow_and_violent_decay_stay_exact(strength):
    inputs = draw(130, strength=strength)
    close(ssd_chunked(*inputs, 64), ssd_recurrence(*inputs))


@pytest.mark.parametrize("cut", [1, 20, 63, 64, 129])
def test_a_text_in_two_pieces_is_one_text(cut):
    *tokens, state = draw(130, groups=2)
    x, dt, A, b, c = tokens
    y, after = ssd_chunked(*tokens, state)
    first, middle = ssd_chunked(x[:, :cut], dt[:, :cut], A, b[:, :cut], c[:, :cut], state)
    second, end = ssd_chunked(x[:, cut:], dt[:, cut:], A, b[:, cut:], c[:, cut:], middle)
    close((torch.cat((first, second), dim=1), end), (y, after))


def test_a_step_updates_the_state_where_it_is():
    x, dt, A, b, c, state = draw(1, groups=2)
    plane = torch.full((5, *state.shape[1:]), torch.nan)
    plane[1:4:2] = state  # strided rows, poison between them
    expected = ssd_recurrence(x, dt, A, b, c, state)
    y = ssd_step(x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], plane[1:4:2])
    close((y[:, None], plane[1:4:2]), expected)
    assert torch.isnan(plane[::2]).all()


def test_gradients_are_those_of_the_recurrence():
    x, dt, A, b, c, state = (part.double().requires_grad_() for part in draw(19, groups=2))

    def scan(x, dt, A, b, c, state):
        s, ys = state, []
        for t in range(x.shape[1]):
            wide = [part[:, t].repeat_interleave(HEADS // 2, dim=1) for part in (b, c)]
            write = (dt[:, t, :, None] * x[:, t])[..., None] * wide[0][:, :, None]
            s = (dt[:, t] * A).exp()[..., None, None] * s + write
            ys.append((s * wide[1][:, :, None]).sum(-1))
        return torch.stack(ys, dim=1), s

    inputs = (x, dt, A, b, c, state)
    weight = torch.randn(2, 19, HEADS, SIZE, dtype=torch.float64)
    found = []
    for form in (scan, lambda *parts: ssd_chunked(*(part.float() for part in parts), 8)):
        y, end = form(*inputs)
        found.append(torch.autograd.grad((y * weight).sum() + end.square().sum(), inputs))
    for got, expected in zip(found[1], found[0], strict=True):
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_half_precision_inputs_keep_a_float32_state():
    inputs = draw(130, groups=2)
    x, dt, A, b, c, state = inputs
    half = (x.bfloat16(), dt, A, b.bfloat16(), c.bfloat16(), state)
    y, end = ssd_chunked(*half)
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    rounded = tuple(part.float() for part in half)
    close((y.float(), end), ssd_recurrence(*rounded), tolerance=0.03)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_the_convolution_is_torchs_and_carries_its_state(tokens, biased):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, 3 + tokens, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator)
    bias = torch.randn(5, generator=generator) if biased else None
    whole = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, padding=3, groups=5)
    whole = whole[..., : 3 + tokens].mT
    y, state = causal_conv(x[:, :3], weight, bias)
    more, end = causal_conv(x[:, 3:], weight, bias, state)
    torch.testing.assert_close(torch.cat((y, more), dim=1), whole)
    torch.testing.assert_close(end, x[:, -3:].mT)
