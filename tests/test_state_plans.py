"""Beside layers that keep a state, the others are planned for."""

from dataclasses import replace

import pytest
import torch
from _family_cases import CASES

from kvtool.calibrate import heads
from kvtool.calibrate.ablation import ablation_scores
from kvtool.calibrate.budgets import METHODS as BUDGETS
from kvtool.calibrate.budgets import BudgetOptions, calibrate_budgets
from kvtool.calibrate.double_sparsity import calibrate_double_sparsity
from kvtool.calibrate.heads import METHODS, HeadOptions, calibrate_heads
from kvtool.calibrate.quantization import QuantizationOptions, calibrate_quantization, everything
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel, Window, divergence
from kvtool.calibrate.tasks import RecallSample
from kvtool.checkpoint import Checkpoint
from kvtool.errors import PlanError
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.slices import compose, stream_heads
from kvtool.states import StatePlan

HEADS, SIZE = 2, 16
HYBRIDS = ["qwen3_5_text", "qwen3_next", "granitemoehybrid, no positions"]
OTHERS = [False, True, False, True]  # which layers have heads


def open_case(tiny, name) -> Checkpoint:
    family, more = CASES[name]
    return Checkpoint.open(str(tiny(family, **more)))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(0))


def logits(engine: Engine, ids: torch.Tensor, *pieces: int) -> torch.Tensor:
    """Of a text that comes in pieces, and then token by token."""
    cache, start, found = engine.new_cache(1, 8), 0, []
    for size in pieces:
        found.append(engine.extend(cache, ids[start : start + size], all_logits=True))
        start += size
    found += [engine.decode(cache, token[None]) for token in ids[start:]]
    return torch.cat(found)


