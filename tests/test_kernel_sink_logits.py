"""A sink logit is one more key with that score and a value of zeros, in every kernel."""

import importlib

import pytest
import torch
from _kernel_tools import DEVICE, DTYPES, TOLERANCE, Pages, packed_memory, random, rms_ratio
from torch.nn import functional as F

from kvtool.attention import causal_attention
from kvtool.kernels.decode_attention import decode_attention, reference
from kvtool.kernels.packed_attention import paged as packed_reference
from kvtool.kernels.sink_logits import attention, softmax
from kvtool.kernels.sparse_reading import choose, sparse_attention
from kvtool.kernels.streaming_attention import reference as streaming_reference

pytest.importorskip("triton")
decode = importlib.import_module("kvtool.kernels.decode_attention.triton")
streaming = importlib.import_module("kvtool.kernels.streaming_attention.triton")
packed = importlib.import_module("kvtool.kernels.packed_attention.triton")
pytestmark = [pytest.mark.usefixtures("fresh_numbers"), pytest.mark.usefixtures("poison")]


def with_a_key(q, k, v, mask, scaling, logits):
    """Attention in which every head has a key of its own, of score s and value 0, fp64."""
    q, k, v, logits = (x.double() for x in (q, k, v, logits))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = scaling * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    own = logits[None, :, None, None].expand(*scores.shape[:-1], 1)
    v = torch.cat((v, torch.zeros_like(v[:, :, :1])), dim=2)
    return torch.cat((scores, own), dim=-1).softmax(-1) @ v


def heads(tokens, seen, width=64, dtype=torch.float32, queries=6, kv_heads=2, rows=2):
    shapes = (queries, tokens), (kv_heads, seen), (kv_heads, seen)
    return [random(rows, *shape, width, dtype=dtype) for shape in shapes]


def logits_of(*shape):
    return 2 * random(*shape) + 2


def test_weights_lack_what_the_logit_holds():
    scores, logits = random(2, 3, 4, 5), logits_of(6)
    found = softmax(scores, logits)  # heads are the first two axes
    own = logits.view(2, 3, 1, 1).expand(2, 3, 4, 1)
    whole = torch.cat((scores, own), dim=-1).softmax(-1)
    torch.testing.assert_close(found, whole[..., :-1])
    torch.testing.assert_close(softmax(scores.flatten(0, 1)[None], logits, first=1)[0].sum(-1),
                               1 - whole[..., -1].flatten(0, 1))  # fmt: skip
    assert torch.equal(softmax(scores, None), scores.softmax(-1))
    assert torch.equal(softmax(scores, scores.new_full((6,), -torch.inf)), scores.softmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_way_is_the_written_one(masked, dtype):
    q, k, v = heads(9, 30, dtype=dtype)
    logits = logits_of(6).to(dtype)
    mask = torch.ones(9, 30, dtype=torch.bool, device=DEVICE).tril(21) if masked else None
    expected = with_a_key(q, k, v, mask, 0.3, logits)
    assert rms_ratio(attention(q, k, v, mask, 0.3, logits), expected) <= TOLERANCE[dtype]
    q.requires_grad_()
    written = attention(q, k, v, mask, 0.3, logits).detach()
    # It rounds scores to the dtype as well: in bfloat16 0.0068 ± 0.0005 over 1500 draws.
    assert rms_ratio(written, expected) <= 1.5 * TOLERANCE[dtype]


def test_gradients_are_those_of_the_further_key():
    parts = [*heads(40, 40, width=16), logits_of(6)]
    wanted = random(2, 6, 40, 16)
    grads = []
    mask = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril()
    for run in (
        lambda q, k, v, s: causal_attention(q, k, v, 0.3, sink_logits=s),
        lambda q, k, v, s: with_a_key(q, k, v, mask, 0.3, s).float(),
    ):
        own = [x.detach().clone().requires_grad_() for x in parts]
        grads.append(torch.autograd.grad((run(*own) * wanted).sum(), own))
    for found, expected in zip(*grads, strict=True):
        assert rms_ratio(found, expected) <= 1e-5


@pytest.mark.parametrize("window", [None, 1, 7, 500])
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (1, 30), (300, 300), (20, 290)])
def test_causal_attention(tokens, seen, window):
    q, k, v = heads(tokens, seen, width=16, rows=1)
    logits = logits_of(6)
    distance = torch.arange(seen - tokens, seen)[:, None] - torch.arange(seen)
    mask = (distance >= 0) & (distance < (window or seen))
    expected = with_a_key(q, k, v, mask.to(DEVICE), 0.3, logits)
    assert rms_ratio(causal_attention(q, k, v, 0.3, window, logits), expected) <= 1e-5


