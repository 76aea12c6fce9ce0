"""Streaming attention is the masked softmax of its definition, in any blocks and any pieces."""

import pytest
import torch

from kvtool.kernels.streaming_attention import streaming_attention

SCALING = 0.3


def defined(q, k, v, sink, window):
    """All T keys at hand, every score written out."""
    tokens = q.shape[2]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    visible = (j <= i) & ((j < sink) | (i - j < window))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (SCALING * q @ k.mT).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def random_heads(tokens, heads=6, kv_heads=2, batch=2):
    generator = torch.Generator().manual_seed(tokens)

    def draw(count):
        return torch.randn(batch, count, tokens, 8, dtype=torch.float64, generator=generator)

    return draw(heads), draw(kv_heads), draw(kv_heads)


@pytest.mark.parametrize("tokens", [1, 4, 5, 12, 13, 50])
@pytest.mark.parametrize(("sink", "window"), [(4, 8), (0, 8), (4, 1), (0, 1), (60, 8), (4, 60)])
@pytest.mark.parametrize("block", [1, 7, 256])
def test_a_whole_text_is_masked_attention(tokens, sink, window, block):
    q, k, v = random_heads(tokens)
    got = streaming_attention(q, k, v, sink, window, SCALING, block=block)
    torch.testing.assert_close(got, defined(q, k, v, sink, window))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_query_heads_read_the_key_head_of_their_group(kv_heads):
    q, k, v = random_heads(40, kv_heads=kv_heads)
    got = streaming_attention(q, k, v, 4, 8, SCALING, block=16)
    torch.testing.assert_close(got, defined(q, k, v, 4, 8))


@pytest.mark.parametrize("start", [1, 3, 4, 5, 11, 12, 13, 40])
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("block", [3, 256])
def test_a_piece_needs_only_the_sinks_and_the_window_before_it(start, more, block):
    sink, window, tokens = 4, 8, 50
    q, k, v = random_heads(tokens)
    oldest = max(sink, start - window + 1 - more)  # a longer past changes nothing
    columns = [*range(min(sink, start)), *range(oldest, start), *range(start, tokens)]
    got = streaming_attention(
        q[:, :, start:], k[:, :, columns], v[:, :, columns], sink, window, SCALING, start, block
    )
    torch.testing.assert_close(got, defined(q, k, v, sink, window)[:, :, start:])


def test_what_no_query_sees_is_never_multiplied():
    q, k, v = random_heads(50)
    k[:, :, 4:12], v[:, :, 4:12] = torch.nan, torch.nan
    got = streaming_attention(q, k, v, 4, 8, SCALING, block=10)
    assert got[:, :, 20:].isfinite().all()


def test_gradients_are_those_of_the_definition():
    heads = [x.requires_grad_() for x in random_heads(20)]
    weights = torch.randn(heads[0].shape, dtype=torch.float64)
    got = torch.autograd.grad(
        (streaming_attention(*heads, 2, 5, SCALING, block=6) * weights).sum(), heads
    )
    expected = torch.autograd.grad((defined(*heads, 2, 5) * weights).sum(), heads)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
