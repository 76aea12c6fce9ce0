"""Heads in e4m3: what an engine with a static fp8 cache reads, however tokens arrive."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from _convert_tools import one_thread, random_ids
from _family_cases import CASES
from _packed import (
    assert_same,
    check_arrival,
    check_bytes,
    check_crop,
    check_prompt_in_pieces,
    check_rows,
    check_snapshot,
    logits,
)
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.errors import PlanError
from kvtool.fp8 import Scales
from kvtool.kernels.decode_attention import decode_attention, decode_attention_e4m3, widen
from kvtool.kernels.dispatch import VARIABLE
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.floats import FloatHeads
from kvtool.runtime.memory import RowMemory
from kvtool.slices import compose
from kvtool.windows import WindowPlan

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LENGTH = 96
SCALES = Scales((0.01, 0.001), (0.02, 0.003))  # of what is 3 at most: some are too small
SOME_STREAM = ((True, False), (False, False), (True, True))


windows = pytest.mark.parametrize("window", [0, 1, 5])


def floats(
    checkpoint, prefill="streamed", streaming=((False, False),) * 3, scales=SCALES, window=0
):
    scales = replace(scales, window=window)
    layers = tuple(LayerPlan(heads, 3, 8, scales=scales) for heads in streaming)
    return Plan(base_of(checkpoint), layers, prefill)


@pytest.fixture(scope="module")
def llama(tiny):
    return Checkpoint.open(str(tiny("llama")))


def reference(checkpoint, ids: Tensor, window: int) -> Tensor:
    """Logits where each query sees rounded keys and values, but for its last tokens."""
    engine = Engine.load(checkpoint)
    keys, values = (torch.tensor(x)[:, None, None] for x in (SCALES.keys, SCALES.values))

    def rounded(x, scale):
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    for attention in engine.attentions:

        def attend(hidden, step, store, attention=attention):
            stages = attention.stages
            cos, sin = step.tables[attention.table]
            q, k, v = stages.project(hidden)
            q, k = stages.rotate(*stages.normalise(q, k), cos[:, None], sin[:, None])
            group, at = q.shape[1] // k.shape[1], torch.arange(len(ids))
            distance = at[:, None] - at
            near = distance < window
            k, coarse_k, v, coarse_v = (
                x.repeat_interleave(group, 1) for x in (k, rounded(k, keys), v, rounded(v, values))
            )
            scores = torch.where(near, q @ k.mT, q @ coarse_k.mT) * stages.layout.scaling
            weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
            return stages.output((weights * near) @ v + (weights * ~near) @ coarse_v, hidden)

        attention.attention = attend
    return logits(engine, ids, len(ids))


@windows
def test_all_but_the_window_is_read_as_an_fp8_cache_holds_it(llama, window, poison):
    ids = random_ids(LENGTH)
    expected, dense = reference(llama, ids, window), logits(Engine.load(llama), ids, len(ids))
    engine = Engine.load(llama, plan=floats(llama, window=window))
    for pieces in ((LENGTH,), (1,), (30, 1, 40)):
        found = logits(engine, ids, *pieces)
        assert_same(found, expected)
    assert (found - dense).abs().mean() > 20 * (found - expected).abs().mean()


@windows
def test_the_same_however_tokens_arrive(llama, window, poison):
    planned = partial(floats, llama, window=window)
    check_arrival(llama, lambda prefill: planned(prefill), random_ids(LENGTH))


@windows
def test_sink_logits_join_however_tokens_arrive(tiny, window, poison):
    checkpoint, ids = Checkpoint.open(str(tiny("gpt_oss", **CASES["gpt_oss"][1]))), random_ids(60)
    scales = replace(SCALES, window=window)
    layers = [replace(x, scales=scales) if x.full_heads else x for x in whole_layers(checkpoint)]
    engine = Engine.load(checkpoint, plan=Plan(base_of(checkpoint), tuple(layers), "streamed"))
    expected, exact = logits(engine, ids, 1), logits(Engine.load(checkpoint), ids, 1)
    for pieces in ((60,), (20, 1, 30)):
        apart = (logits(engine, ids, *pieces) - expected).abs().mean()
        assert apart < (exact - expected).abs().mean() / 20


def test_queries_of_a_long_call_see_their_own_windows(llama):
    """More of them than have a mask together."""
    ids = random_ids(500)
    engine = Engine.load(llama, plan=floats(llama, window=7))
    assert_same(logits(engine, ids, 500), logits(engine, ids, 100, 400))


@windows
def test_a_prompt_may_come_in_pieces_and_rows_decode_together(llama, window):
    plan = floats(llama, "dense", window=window)
    check_prompt_in_pieces(Engine.load(llama, plan=plan), random_ids(LENGTH))


@windows
def test_rows_of_different_lengths_do_not_disturb_each_other(llama, window, poison):
    check_rows(Engine.load(llama, plan=floats(llama, window=window)))


def test_a_row_goes_back_to_any_of_its_tokens(llama, poison):
    """With a window it starts over."""
    ring = Engine.load(llama, plan=floats(llama, window=5)).new_cache(1, LENGTH).stores[0]
    assert not ring.can_crop(0, 60, 59)
    assert ring.can_crop(0, 5, 4)
    engine = Engine.load(llama, plan=floats(llama))
    check_crop(engine, random_ids(LENGTH), 81)
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, random_ids(LENGTH))
    cache.crop(0, 7)
    assert cache.lengths == [7]


@windows
def test_a_snapshot_is_where_it_was(llama, window):
    plan = floats(llama, streaming=SOME_STREAM, window=window)
    check_snapshot(Engine.load(llama, plan=plan), random_ids(96))


def test_measured_bytes_are_the_planned_ones(llama):
    """A byte per number, also beside heads that stream, and as the cache grows."""
    for streaming, window in itertools.product((((False, False),) * 3, SOME_STREAM), (0, 5)):
        plan = floats(llama, streaming=streaming, window=window)
        full = sum(x.count(False) for x in streaming)
        assert plan.bytes_per_token(2) == plan.bytes_per_token(4) == 2 * 16 * full
        ring = sum(x.count(True) for x in streaming) * 2 * 4 * 16 * 11
        assert plan.cache_bytes(64, 4) - ring == 2 * 16 * full * (64 + 4 * window)
        check_bytes(Engine.load(llama, plan=plan), 4)


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_the_memory_of_a_row_is_known_before(llama, prefill):
    engine = Engine.load(llama, plan=floats(llama, prefill, SOME_STREAM, window=5))
    memory = RowMemory(engine)
    for tokens in (64, 128, 640):
        assert memory.holding(tokens, tokens) == engine.new_cache(1, tokens).allocated_bytes
    assert (memory.reading(128) > memory.holding(128, 128)) == (prefill == "dense")


def test_numbers_beyond_the_largest_are_stored_as_it(llama):
    """Whatever their sign; and all others within a sixteenth of themselves."""
    engine = Engine.load(llama, plan=floats(llama))
    store = engine.new_cache(1, LENGTH).stores[0]
    assert isinstance(store, FloatHeads)
    k, v = torch.randn(2, 1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    k[0, 0, 3, 5], v[0, 1, 2, 4] = 1e9, -1e9
    store.put(0, [0], k, v)
    for x, scale, plane in zip((k, v), store.scales, store.planes.values(), strict=True):
        read, most = widen(plane[:, :, :16]) * scale[:, None, None], 448 * scale[:, None, None]
        inside = x.abs() <= most
        assert (~inside).sum() > 1
        torch.testing.assert_close(read[~inside], (most * x.sign())[~inside])
        least = scale[:, None, None] * 2.0**-10  # half of the least number
        assert ((read - x).abs() <= (x.abs() / 16).maximum(least) * 1.001)[inside].all()


def test_every_number_is_read_as_torch_converts_it():
    """In more than one tile; a NaN makes what reads it NaN, and no more."""
    heads, count = 2, 5000
    codes = torch.arange(heads * count * 16, dtype=torch.int32).remainder(253).to(torch.uint8)
    codes = (codes + (codes > 126)).view(heads, count, 16)  # 127 is NaN
    floats = codes.view(torch.float8_e4m3fn).float()
    assert len(floats.unique()) == 252
    torch.testing.assert_close(widen(codes), floats, rtol=0, atol=0)
    torch.testing.assert_close(widen(codes.mT), floats.mT, rtol=0, atol=0)
    scales = torch.tensor([[1e-3, 0.02], [0.5, 7.0]])
    read = [floats[None] * scale[None, :, None, None] for scale in scales]
    q, logit = torch.randn(6, 16), torch.randn(6)
    for sink in (None, logit):
        expected = decode_attention(q[None], *read, [count], 0.3, sink)[0]
        found = decode_attention_e4m3(q, codes, codes, 0.3, tuple(scales), sink)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    near = torch.randn(2, heads, 9, 16)
    both = [torch.cat((x, y[None]), dim=2) for x, y in zip(read, near, strict=True)]
    expected = decode_attention(q[None], *both, [count + 9], 0.3, logit)[0]
    found = decode_attention_e4m3(q, codes, codes, 0.3, tuple(scales), logit, tuple(near))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    broken = codes.clone()
    broken[1, 4500, 3] = 255
    assert not decode_attention_e4m3(q, broken, codes, 0.3, tuple(scales))[:3].isnan().any()
    assert decode_attention_e4m3(q, broken, codes, 0.3, tuple(scales))[3:].isnan().all()


def test_a_scale_belongs_to_its_head(llama):
    """Also where the heads of a layer are sorted by what they keep."""
    ids, streams = random_ids(LENGTH), ((True, False), (False, True), (True, False))

    def read(first, second):
        scales = Scales((first, second), (first, second))
        layers = [LayerPlan(heads, 3, 8, scales=scales) for heads in streams]
        layers[1] = replace(layers[1], scales=Scales(scales.keys[::-1], scales.values[::-1]))
        plan = Plan(base_of(llama), tuple(layers), "streamed")
        return logits(Engine.load(llama, plan=plan), ids, 60)

    assert torch.equal(read(1.0, 0.01), read(0.003, 0.01))
    assert not torch.equal(read(1.0, 0.01), read(1.0, 0.003))


def test_budgets_drop_tokens_of_other_heads(llama, monkeypatch):
    """Heads with a token budget keep them exactly, beside heads in fp8; not in shared pages."""
    right = Scales((0.01,) * 2, (0.01,) * 2)
    plan = floats(llama, "dense", scales=right)
    layers = tuple(replace(x, budget=(20, None)) for x in plan.layers)
    both = replace(plan, layers=layers, policy="snapkv")
    alone = replace(both, layers=tuple(replace(x, scales=None) for x in layers))
    ids = random_ids(LENGTH)
    found, expected = (logits(Engine.load(llama, plan=x), ids, 60, 20) for x in (both, alone))
    exact = logits(Engine.load(llama), ids, 60, 20)
    assert 1e-3 < (found - expected).abs().mean() < (found - exact)[60:].abs().mean() / 2
    assert isinstance(Engine.load(llama, plan=both).new_cache(1, 60).stores[0].full, FloatHeads)
    monkeypatch.setenv(VARIABLE, "triton")
    assert not Engine.load(llama, plan=both).paged


# ---------------------------------------------------------------------------------- the plan


def test_a_plan_comes_back_from_its_file(llama, tmp_path):
    plan = floats(llama, streaming=SOME_STREAM, window=5)
    plan.write(tmp_path / "a.plan")
    assert Plan.read(tmp_path / "a.plan").layers == plan.layers
    head = (tmp_path / "a.plan").read_bytes()[:200000].replace(b"\\", b"")
    assert b'"format_version":9' in head


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((1.0, 0.0), (1.0, 1.0), "above 0 and finite"),
        ((1.0, 1.0), (1.0, float("inf")), "above 0 and finite"),
        ((1.0, 1.0), (1.0, float("nan")), "above 0 and finite"),
        ((1.0, 1e-50), (1.0, 1.0), "above 0 and finite in float32"),  # 0 there
        ((1e37, 1.0), (1.0, 1.0), "as is 448 times it"),
        ((1.0, 1.0), (1.0,), "2 scales of keys for 1 of values"),
        ((1.0,), (1.0,), "scales of 1 heads for 2"),
    ],
)
def test_impossible_scales_are_refused(keys, values, message):
    with pytest.raises(PlanError, match=message):
        LayerPlan((False, False), scales=Scales(keys, values))
    with pytest.raises(PlanError, match="a window of -1 exact tokens"):
        replace(SCALES, window=-1)


def test_a_layer_without_heads_has_no_scales():
    with pytest.raises(PlanError, match="has no KV heads to plan"):
        LayerPlan((), kept=WindowPlan(2, 16, 8), scales=Scales((), ()))


def test_a_window_longer_than_the_context_is_refused(llama):
    most = int(llama.config["max_position_embeddings"])
    Engine.load(llama, plan=floats(llama, window=most))
    with pytest.raises(PlanError, match=f"keeps {most + 1} tokens exactly, more than"):
        Engine.load(llama, plan=floats(llama, window=most + 1))


def test_what_lies_in_fp8_has_no_other_bits_and_is_not_composed(llama):
    plan = floats(llama, "dense")
    heads = replace(plan, layers=(LayerPlan((True, False), 3, 8),) * 3)
    with pytest.raises(PlanError, match="few bits come last"):
        compose(heads, plan)