@pytest.mark.parametrize("lengths", [[30, 30], [7, 1]])
def test_one_query_of_contiguous_rows(lengths):
    q, k, v = heads(1, 40, width=16)
    logits = logits_of(6)
    found = decode_attention(q[:, :, 0], k, v, lengths, 0.3, logits)
    rows = [
        with_a_key(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], None, 0.3, logits)
        for b, n in enumerate(lengths)
    ]
    assert rms_ratio(found, torch.cat(rows)[:, :, 0]) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "by_row"), [(2, 3, False), (2, 3, True), (1, 20, False), (3, 1, False)]
)
def test_pages(kv_heads, group, by_row, dtype):
    pages = Pages.of([70, 1, 0, 128], 64)
    keys, values = (pages.plane(kv_heads, 64, dtype) for _ in range(2))
    q = random(4, kv_heads * group, 64, dtype=dtype)
    logits = logits_of(*([4] if by_row else []), kv_heads * group).to(dtype)
    args = (q, keys, values, pages.lengths, 0.125, pages.table)
    for run in (reference.paged_decode_attention, decode.paged_decode_attention):
        found, mass = run(*args, sink_logits=logits)
        of_row = logits.float().expand(4, -1)
        assert not found[2].any()
        torch.testing.assert_close(mass[2], of_row[2])
        for b, n in enumerate(pages.lengths.tolist()):
            if not n:
                continue
            own = pages.table[b, : -(-n // 64)].long()
            k, v = (x[own].movedim(0, 1).flatten(1, 2)[None, :, :n] for x in (keys, values))
            expected = with_a_key(q[b : b + 1, :, None], k, v, None, 0.125, of_row[b])
            assert rms_ratio(found[b], expected[0, :, 0]) <= TOLERANCE[dtype]
            k = k.double().repeat_interleave(group, 1)[0]
            scores = 0.125 * (q[b, :, None].double() @ k.mT)[:, 0]
            both = torch.cat((scores, of_row[b, :, None].double()), dim=-1)
            torch.testing.assert_close(mass[b].double(), both.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("items", [1, 2, 5, 40])
def test_the_number_of_splits_does_not_matter(items):
    pages = Pages.of([300, 10, 129], 64)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    args = (random(3, 6, 64), keys, values, pages.lengths, 0.125, pages.table)
    logits = logits_of(6)
    config = decode.Config(block_n=32, least=1, items=items, warps=4, stages=2)
    found, mass = decode.paged_decode_attention(*args, sink_logits=logits, config=config)
    expected, expected_mass = reference.paged_decode_attention(*args, sink_logits=logits)
    assert rms_ratio(found, expected) <= TOLERANCE[torch.float32]
    torch.testing.assert_close(mass, expected_mass, rtol=1e-5, atol=1e-4)


def test_the_logit_joins_one_of_several_parts():
    q, k, v, logits = random(2, 6, 32), random(2, 2, 50, 32), random(2, 2, 50, 32), logits_of(6)
    expected = with_a_key(q[:, :, None], k, v, None, 0.3, logits)[:, :, 0]
    for own in (0, 1):
        parts = []
        for i, at in enumerate((slice(0, 20), slice(20, 50))):
            lengths = torch.full((2,), len(range(50)[at]), dtype=torch.int32, device=DEVICE)
            joined = logits if i == own else None
            parts.append(
                decode.paged_decode_attention(
                    q, k[:, :, at], v[:, :, at], lengths, 0.3, sink_logits=joined
                )
            )
        found = reference.merge([x for x, _ in parts], [mass for _, mass in parts])
        assert rms_ratio(found, expected) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "start", "sink", "window"), [(64, 0, 4, 20), (80, 0, 0, 300), (64, 60, 4, 20)]
)
def test_streaming(width, start, sink, window, dtype):
    seen, tokens = 130, 130 - start
    q, k, v = heads(tokens, seen, width, dtype, queries=4, rows=1)
    logits = logits_of(4).to(dtype)
    at = torch.arange(seen)
    distance = torch.arange(start, seen)[:, None] - at
    mask = (distance >= 0) & ((distance < window) | (at < sink))
    expected = with_a_key(q, k, v, mask.to(DEVICE), 0.2, logits)
    own = (q, k, v, sink, window, 0.2, start)
    for run in (streaming_reference.streaming_attention, streaming.streaming_attention):
        assert rms_ratio(run(*own, sink_logits=logits), expected) <= TOLERANCE[dtype]


def test_minus_infinity_is_none():
    none = torch.full((6,), -torch.inf, device=DEVICE)
    pages = Pages.of([70, 0, 128], 64)
    keys, values = (pages.plane(2, 64, torch.float32) for _ in range(2))
    args = (random(3, 6, 64), keys, values, pages.lengths, 0.125, pages.table)
    for run in (reference.paged_decode_attention, decode.paged_decode_attention):
        for found, expected in zip(run(*args, sink_logits=none), run(*args), strict=True):
            torch.testing.assert_close(found, expected)
    q, k, v = heads(70, 70)
    for run in (streaming_reference.streaming_attention, streaming.streaming_attention):
        found = run(q, k, v, 4, 20, 0.2, sink_logits=none)
        torch.testing.assert_close(found, run(q, k, v, 4, 20, 0.2))
    torch.testing.assert_close(
        causal_attention(q, k, v, 0.2, sink_logits=none),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True),
    )


