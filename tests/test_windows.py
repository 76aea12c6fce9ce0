"""Layers with a sliding window keep it and no more, and the layers beside them are planned for."""

import json
from dataclasses import replace

import pytest
import torch
from _family_tools import (
    by_transformers,
    logits,
    open_case,
    relative_error,
    same,
    streaming,
    tokens,
)

from kvtool.calibrate import heads
from kvtool.calibrate.budgets import METHODS as BUDGETS
from kvtool.calibrate.budgets import BudgetOptions, calibrate_budgets
from kvtool.calibrate.double_sparsity import calibrate_double_sparsity
from kvtool.calibrate.heads import METHODS, HeadOptions, calibrate_heads
from kvtool.calibrate.quantization import QuantizationOptions, calibrate_quantization, everything
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.cli import run_command
from kvtool.cli._plans import score_picture
from kvtool.cli.serve import native_bytes_per_token
from kvtool.errors import PlanError, UnsupportedModelError, UsageError
from kvtool.evaluate.protocol import cache_size
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.scheduler import Scheduler
from kvtool.slices import compose, cut, stream_heads
from kvtool.windows import WindowPlan

WINDOW, HEADS, SIZE, BYTES = 24, 2, 16, 4
TOKEN = 2 * HEADS * SIZE * BYTES  # bytes of a token in a layer
MIXED = [
    "gemma3_text",
    "gemma4_text, keys are values",
    "olmo3",
    "cohere2",
    "exaone4",
    "gpt_oss",
]  # every other layer has a window


@pytest.mark.parametrize("name", ["starcoder2, window", *MIXED])
@pytest.mark.parametrize("pieces", [(60,), (1,), (7, 30, 1, 2), (23, 1, 1, 40)])
def test_pieces_of_a_text_do_not_matter(tiny, name, pieces):
    checkpoint, ids = open_case(tiny, name), tokens(90)
    same(logits(Engine.load(checkpoint), ids, *pieces), by_transformers(checkpoint, ids))


@pytest.mark.parametrize("planned", [False, True])
def test_rows_of_several_caches_are_decoded_together(tiny, planned):
    checkpoint, rows = open_case(tiny, "gpt_oss"), [tokens(40), tokens(9)]
    engine = Engine.load(checkpoint, plan=streaming(checkpoint, 2, 5) if planned else None)
    caches = [engine.new_cache(1, 64) for _ in rows]
    for cache, ids in zip(caches, rows, strict=True):
        engine.extend(cache, ids)
    for step in range(3):
        found = engine.decode_rows(caches, [5 + step, 6 + step])
        for i, ids in enumerate(rows):
            rows[i] = torch.cat((ids, torch.tensor([5 + i + step])))
            expected = logits(engine, rows[i], len(ids) - step)[-1]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["starcoder2, window", "gemma3_text"])
def test_a_window_takes_the_bytes_of_its_tokens(tiny, name):
    engine = Engine.load(open_case(tiny, name))
    layers = len(engine.attentions)
    windows = sum(attention.window is not None for attention in engine.attentions)
    for capacity in (8, WINDOW, 100):
        cache = engine.new_cache(3, capacity)
        kept = windows * min(capacity, WINDOW) + (layers - windows) * capacity
        assert cache.allocated_bytes == 3 * TOKEN * kept
        assert cache.capacity == capacity
    size = cache_size(engine)
    assert size.bytes_per_token == (layers - windows) * TOKEN
    assert size.constant_bytes == windows * WINDOW * TOKEN


