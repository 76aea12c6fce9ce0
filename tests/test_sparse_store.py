"""Heads that are read sparsely keep everything, and read what a mask of chosen tokens leaves."""

import pytest
import torch
from _kernel_tools import DEVICE
from test_split_store import (
    MIXED,
    NONE,
    ORIGINALS,
    RING,
    SINK,
    WINDOW,
    F,
    Masked,
    MaskedAttention,
    S,
    beside,
    poison,
    prefill_and_decode,
    same,
    tokens,
)

from kvtool.checkpoint import Checkpoint
from kvtool.errors import PlanError
from kvtool.evaluate.protocol import cache_size
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.runtime.sparse import SparseAttention
from kvtool.runtime.stores import PAGE
from kvtool.sparse import SparseReading

LABELS, READ, PROMPT = 5, 12, 30


def sparse(checkpoint, labels=LABELS, read=READ, streaming=NONE, prefill="dense") -> Plan:
    """Label channels at random, others for every head and layer."""
    base = base_of(checkpoint)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for heads in streaming:
        drawn = [torch.randperm(base.head_dim, generator=generator) for _ in heads]
        reading = SparseReading(tuple(tuple(x[:labels].tolist()) for x in drawn), read, 2, 3)
        layers.append(LayerPlan(tuple(heads), SINK, WINDOW, sparse=reading))
    return Plan(base, tuple(layers), prefill)


class SparselyMasked(MaskedAttention):
    """Chooses by the channels that the plan names, where they lie in the model."""

    def visible(self, unrotated, q, k, v):
        masks = super().visible(unrotated, q, k, v)
        reading, n = self.layer.sparse, k.shape[1]
        for head in self.layer.full_heads:
            group = q.unflatten(0, (k.shape[0], -1))[head]
            channels = list(reading.channels[head])
            scores = self.stages.layout.scaling * group[..., channels] @ k[head, :, channels].T
            for i in range(max(self.prompt, reading.tokens), n):
                seen = scores[:, i, : i + 1]
                if self.stages.sink_logits is not None:
                    own = self.stages.sink_logits.unflatten(0, (k.shape[0], -1))[head]
                    seen = torch.cat((seen, own[:, None]), dim=-1)
                shares = seen.softmax(-1)[:, : i + 1].sum(0)
                shares[: reading.sink] = 2 * len(group)
                shares[i + 1 - reading.window :] = 2 * len(group)
                masks[head, i] = False
                masks[head, i, shares.topk(reading.tokens).indices] = True
        return masks


class SparseMasked(Masked):
    attention = SparselyMasked


@pytest.fixture(scope="module")
def loaded(tiny):
    return beside(tiny, sparse, SparseMasked)


@pytest.mark.parametrize("streaming", [NONE, MIXED])
@pytest.mark.parametrize("family", ORIGINALS)
def test_prefill_then_decode_is_the_masked_original(loaded, family, streaming):
    engine, masked = loaded(family, streaming=streaming)
    ids = tokens(PROMPT + PAGE + 6)  # planes grow on the way
    same(prefill_and_decode(engine, ids, PROMPT), masked(ids, PROMPT))


@pytest.mark.parametrize(
    ("kv_heads", "streaming"),
    [
        (1, ([F], [S], [F])),
        (4, ([S, F, F, S], [F, S, F, F], [F, F, F, F])),
        (4, ([S, S, S, S], [F, F, F, F], [S, S, S, F])),
    ],
)
@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_any_heads_of_a_layer_are_read_sparsely(loaded, kv_heads, streaming, prefill):
    engine, masked = loaded("qwen2", kv_heads, streaming=streaming, prefill=prefill)
    ids = tokens(60)
    same(prefill_and_decode(engine, ids, PROMPT), masked(ids, PROMPT))


@pytest.mark.parametrize("prompt", [1, READ - 1, READ, READ + 1])
def test_prompts_below_at_and_above_what_is_read(loaded, prompt):
    engine, masked = loaded()
    ids = tokens(prompt + 2 * READ, seed=prompt)
    same(prefill_and_decode(engine, ids, prompt), masked(ids, prompt))


def test_what_is_not_read_makes_a_difference(loaded):
    engine, _ = loaded()
    ids = tokens(60)
    got, dense = (
        prefill_and_decode(x, ids, PROMPT) for x in (engine, Engine.load(engine.checkpoint))
    )
    same(got[:PROMPT], dense[:PROMPT])
    assert (got[PROMPT:] - dense[PROMPT:]).abs().max() > 0.1


def test_a_text_that_is_read_whole_is_that_of_the_original(loaded):
    engine, _ = loaded(read=60)
    ids = tokens(60)
    expected = prefill_and_decode(Engine.load(engine.checkpoint), ids, PROMPT)
    same(prefill_and_decode(engine, ids, PROMPT), expected)