def streaming(checkpoint: Checkpoint, sink: int, window: int) -> Plan:
    """All heads stream."""
    layers = [
        layer if layer.kept else LayerPlan((True,) * HEADS, sink, window)
        for layer in whole_layers(checkpoint)
    ]
    return Plan(base_of(checkpoint), tuple(layers))


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("\n\n".join(f"One, two, {i}, four." for i in range(2000)))
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("pieces", [(60,), (1,), (7, 30, 1, 2), (64, 1, 1)])
def test_pieces_of_a_text_do_not_matter(tiny, name, pieces):
    checkpoint, ids = open_case(tiny, name), tokens(90)
    with torch.inference_mode():
        expected = checkpoint.load_transformers(torch.float32)(ids[None], use_cache=False).logits[0]
    found = logits(Engine.load(checkpoint), ids, *pieces)
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("planned", [False, True])
def test_memory_is_known_before_it_is_taken(tiny, name, planned):
    checkpoint = open_case(tiny, name)
    plan = streaming(checkpoint, 2, 5) if planned else None
    engine = Engine.load(checkpoint, plan=plan)
    memory = RowMemory(engine)
    for length in (5, 64, 100):
        cache = engine.new_cache(1, 1)
        engine.extend(cache, tokens(length))
        cache.resize(-(-length // 64) * 64)
        assert memory.holding(length, length) == cache.allocated_bytes
        if plan is not None:
            assert plan.cache_bytes(length, 4) == cache.allocated_bytes


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_heads_are_scored_and_stream(tiny, tmp_path, monkeypatch, text, name, method):
    monkeypatch.setattr(heads, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(heads, "MAX_NLL", float("inf"))
    checkpoint = open_case(tiny, name)
    options = HeadOptions(method, 4, 24, lengths=(300,), samples=2, steps=3, data=text)
    plan = calibrate_heads(checkpoint, options)
    assert plan.planned_heads == 2 * HEADS
    assert not plan.scores[[0, 2]].any() or method == "duo"
    some = stream_heads(plan, 3, 4, 24)
    assert [layer.kept is None for layer in some.layers] == OTHERS
    some.write(tmp_path / "heads.plan")
    read = Plan.read(tmp_path / "heads.plan")
    assert read.layers == some.layers
    Engine.load(checkpoint, plan=read)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_ablation_is_what_the_runtime_does_with_one_head_streaming(tiny, name, prefill):
    checkpoint, ids = open_case(tiny, name), tokens(90)
    context, tail = ids[:70], ids[70:]
    nothing = torch.full((20,), -1)
    sample = RecallSample(
        context, tail, torch.where(torch.arange(20) > 9, 5, nothing), nothing > 0,
        torch.full((20, 2), -1),
    )  # fmt: skip
    model, window = TailModel(LayerStream(checkpoint)), Window(2, 6)
    reading = model.read(sample, prefill)
    scores = ablation_scores(model, [reading], window, lambda *_: None)

    def recalled(plan: Plan | None) -> torch.Tensor:
        found = logits(Engine.load(checkpoint, plan=plan), ids, 70)
        return found[70 + sample.answers - 1].log_softmax(-1)

    plan, original = (
        stream_heads(replace(streaming(checkpoint, 2, 6), scores=torch.zeros(4, 2)), 0, 2, 6),
        recalled(None),
    )
    for index in (1, 3):
        for head in range(HEADS):
            alone = LayerPlan(tuple(h == head for h in range(HEADS)), 2, 6)
            layers = (*plan.layers[:index], alone, *plan.layers[index + 1 :])
            changed = recalled(replace(plan, layers=layers, prefill=prefill))
            kl = float(divergence(original, changed))
            assert float(scores[index, head]) == pytest.approx(kl, rel=0.02, abs=1e-5)
            assert kl > 1e-4


@pytest.mark.parametrize("method", BUDGETS)
def test_budgets_are_shared_by_the_layers_with_heads(tiny, text, method):
    checkpoint, ids = open_case(tiny, "qwen3_5_text"), tokens(120)
    options = BudgetOptions(method, context=100, minimum=10, data=text, tokens=400)
    whole = Plan(base_of(checkpoint), whole_layers(checkpoint))
    states = whole.native_bytes(100, 2) - 2 * 100 * 2 * HEADS * SIZE * 2
    wanted = states + 100 * 2 * HEADS * SIZE * 2
    plan = calibrate_budgets(checkpoint, options, wanted, 2)
    assert plan.cache_bytes(100, 2) == wanted
    assert [layer.kept is None for layer in plan.layers] == OTHERS
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, 64)
    engine.extend(cache, ids[:100])
    cache.resize(100)
    assert cache.allocated_bytes == plan.cache_bytes(100, 4)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("method", ["aware", "kivi", "rotatekv"])
def test_few_bits_are_for_heads_and_for_states_of_mamba(tiny, text, name, method):
    checkpoint, ids = open_case(tiny, name), tokens(160)
    read = "rebuilt" if method == "rotatekv" else "absorbed"
    options = QuantizationOptions(
        method, bits=(8, 8), group=32, read=read, data=text, tokens=1024, context=512
    )
    start = everything(checkpoint, base_of(checkpoint), options)
    plan = calibrate_quantization(checkpoint, options, start, None, 2)
    assert [layer.bits is not None for layer in plan.layers] == OTHERS
    mamba = name.startswith("granite")
    assert [x.kept.bits for x in plan.layers if x.kept] == [8 if mamba else None] * 2
    expected = logits(Engine.load(checkpoint), ids, 150)
    found = logits(Engine.load(checkpoint, plan=plan), ids, 150)
    assert not torch.equal(found, expected)
    assert (found - expected).square().mean().sqrt() / expected.std() < 0.05


def test_heads_are_read_sparsely(tiny, text):
    checkpoint, ids = open_case(tiny, "qwen3_next"), tokens(150)
    start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    options = StatisticsOptions(data=text, tokens=512)
    plan = calibrate_double_sparsity(checkpoint, start, 4, 40, options)
    assert [layer.sparse is not None for layer in plan.layers] == OTHERS
    expected = logits(Engine.load(checkpoint), ids, 30)
    found = logits(Engine.load(checkpoint, plan=plan), ids, 30)
    whole = 2e-4 * float(expected.std())
    torch.testing.assert_close(found[:40], expected[:40], atol=whole, rtol=0)
    assert not torch.allclose(found[60:], expected[60:], atol=100 * whole, rtol=0)


def test_states_of_another_rule_are_refused(tiny, tmp_path):
    checkpoint = open_case(tiny, "qwen3_5_text")
    plan = streaming(checkpoint, 2, 6)
    state = plan.layers[0].kept
    assert isinstance(state, StatePlan)
    mamba = LayerPlan((), kept=replace(state, rule="mamba2"))
    with pytest.raises(PlanError, match=r"layer 0 .* has a state of other sizes"):
        Engine.load(checkpoint, plan=replace(plan, layers=(mamba, *plan.layers[1:])))
    with pytest.raises(PlanError, match="kept as they are"):
        replace(state, bits=8)
    plan.write(tmp_path / "new")
    assert Plan.read(tmp_path / "new").layers == plan.layers


def test_heads_and_budgets_beside_the_same_states_are_composed(tiny):
    checkpoint, ids = open_case(tiny, "qwen3_5_text"), tokens(90)
    plan = streaming(checkpoint, 2, 6)
    heads = replace(plan, layers=(*plan.layers[:3], LayerPlan((True, False), 2, 6)))
    budgets = replace(
        Plan(plan.base, whole_layers(checkpoint)),
        layers=(plan.layers[0], LayerPlan((False,) * 2, budget=(9, 9))) * 2,
        policy="snapkv",
    )
    both = compose(heads, budgets)
    assert [x.budget for x in both.layers] == [None, None, None, (None, 9)]
    engine = Engine.load(checkpoint, plan=both)
    assert bool(logits(engine, ids, 70).isfinite().all())