@pytest.mark.parametrize("name", ["starcoder2, window", "gemma3_text"])
@pytest.mark.parametrize("planned", [False, True])
def test_memory_is_known_before_it_is_taken(tiny, name, planned):
    checkpoint = open_case(tiny, name)
    plan = streaming(checkpoint, 2, 5) if planned else None
    engine = Engine.load(checkpoint, plan=plan)
    memory = RowMemory(engine)
    for length in (5, 64, 100, 200):
        cache = engine.new_cache(1, 1)
        engine.extend(cache, tokens(length))
        cache.resize(-(-length // 64) * 64)
        assert memory.holding(length, length) == cache.allocated_bytes


@pytest.mark.parametrize("planned", [False, True])
def test_of_a_long_text_a_token_costs_what_the_other_layers_keep(tiny, planned):
    checkpoint = open_case(tiny, "gemma3_text")
    engine = Engine.load(checkpoint, plan=streaming(checkpoint, 2, 5) if planned else None)
    assert native_bytes_per_token(Scheduler(engine, 10**8), checkpoint) == 2 * TOKEN


@pytest.mark.parametrize("name", MIXED)
def test_a_plan_that_drops_nothing_changes_nothing(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(70)
    expected = logits(Engine.load(checkpoint), ids, 50)
    plan = streaming(checkpoint, 4, 100)
    torch.testing.assert_close(
        logits(Engine.load(checkpoint, plan=plan), ids, 50), expected,
        atol=2e-4 * float(expected.std()), rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_heads_of_the_other_layers_are_scored_and_stream(tiny, tmp_path, monkeypatch, text, method):
    monkeypatch.setattr(heads, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(heads, "MAX_NLL", float("inf"))
    checkpoint = open_case(tiny, "gemma3_text")
    options = HeadOptions(method, 4, 24, lengths=(300,), samples=2, steps=3, data=text)
    plan = calibrate_heads(checkpoint, options)
    assert plan.planned_heads == 2 * HEADS
    window = LayerPlan((), kept=WindowPlan(HEADS, SIZE, WINDOW))
    for count in range(2 * HEADS + 1):
        some = stream_heads(plan, count, 4, 24)
        assert [layer == window for layer in some.layers] == [True, False, True, False]
        assert some.streaming_heads == count
    with pytest.raises(UsageError, match="5 heads cannot stream: the model has 4"):
        stream_heads(plan, 5, 4, 24)
    some.write(tmp_path / "heads.plan")
    read = Plan.read(tmp_path / "heads.plan")
    assert read.layers == some.layers
    assert torch.equal(read.scores, plan.scores)


def test_scores_of_layers_with_a_window_are_not_shown(tiny):
    plan = streaming(open_case(tiny, "gemma3_text"), 2, 6)
    plan = replace(plan, scores=torch.tensor([[9.0, 9], [1, 3], [0, 9], [2, 4]]))
    assert score_picture(plan).splitlines()[:2] == ["0  · ░", "1  ▒ █"]


def test_scores_of_layers_with_a_window_are_not_compared(tiny, tmp_path, capsys):
    plan, names = streaming(open_case(tiny, "gemma3_text"), 2, 6), []
    for name, rows in (("one", [1.0, 3, 2, 4]), ("other", [4.0, 2, 3, 1])):
        scores = torch.zeros(4, 2)
        scores[1::2] = torch.tensor(rows).view(2, 2)
        names.append(str(tmp_path / name))
        replace(plan, scores=scores).write(tmp_path / name)
    assert run_command(["calibrate", "compare-heads", *names, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["spearman"][0][1] == pytest.approx(-1)
    assert result["shared_full_heads_at_half"][0][1] == 0


def test_a_budget_is_met_by_the_heads_that_see_the_whole_past(tiny):
    checkpoint = open_case(tiny, "gemma3_text")
    plan = replace(streaming(checkpoint, 2, 6), scores=torch.arange(8.0).view(4, 2))
    native = plan.native_bytes(100, BYTES)
    assert native == TOKEN * (2 * 100 + 2 * WINDOW)
    assert plan.native_bytes_per_token(BYTES) == 2 * TOKEN
    for kept in range(5):
        size = native - kept * TOKEN // HEADS * (100 - 8)
        some = cut(plan, size, 100, BYTES)
        assert (some.streaming_heads, some.cache_bytes(100, BYTES)) == (kept, size)
        assert cut(plan, size - 1, 100, BYTES).streaming_heads == kept + 1 if kept < 4 else True
    with pytest.raises(UsageError, match="too small"):
        cut(plan, size - 1, 100, BYTES)


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("gemma3_text", x) for x in BUDGETS), ("gpt_oss", "mass"), ("gpt_oss", "prefixkv")],
)
def test_budgets_are_shared_by_the_layers_that_see_the_whole_past(tiny, text, name, method):
    checkpoint, ids = open_case(tiny, name), tokens(120)
    options = BudgetOptions(method, context=100, minimum=10, data=text, tokens=400)
    windows = 2 * WINDOW * TOKEN // 2  # as bfloat16
    wanted = windows + TOKEN // 2 * 100
    plan = calibrate_budgets(checkpoint, options, wanted, 2)
    assert plan.cache_bytes(100, 2) == wanted
    assert [layer.kept is None for layer in plan.layers] == [False, True, False, True]
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, 64)
    engine.extend(cache, ids[:100])
    cache.resize(100)
    assert cache.allocated_bytes == 2 * wanted
    with pytest.raises(UsageError, match=f"least {windows + TOKEN // 2 * 20:,}"):
        calibrate_budgets(checkpoint, options, windows + 100, 2)
    few = streaming(checkpoint, 2, 6)
    some = replace(few, layers=(*few.layers[:3], LayerPlan((False, False))))
    both = compose(some, plan)
    assert [x.streaming for x in both.layers] == [(), (True, True), (), (False, False)]
    assert [x.budget for x in both.layers] == [None, None, None, plan.layers[3].budget]
    Engine.load(checkpoint, plan=both)


def test_plans_with_windows_in_other_layers_are_not_composed(tiny):
    plan = streaming(open_case(tiny, "gemma3_text"), 2, 6)
    some = [LayerPlan((False,) * HEADS, budget=(9,) * HEADS), plan.layers[0]] * 2
    budgets = replace(plan, layers=tuple(some), policy="snapkv")
    with pytest.raises(PlanError, match="same states and sliding windows"):
        compose(plan, budgets)


@pytest.mark.parametrize(
    ("name", "method"),
    [("olmo3", "aware"), ("olmo3", "kivi"), ("olmo3", "rotatekv"), ("gpt_oss", "aware")],
)
def test_few_bits_are_for_the_layers_that_see_the_whole_past(tiny, text, name, method):
    checkpoint, ids = open_case(tiny, name), tokens(160)
    read = "rebuilt" if method == "rotatekv" else "absorbed"
    options = QuantizationOptions(
        method,
        read=read,
        bits=(8, 8),
        group=32,
        data=text,
        tokens=1024,
        context=512,
    )
    plan = calibrate_quantization(
        checkpoint, options, everything(checkpoint, base_of(checkpoint), options), None, 2
    )
    assert [layer.bits is None for layer in plan.layers] == [True, False, True, False]
    engine = Engine.load(checkpoint, plan=plan)
    expected = logits(Engine.load(checkpoint), ids, 150)
    found = logits(engine, ids, 150)
    assert not torch.equal(found, expected)
    error = relative_error(found, expected)
    assert error < 0.02
    coarse = replace(options, bits=(2, 2))
    plan = calibrate_quantization(
        checkpoint, coarse, everything(checkpoint, base_of(checkpoint), coarse), None, 2
    )
    found = logits(Engine.load(checkpoint, plan=plan), ids, 150)
    assert relative_error(found, expected) > 3 * error


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_the_layers_that_see_the_whole_past_are_read_sparsely(tiny, text, name):
    checkpoint, ids = open_case(tiny, name), tokens(150)
    start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    read = StatisticsOptions(data=text, tokens=512)
    plan = calibrate_double_sparsity(checkpoint, start, 4, 40, read)
    assert [layer.sparse is None for layer in plan.layers] == [True, False, True, False]
    expected = logits(Engine.load(checkpoint), ids, 30)
    found = logits(Engine.load(checkpoint, plan=plan), ids, 30)
    whole = 2e-4 * float(expected.std())
    torch.testing.assert_close(found[:40], expected[:40], atol=whole, rtol=0)
    assert not torch.allclose(found[60:], expected[60:], atol=100 * whole, rtol=0)


def test_a_model_of_windows_alone_is_refused(tiny):
    checkpoint = open_case(tiny, "starcoder2, window")
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        calibrate_heads(checkpoint, HeadOptions())


def test_a_plan_of_another_window_is_refused(tiny):
    checkpoint = open_case(tiny, "gemma3_text")
    plan = streaming(checkpoint, 2, 6)
    other = replace(plan, layers=(LayerPlan((), kept=WindowPlan(2, 8, 24)), *plan.layers[1:]))
    with pytest.raises(PlanError, match="2 heads x 16, and 24 tokens of 2 heads x 8"):
        Engine.load(checkpoint, plan=other)
    with pytest.raises(PlanError, match=r"layer 1 .* KV heads, and the plan is for the window"):
        Engine.load(checkpoint, plan=replace(plan, layers=(*plan.layers[:1], plan.layers[0]) * 2))
    with pytest.raises(PlanError, match="without any number"):
        WindowPlan(2, 16, 0)