def test_channels_in_their_own_order_change_nothing(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    reading = SparseReading((tuple(range(16)),) * 2, 60)
    plan = Plan(base_of(checkpoint), (LayerPlan((F, F), sparse=reading),) * 3)
    engines = [Engine.load(checkpoint, plan=plan) for plan in (None, plan)]
    found = [prefill_and_decode(engine, tokens(60), PROMPT) for engine in engines]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_labels_are_a_set(loaded):
    engine, _ = loaded()
    layers = tuple(
        LayerPlan(
            x.streaming,
            sparse=SparseReading(tuple(row[::-1] for row in x.sparse.channels), READ, 2, 3),
        )
        for x in engine.plan.layers
    )
    other = Engine.load(engine.checkpoint, plan=Plan(engine.plan.base, layers))
    ids = tokens(60)
    same(prefill_and_decode(other, ids, PROMPT), prefill_and_decode(engine, ids, PROMPT))


@pytest.mark.parametrize("streaming", [NONE, MIXED])
@pytest.mark.parametrize("prompt", [4, PROMPT])
@pytest.mark.parametrize("chunk", [5, 512])
def test_a_question_in_one_call_is_a_question_token_by_token(loaded, streaming, prompt, chunk):
    engine, _ = loaded(streaming=streaming)
    ids = tokens(prompt + 25)
    expected = prefill_and_decode(engine, ids, prompt)
    cache = engine.new_cache(1, len(ids))
    poison(cache)
    engine.extend(cache, ids[:prompt])
    got = engine.extend(cache, ids[prompt:-1], all_logits=True, chunk=chunk)
    same(got, expected[prompt:-1])
    same(engine.decode(cache, ids[-1:]), expected[-1:])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_chunks_of_a_prompt_changes_nothing(loaded, chunk):
    engine, _ = loaded()
    ids = tokens(80)
    whole, pieces = (prefill_and_decode(engine, ids, 70, chunk=c) for c in (512, chunk))
    same(pieces, whole)


def test_rows_of_different_lengths_are_each_as_if_alone(loaded):
    engine, _ = loaded(streaming=MIXED)
    lengths, steps = (1, READ, 40, 9), 2 * READ
    rows = [tokens(n + steps, seed=n) for n in lengths]
    expected = [
        prefill_and_decode(engine, ids, n)[n:] for ids, n in zip(rows, lengths, strict=True)
    ]
    cache = engine.new_cache(len(rows), 16)
    poison(cache)
    for row, (ids, n) in enumerate(zip(rows, lengths, strict=True)):
        engine.extend(cache, ids[:n], row)
    for step in range(steps):
        now = torch.stack([ids[n + step] for ids, n in zip(rows, lengths, strict=True)])
        same(engine.decode(cache, now), torch.stack([logits[step] for logits in expected]))


def test_a_row_goes_back_to_any_length(loaded):
    engine, _ = loaded()
    ids = tokens(60)
    expected = prefill_and_decode(engine, ids, PROMPT)
    cache = engine.new_cache(1, 80)
    engine.extend(cache, ids[:PROMPT])
    for length in (PROMPT + 20, PROMPT + 1, PROMPT):
        engine.extend(cache, torch.cat((ids[PROMPT:length], tokens(20, seed=3))))
        cache.crop(0, length)
        assert cache.lengths == [length]
        same(engine.extend(cache, ids[length:], all_logits=True), expected[length:])
        cache.crop(0, PROMPT)


@pytest.mark.parametrize("streaming", [NONE, MIXED])
def test_bytes_are_those_of_everything_and_fewer_are_read(loaded, streaming):
    engine, _ = loaded(streaming=streaming)
    plan, full = engine.plan, sum(row.count(F) for row in streaming)
    memory = RowMemory(engine)
    for length in (1, READ, READ + 1, PAGE, 100):
        cache = engine.new_cache(1, length)
        engine.extend(cache, tokens(length))
        rings = (6 - full) * RING
        assert cache.allocated_bytes == plan.cache_bytes(length, 4)
        assert cache.allocated_bytes == 4 * 2 * 16 * (full * length + rings)
        each = 2 * 16 * length if length <= READ else LABELS * length + 2 * 16 * READ
        assert plan.read_bytes(length, 4) == 4 * (full * each + 2 * 16 * rings)
        assert plan.cache_bytes(length, 4) - memory.unread(length) == plan.read_bytes(length, 4)
    assert memory.holding(2 * PAGE, PAGE) == engine.new_cache(1, 2 * PAGE).allocated_bytes
    assert cache_size(engine).bytes_per_token == full * 4 * 2 * 16


def test_what_is_counted_as_read_is_what_a_step_reads(loaded):
    engine, _ = loaded()
    scheduler = Scheduler(Engine.load(engine.checkpoint, plan=engine.plan), 2**30)
    scheduler.add(Request(tokens(PROMPT).tolist(), 3, ignore_eos=True))
    while not scheduler.idle:
        scheduler.step()
    plan, lengths = engine.plan, (PROMPT + 1, PROMPT + 2)
    unread = sum(plan.cache_bytes(n, 4) - plan.read_bytes(n, 4) for n in lengths)
    assert unread > 0
    assert scheduler.counters.cache_bytes_read == 2 * plan.cache_bytes(PAGE, 4) - unread


def test_where_kernels_run_on_pages_it_goes_on_without_them(loaded, monkeypatch):
    engine, _ = loaded()
    assert all(isinstance(attention, SparseAttention) for attention in engine.attentions)
    ids = tokens(PROMPT + 10)
    expected = prefill_and_decode(engine, ids, PROMPT)
    monkeypatch.setenv("KVTOOL_KERNELS", "triton")
    assert Engine.load(engine.checkpoint, device=DEVICE).paged
    forced = Engine.load(engine.checkpoint, plan=engine.plan, device=DEVICE)
    assert not forced.paged
    same(prefill_and_decode(forced, ids, PROMPT).cpu(), expected)


def test_heads_of_a_layer_with_a_sliding_window_are_not_read_sparsely(tiny):
    checkpoint = Checkpoint.open(str(tiny("mistral", sliding_window=24)))
    with pytest.raises(PlanError, match=r"layer 0 .* keeps the window that it sees"):
        Engine.load(checkpoint, plan=sparse(checkpoint))
