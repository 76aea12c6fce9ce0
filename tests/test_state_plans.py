"""Beside layers that keep a state, the others are planned for."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from _code_tools import coded
from _family_cases import CASES
from _family_tools import (
    by_transformers,
    logits,
    open_case,
    relative_error,
    same,
    streaming,
    tokens,
)
from conftest import make_config
from safetensors.torch import load_file, save_file

from kvtool.calibrate import heads, lessons
from kvtool.calibrate.ablation import ablation_scores
from kvtool.calibrate.budgets import METHODS as BUDGETS
from kvtool.calibrate.budgets import BudgetOptions, calibrate_budgets
from kvtool.calibrate.double_sparsity import calibrate_double_sparsity
from kvtool.calibrate.heads import METHODS, HeadOptions, calibrate_heads
from kvtool.calibrate.past import measure, read_past
from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections
from kvtool.calibrate.quantization import QuantizationOptions, calibrate_quantization, everything
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel, Window, divergence
from kvtool.calibrate.tasks import RecallSample
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Projection
from kvtool.distill import Amount
from kvtool.errors import PlanError, UnsupportedModelError
from kvtool.layer_plan import LayerPlan
from kvtool.layout import describe
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.slices import compose, stream_heads
from kvtool.states import StatePlan

HEADS, SIZE = 2, 16
HYBRIDS = ["qwen3_5_text", "qwen3_next", "granitemoehybrid, no positions"]
OTHERS = [False, True, False, True]  # which layers have heads


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("pieces", [(60,), (1,), (7, 30, 1, 2), (64, 1, 1)])
def test_pieces_of_a_text_do_not_matter(tiny, name, pieces):
    checkpoint, ids = open_case(tiny, name), tokens(90)
    same(logits(Engine.load(checkpoint), ids, *pieces), by_transformers(checkpoint, ids))


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


@pytest.mark.parametrize("name", [*HYBRIDS, "laguna", "gpt_oss"])
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
    assert Plan.read(tmp_path / "heads.plan").layers == some.layers


@pytest.mark.parametrize("name", [*HYBRIDS, "gpt_oss"])
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
    assert relative_error(found, expected) < 0.05


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
    with pytest.raises(PlanError, match=r"layer 0 .* has a state of another kind"):
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


@pytest.mark.parametrize("name", [*HYBRIDS, "gpt_oss"])
@pytest.mark.parametrize(("kind", "together"), [("rotated", 1), ("unrotated", 2)])
def test_codes_of_full_width_lose_nothing(tiny, name, kind, together):
    checkpoint, ids = open_case(tiny, name), tokens(80)
    expected = logits(Engine.load(checkpoint), ids, 40)
    plan = coded(checkpoint, kind, joint=True, together=together)
    for prefill in ("dense", "streamed"):
        engine = Engine.load(checkpoint, plan=replace(plan, prefill=prefill))
        found = logits(engine, ids, 40, 20)
        atol = 5e-4 * float(expected.std())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    "variant",
    [
        {"method": "aware"},
        {"method": "aware", "read": "rebuilt", "together": 2},
        {"method": "xkv", "together": 2},
        {"method": "palu"},
        {"method": "cskv", "bits": 4, "tuning": 3},
        {"method": "matryoshka", "train": Amount(tokens=1024)},
        {"method": "matryoshka", "train": Amount(tokens=1024), "search_ranks": True},
    ],
    ids=lambda x: "-".join(str(value) for value in x.values() if isinstance(value, str | int)),
)
@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "gpt_oss"])
def test_codes_are_judged_as_they_run(tiny, text, monkeypatch, name, variant):
    monkeypatch.setattr(lessons, "RECALL", 0.0)  # recall tasks are longer than these windows
    monkeypatch.setattr("kvtool.calibrate.students.fast_bfloat16", lambda _: False)
    checkpoint, ids = open_case(tiny, name), tokens(90)
    native = Plan(base_of(checkpoint), whole_layers(checkpoint)).native_bytes(400, 2)
    options = ProjectionOptions(
        **{"sink": 3, "window": 7, "context": 400, "tokens": 1024, "data": text} | variant
    )
    plan = calibrate_projections(checkpoint, options, int(0.7 * native), 2)
    assert [layer.kept is None for layer in plan.layers] == OTHERS
    assert plan.cache_bytes(400, 2) <= 0.7 * native
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, 90)
    engine.extend(cache, ids[:-7])
    cache.resize(90)
    assert cache.allocated_bytes == plan.cache_bytes(90, 4)
    found = engine.extend(cache, ids[-7:], all_logits=True).log_softmax(-1)
    model = TailModel(LayerStream(checkpoint))
    past = read_past(model, ids, 7)
    true = logits(Engine.load(checkpoint), ids, 90)[-7:].log_softmax(-1)
    torch.testing.assert_close(past.expected, true, rtol=1e-3, atol=1e-3)
    kl = float(divergence(true, found))
    assert kl > 1e-4
    names = ("encode", "decode", "mean")
    codes = [
        (
            code,
            {
                part: Projection(*(plan.tensors[f"codes.{i}.{part}.{n}"] for n in names))
                for part in code.parts
            },
        )
        for i, code in enumerate(plan.codes)
    ]
    assert measure(model, [past], codes) == pytest.approx(kl, rel=2e-2)


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid"])
def test_an_fp8_cache_of_other_engines_leaves_states_alone(tiny, tmp_path, name):
    source = open_case(tiny, name).path
    shutil.copytree(source, tmp_path / "scaled")
    config = json.loads((source / "config.json").read_text())
    scheme = {"type": "float", "num_bits": 8, "dynamic": False, "strategy": "tensor"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme,
    }  # fmt: skip
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    scales = {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in (1, 3) for x in "kv"}
    file = tmp_path / "scaled" / "model.safetensors"
    save_file(load_file(file) | scales, file, {"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path / "scaled"))
    options = QuantizationOptions("fp8", bits=(8, 8), window=0)
    start = everything(checkpoint, base_of(checkpoint), options)
    plan = calibrate_quantization(checkpoint, options, start, None, 2)
    assert [layer.scales is not None for layer in plan.layers] == OTHERS
    assert [x.kept.bits for x in plan.layers if x.kept] == [None] * 2


def test_a_model_without_keys_and_values_is_refused(tiny):
    family, more = CASES["qwen3_5_text"]
    more = {**more, "layer_types": ["linear_attention"] * 4}
    checkpoint = Checkpoint.open(str(tiny(family, **more)))
    with pytest.raises(UnsupportedModelError, match="no layer with keys and values"):
        Engine.load(checkpoint)


@pytest.mark.parametrize("bits", [4, None])
def test_codes_and_states_have_bits_together(tiny, text, bits):
    checkpoint, ids = open_case(tiny, "granitemoehybrid"), tokens(120)
    plan = coded(checkpoint, "unrotated", together=2, share=0.7)
    options = QuantizationOptions("aware", bits=(bits or 4,) * 2, states=8, heads=bits is not None)
    options = replace(options, data=text, tokens=1024, context=400)
    made = calibrate_quantization(checkpoint, options, plan, None, 2)
    assert [code.bits for code in made.codes] == [bits]
    assert [layer.kept.bits for layer in made.layers if layer.kept] == [8, 8]
    expected = logits(Engine.load(checkpoint, plan=plan), ids, 60)
    engine = Engine.load(checkpoint, plan=made)
    found = logits(engine, ids, 60)
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < 0.2
    assert made.cache_bytes(400, 2) < plan.cache_bytes(400, 2)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("granite", {"logits_scaling": 0.0}, "ZeroDivisionError"),
        ("laguna", {"rope_parameters": {"full_attention": None}}, "no model can be made"),
    ],
)
def test_configs_of_impossible_values_are_refused(family, more, reason):
    config = make_config(*CASES[family][:1], **CASES[family][1])
    for field, value in more.items():
        setattr(config, field, value)
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(config)