def test_packed_blocks():
    lengths = 0, 1, 100, 217
    ring, blocks, own = packed_memory(4, 3, lengths=lengths)
    q, logits = random(len(lengths), 6, 64), logits_of(6)
    found = packed.packed_attention(q, ring, blocks, own, 0.125, logits)
    expected = packed_reference.packed_attention(q, ring, blocks, own, 0.125, logits)
    assert rms_ratio(found, expected) <= 1.5 * TOLERANCE[torch.float32]
    plain = packed_reference.packed_attention(q, ring, blocks, own, 0.125)
    # Of one exact token, the share is known.
    k = ring.keys[ring.rows[1], :, 0].repeat_interleave(3, 0)
    share = torch.sigmoid(0.125 * (q[1] * k).sum(-1) - logits)
    torch.testing.assert_close(expected[1], plain[1] * share[:, None])


def test_few_tokens_are_chosen_by_what_the_logits_leave():
    q, keys, values = random(6, 16), random(2, 50, 16), random(2, 50, 16)
    logits = logits_of(6)
    chosen = choose(q, keys, 50, 16, 12, 2, 3, 0.5, logits)
    scores = 0.5 * q.view(2, 3, 16) @ keys.mT
    own = logits.view(2, 3, 1)
    shares = torch.cat((scores, own), dim=-1).softmax(-1)[..., :-1].sum(1)
    shares[:, :2], shares[:, -3:] = 9, 9
    expected = shares.topk(12).indices
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    found = sparse_attention(q, keys, values, 50, 16, 12, 2, 3, 0.5, logits)
    mask = torch.zeros(2, 50, dtype=torch.bool, device=DEVICE).scatter(1, chosen, True)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = torch.cat((scores, own), dim=-1).softmax(-1)[..., :-1]
    assert rms_ratio(found, (weights @ values).flatten(0, 1)) <= 1e-5
