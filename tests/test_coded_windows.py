"""Codes beside sliding windows: of the layers that see the whole past, whatever lies between."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import KINDS, SPAN, WINDOW, WINDOWED, coded, narrowed, token_by_token
from _convert_tools import one_thread, random_ids
from torch import Tensor

from kvtool.calibrate import asvd, code_bits, lessons, matryoshka, palu, pca
from kvtool.calibrate import projections as methods
from kvtool.calibrate.past import measure, read_past
from kvtool.calibrate.projections import (
    ProjectionOptions,
    calibrate_projections,
    text_windows,
)
from kvtool.calibrate.quantization import QuantizationOptions, calibrate_quantization
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.cli.serve import native_bytes_per_token
from kvtool.codes import Projection
from kvtool.distill import Amount
from kvtool.errors import PlanError, UnsupportedModelError, UsageError
from kvtool.evaluate.explain import explain
from kvtool.evaluate.protocol import layer_sizes
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.slices import cut

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LENGTH, CONTEXT = 90, 400
TOKEN = 2 * 2 * 16  # numbers of a token in a layer
CODED = [1, 3, 4, 5]
Capture = pytest.CaptureFixture[str]
Open = Callable[[str], Checkpoint]
SHAPES = [(False, 1), (False, 2), (True, 3)]
shapes = pytest.mark.parametrize(("joint", "together"), SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(LENGTH)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Open:
    def get(name: str) -> Checkpoint:
        family, overrides = WINDOWED[name]
        return Checkpoint.open(str(tiny(family, **overrides)))

    return get


@pytest.fixture(scope="module")
def gemma(model: Open) -> Checkpoint:
    return model("gemma3_text")


@pytest.fixture(scope="module")
def fitted(gemma: Checkpoint) -> Callable[..., Plan]:
    """``fitted(share, **options)``: a plan for a share of the native cache."""
    found: dict[Any, Plan] = {}

    def get(share: float, **options: Any) -> Plan:
        key = (share, *options.items())
        if key not in found:
            asked = {"sink": 3, "window": 7, "context": CONTEXT, "tokens": 1024} | options
            found[key] = calibrate_projections(
                gemma, ProjectionOptions(**asked), budget(gemma, share), 2
            )
        return found[key]

    return get


def everything(checkpoint: Checkpoint) -> Plan:
    return Plan(base_of(checkpoint), whole_layers(checkpoint))


def budget(checkpoint: Checkpoint, share: float) -> int:
    return int(share * everything(checkpoint).native_bytes(CONTEXT, 2))


def projections(plan: Plan) -> Any:
    """Its codes, as calibration reads through them."""
    names = ("encode", "decode", "mean")
    return [
        (
            code,
            {
                part: Projection(*(plan.tensors[f"codes.{i}.{part}.{n}"] for n in names))
                for part in code.parts
            },
        )
        for i, code in enumerate(plan.codes)
    ]


def in_pieces(engine: Engine, ids: Tensor, *sizes: int) -> Tensor:
    cache = engine.new_cache(1, 8)
    return torch.cat([engine.extend(cache, piece, all_logits=True) for piece in ids.split(sizes)])


# ---------------------------------------------------------------------------------- the runtime


@pytest.mark.parametrize(
    ("name", "kind", "joint", "together"),
    [("gemma3_text", kind, *shape) for kind in KINDS for shape in SHAPES]
    + [(name, "unrotated", True, 2) for name in WINDOWED if name != "gemma3_text"],
)
def test_at_full_width_nothing_is_lost(model, ids, name, kind, joint, together):
    expected = token_by_token(Engine.load(model(name)), ids, prompt=40)
    plan = coded(model(name), kind, joint, together)
    for prefill in ("dense", "streamed"):
        engine = Engine.load(model(name), plan=replace(plan, prefill=prefill))
        cache = engine.new_cache(1, LENGTH)
        found = [engine.extend(cache, ids[:40], all_logits=True)]
        found += [engine.extend(cache, ids[40:73], all_logits=True)]  # more than either window
        found += [engine.decode(cache, token[None]) for token in ids[73:]]
        atol = 2e-4 * float(expected.std())
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=atol)


@kinds
@shapes
def test_how_tokens_arrive_does_not_matter(gemma, ids, kind, joint, together):
    plan = replace(narrowed(coded(gemma, kind, joint, together), 0.5), prefill="streamed")
    engine = Engine.load(gemma, plan=plan)
    expected = token_by_token(engine, ids)
    atol = 2e-4 * float(expected.std())
    for sizes in ((LENGTH,), (1, 60, 29), (SPAN + 3, 1, LENGTH - SPAN - 4)):
        torch.testing.assert_close(in_pieces(engine, ids, *sizes), expected, rtol=1e-3, atol=atol)
    exact = token_by_token(Engine.load(gemma), ids)
    assert (expected - exact).abs().amax(-1)[WINDOW + 5 :].min() > 100 * atol


@kinds
@shapes
def test_a_dense_prompt_is_read_exactly_and_coded_behind_its_end(gemma, ids, kind, joint, together):
    engine = Engine.load(gemma, plan=narrowed(coded(gemma, kind, joint, together), 0.5))
    exact, cache = token_by_token(Engine.load(gemma), ids), engine.new_cache(1, LENGTH)
    atol = 2e-4 * float(exact.std())
    found = engine.extend(cache, ids[:-30], all_logits=True, chunk=17)
    torch.testing.assert_close(found, exact[:-30], rtol=1e-3, atol=atol)
    saved = cache.snapshot(0)
    behind = engine.extend(cache, ids[-30:], all_logits=True)
    assert (behind - exact[-30:]).abs().amax(-1).min() > 10 * atol
    cache.restore(0, saved)
    steps = torch.cat([engine.decode(cache, token[None]) for token in ids[-30:]])
    torch.testing.assert_close(behind, steps, rtol=1e-3, atol=atol)


@shapes
def test_bytes_are_those_of_the_plan(gemma, joint, together):
    plan = narrowed(coded(gemma, "rotated", joint, together), 0.5)
    engine = Engine.load(gemma, plan=plan)
    numbers = sum(code.width for code in plan.codes)
    for tokens in (1, SPAN - 1, 63, 100):
        assert engine.new_cache(1, tokens).allocated_bytes == plan.cache_bytes(tokens, 4)
        rings, windows = 4 * TOKEN * (3 + WINDOW), 2 * TOKEN * min(tokens, SPAN)
        assert plan.cache_bytes(tokens, 1) == rings + windows + numbers * tokens
    assert plan.bytes_per_token(4) == 4 * numbers
    assert plan.native_bytes_per_token(4) == 4 * 4 * TOKEN
    sizes = layer_sizes(engine)
    assert sum(size.bytes_per_token for size in sizes) == 4 * numbers
    assert sum(size.bytes_per_token_bf16 for size in sizes) == 2 * numbers
    assert sum(size.constant_bytes for size in sizes) == plan.cache_bytes(SPAN, 4) - (
        4 * numbers * SPAN
    )


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("bits", [None, 4])
def test_memory_is_known_before_it_is_taken(gemma, prefill, bits):
    plan = replace(coded(gemma, "unrotated", True, 2, 0.5), prefill=prefill)
    plan = replace(plan, codes=tuple(replace(code, bits=bits) for code in plan.codes))
    engine = Engine.load(gemma, plan=plan)
    sizes = layer_sizes(engine)
    assert sum(size.bytes_per_token_bf16 for size in sizes) == plan.bytes_per_token(2)
    memory = RowMemory(engine)
    for length in (5, 64, 100, 200):
        cache = engine.new_cache(1, 64 * -(-length // 64))
        engine.extend(cache, random_ids(length), prompt=length)
        assert memory.holding(length, length) == cache.allocated_bytes
        assert plan.cache_bytes(64 * -(-length // 64), 4) == cache.allocated_bytes
        cache = engine.new_cache(1, 64 * -(-length // 64))
        engine.extend(cache, random_ids(length - 1), prompt=length)
        held = 4 * 4 * TOKEN * length if prefill == "dense" else 0  # of the layers with codes
        assert cache.allocated_bytes - memory.holding(length, length) == held
        assert memory.reading(length) == cache.allocated_bytes


def test_the_scheduler_answers_from_codes_and_windows(gemma):
    plan = narrowed(coded(gemma, "rotated", False, 2), 0.7)
    engine, prompts = Engine.load(gemma, plan=plan), [random_ids(n).tolist() for n in (150, 40, 3)]
    alone = [list(engine.generate([x], max_new_tokens=5, ignore_eos=True)) for x in prompts]
    scheduler = Scheduler(engine, 10**7)
    requests = [Request(prompt, 5, ignore_eos=True) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    while not scheduler.idle:
        assert scheduler.used <= scheduler.budget
        scheduler.step()
    assert [x.tokens for x in requests] == [[token for (token,) in own] for own in alone]
    assert native_bytes_per_token(scheduler, gemma) == 4 * 4 * TOKEN


# ------------------------------------------------------------------------------------- the plan


def test_a_plan_is_read_as_written_and_belongs_to_its_model(model, gemma, tiny, tmp_path):
    plan = narrowed(coded(gemma, "rotated", False, 2), 0.5)
    assert plan.coded_layers == [[1, 3], [4, 5]]
    plan.write(tmp_path / "p.plan")
    again = Plan.read(tmp_path / "p.plan")
    assert (again.layers, again.codes) == (plan.layers, plan.codes)
    assert all(torch.equal(again.tensors[name], x) for name, x in plan.tensors.items())
    family, overrides = WINDOWED["gemma3_text"]
    wider = Checkpoint.open(str(tiny(family, **(overrides | {"sliding_window": SPAN + 8}))))
    for other in (model("olmo3"), wider):
        with pytest.raises(PlanError, match="was made for"):
            Engine.load(other, plan=again)
    renamed = replace(again, base=base_of(wider))
    with pytest.raises(PlanError, match=r"layer 0 .* has a sliding window of 32 tokens"):
        Engine.load(wider, plan=renamed)


def test_codes_of_other_layers_than_there_are_cannot_be_planned(gemma):
    plan = coded(gemma, together=2)
    with pytest.raises(PlanError, match="2 layers, of a model with 4 that see the whole past, of"):
        replace(plan, codes=plan.codes[:1])
    whole = replace(plan.layers[1], streaming=(False, True), sink=1, window=3)
    with pytest.raises(PlanError, match="keeps all of them in all heads"):
        replace(plan, layers=(plan.layers[0], whole, *plan.layers[2:]))


def test_what_is_explained_has_its_layers(gemma):
    explained = explain(coded(gemma, together=3, share=0.5), "p")
    assert [code.name for code in explained.codes] == ["1, 3, 4", "5"]
    assert explained.picture().splitlines()[0] == "  keys  ▅ ▅▅▅"
    assert explained.native_bytes_per_token == 4 * 2 * TOKEN
    names = [code.name for code in explain(coded(gemma, together=2), "p").codes]
    assert names == ["1, 3", "4–5"]


# ---------------------------------------------------------------------------------- calibration

VARIANTS: list[dict[str, Any]] = [
    {"method": "aware"},
    {"method": "aware", "read": "rebuilt", "together": 3},
    {"method": "xkv", "together": 2},
    {"method": "palu"},
    {"method": "pca"},
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda x: "-".join(str(value) for value in x.values())
)


@pytest.fixture(autouse=True)
def short_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "RECALL", 0.0)  # recall tasks are longer than these windows
    monkeypatch.setattr("kvtool.calibrate.students.fast_bfloat16", lambda _: False)


@variants
def test_every_method_is_exact_at_full_width(gemma, fitted, ids, variant):
    plan = fitted(100, **variant)
    assert sum(code.width for code in plan.codes) == TOKEN * len(CODED)
    assert [index for own in plan.coded_layers for index in own] == CODED
    found = token_by_token(Engine.load(gemma, plan=plan), ids, prompt=5)
    expected = token_by_token(Engine.load(gemma), ids)
    atol = 5e-4 * float(expected.std())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@variants
def test_a_slice_is_what_calibration_gives_at_that_budget(gemma, fitted, variant):
    whole = fitted(100, **variant)
    allowed = budget(gemma, 0.5)
    smaller, alone = cut(whole, allowed, CONTEXT, 2), fitted(0.5, **variant)
    assert smaller.codes == alone.codes
    assert 0.9 * allowed < smaller.cache_bytes(CONTEXT, 2) <= allowed
    for name, tensor in smaller.tensors.items():
        assert torch.equal(tensor, alone.tensors[name]), name


def test_codes_are_fitted_to_their_own_layers(gemma, fitted, monkeypatch):
    text = StatisticsOptions(tokens=1024, sinks=3)
    statistics = collect(gemma, text)
    windows, _ = text_windows(gemma, None, 1024, 0)
    importance = dict(
        zip(("keys", "values"), palu.fisher(gemma, windows, lambda *_: None), strict=True)
    )
    for index, layer in enumerate(CODED):
        alone = pca.fit(statistics.layer(layer), 2)
        for part in ("keys", "values"):
            name = f"codes.{index}.{part}"
            encode = fitted(100, method="pca").tensors[f"{name}.encode"]
            assert torch.equal(encode, alone[part].projection.encode.float())
            first = fitted(100, method="palu").tensors[f"{name}.spectrum"][0]
            assert float(first) == pytest.approx(float(importance[part][index]), rel=1e-5)
    plan = fitted(0.3, method="cskv", bits=4, tuning=0)
    for index, layer in enumerate(CODED):  # of all codes its own loses least of a layer
        joint = statistics.layer(layer).joint
        second = (joint.second / joint.tokens)[32:, 32:].float()
        errors = []
        for code in range(len(CODED)):
            name = f"codes.{code}.values"
            lost = plan.tensors[f"{name}.decode"] @ plan.tensors[f"{name}.encode"] - torch.eye(32)
            errors.append(float((lost @ second @ lost.T).trace()))
        assert min(errors) == errors[index]
    asked = []
    monkeypatch.setattr(methods, "feel", lambda *given: asked.append(given[3]) or 1 / 0)
    for together in (1, 2):
        options = ProjectionOptions(together=together, tokens=1024, context=CONTEXT)
        with pytest.raises(ZeroDivisionError):
            calibrate_projections(gemma, options, 10**9, 2)
    assert asked == [[[1], [3], [4], [5]], [[1, 3], [4, 5]]]


def test_bases_and_ranks_are_of_the_layers_that_see_the_whole_past(gemma, ids, monkeypatch):
    monkeypatch.setattr(matryoshka, "STEPS", 2)  # halves of a head's rank, not eighths
    options = ProjectionOptions(
        "matryoshka", sink=3, window=7, context=CONTEXT, tokens=1024, search_ranks=True,
        train=Amount(tokens=1024),
    )  # fmt: skip
    plan = calibrate_projections(gemma, options, 10**9, 2)
    expected = token_by_token(Engine.load(gemma), ids, prompt=60)
    found = token_by_token(Engine.load(gemma, plan=plan), ids, prompt=60)
    atol = 5e-4 * float(expected.std())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)
    statistics = collect(gemma, StatisticsOptions(tokens=1024, sinks=3))
    for index, layer in enumerate(CODED):  # training has hardly moved them
        start = pca.fit(statistics.layer(layer), 2)["keys"].projection
        moved = plan.tensors[f"codes.{index}.keys.mean"] - start.mean
        assert moved.abs().max() < 0.1 * start.mean.abs().max()
    # Of all halves that a part lost first, the one that the search took first costs least.
    model = TailModel(LayerStream(gemma))
    text, offsets = text_windows(gemma, None, 1024, 0)
    past = read_past(model, text[0], matryoshka.SEARCHED, offsets[0])
    costs = {}
    for index, part in itertools.product(range(len(plan.codes)), (0, 1)):
        code = plan.codes[index]
        taken = plan.tensors[f"codes.{index}.{code.parts[part]}.spectrum"]  # at which step
        widths = [*code.widths]
        widths[part] = int((taken > taken.min()).sum())
        codes = [*plan.codes]
        codes[index] = replace(code, widths=tuple(widths))
        without = projections(replace(plan, codes=tuple(codes)))
        costs[float(taken.min())] = measure(model, [past], without)
    assert costs[min(costs)] == min(costs.values())


def test_windows_are_paid_from_the_budget(gemma, fitted):
    windows = 2 * 2 * TOKEN * SPAN
    assert fitted(0.5, method="cskv").bounded_bytes(CONTEXT, 2) == windows
    with pytest.raises(UsageError, match=f"windows and states take {windows}, the first 3"):
        calibrate_projections(
            gemma, ProjectionOptions("cskv", sink=3, window=7, context=CONTEXT), windows + 900, 2
        )


@pytest.mark.parametrize(
    "variant",
    [
        {"method": "aware"},
        {"method": "aware", "read": "rebuilt", "together": 3},
        {"method": "xkv", "together": 2},
        {"method": "palu", "bits": 4},
        {"method": "cskv", "bits": 4, "tuning": 3},
        {"method": "aware", "train": Amount(tokens=1024)},
    ],
    ids=lambda x: "-".join(str(value) for value in x.values() if isinstance(value, str | int)),
)
def test_codes_are_judged_as_they_run(gemma, fitted, ids, variant):
    plan = fitted(0.5, **variant)
    engine = Engine.load(gemma, plan=plan)
    cache = engine.new_cache(1, LENGTH)
    engine.extend(cache, ids[:-WINDOW])
    found = engine.extend(cache, ids[-WINDOW:], all_logits=True).log_softmax(-1)
    model = TailModel(LayerStream(gemma))
    past = read_past(model, ids, WINDOW)
    exact = Engine.load(gemma)
    true = exact.extend(exact.new_cache(1, LENGTH), ids, all_logits=True)[-WINDOW:].log_softmax(-1)
    torch.testing.assert_close(past.expected, true, rtol=1e-3, atol=1e-3)
    kl = float((true.exp() * (true - found)).sum(-1).mean())
    assert kl > 1e-4
    assert measure(model, [past], projections(plan)) == pytest.approx(kl, rel=2e-2)


def test_asvd_is_for_models_that_do_not_norm_their_keys(model, gemma, ids):
    options = ProjectionOptions("asvd", sink=3, window=7, context=CONTEXT, tokens=1024)
    with pytest.raises(UnsupportedModelError, match="norms its keys"):
        calibrate_projections(gemma, options, 10**9, 2)
    cwm = model("cwm")
    plan = calibrate_projections(cwm, options, 10**9, 2)
    everywhere = asvd.fit(LayerStream(cwm), text_windows(cwm, None, 1024, 0)[0])
    for index, layer in enumerate(CODED):
        encode = everywhere[layer]["values"].projection.encode.float()
        assert torch.equal(plan.tensors[f"codes.{index}.values.encode"], encode)
    expected = token_by_token(Engine.load(cwm), ids)
    found = token_by_token(Engine.load(cwm, plan=plan), ids, prompt=5)
    atol = 2e-4 * float(expected.std())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("shared", ["even", "auto"])
def test_codes_get_bits_by_what_predictions_feel(gemma, fitted, ids, monkeypatch, shared):
    asked, joined = [], code_bits.joined
    monkeypatch.setattr(
        code_bits, "joined", lambda *given: asked.append(given[2]) or joined(*given)
    )
    start = fitted(0.6, method="aware", read="rebuilt", together=2)
    bits = (8, 8) if shared == "even" else None
    options = QuantizationOptions("aware", bits, 64, context=CONTEXT, tokens=1024)
    allowed = None if bits else budget(gemma, 0.35)
    plan = calibrate_quantization(gemma, options, start, allowed, 2)
    assert asked[:2] == start.coded_layers == [[1, 3], [4, 5]]
    assert [layer.kept for layer in plan.layers] == [layer.kept for layer in start.layers]
    assert all(code.bits is not None for code in plan.codes)
    size, floor = plan.cache_bytes(CONTEXT, 2), (allowed or 0) * 0.8
    assert floor < size <= (allowed or start.cache_bytes(CONTEXT, 2))
    engine = Engine.load(gemma, plan=plan)
    assert engine.new_cache(1, CONTEXT).allocated_bytes == plan.cache_bytes(CONTEXT, 4)
    expected = token_by_token(Engine.load(gemma, plan=start), ids, prompt=60)
    found = token_by_token(engine, ids, prompt=60)
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < (0.02 if bits else 0.5)


# -------------------------------------------------------------------------------- whole commands


def test_commands_know_windows_beside_codes(gemma, tmp_path: Path, capsys: Capture) -> None:
    model, plan = str(gemma.path), str(tmp_path / "p")
    words = ["calibrate", "projections", model, "-o", plan, "--tokens", "1024", "--sink", "2"]
    words += ["--window", "6", "--context", "400", "-q", "--layers-together", "2", "--json"]
    assert run_command([*words, "--dry-run"]) == 0
    ahead = json.loads(capsys.readouterr().out)
    assert ahead["native_bytes"] == 2 * TOKEN * (4 * 400 + 2 * SPAN)
    assert ahead["codes"] == 2
    assert run_command(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["native_bytes"] == ahead["native_bytes"]
    assert made["bytes"] <= ahead["bytes_at_most"] == ahead["native_bytes"] // 2
    assert run_command(["plan", "show", plan]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "codes 2, of 2 layers each: keys after RoPE" in shown
    assert f"sliding windows 2 layers: the last {SPAN} tokens" in shown
    short = ["plan", "slice", plan, "-o", plan + ".cut", "--kv-budget", "40%", "--context", "400"]
    assert run_command(short) == 0
    assert Plan.read(Path(plan + ".cut")).cache_bytes(400, 2) <= 0.4 * made["native_bytes"]
    assert run_command(["calibrate", "explain", plan, "-o", plan + ".svg"]) == 0
    assert "4–5" in capsys.readouterr().out
    words = ["evaluate", model, "--plan", plan, "--quick", "--prefill", "200", "--json", "-q"]
    words += ["--continuation", "50", "--windows", "2", "--length", "300", "--no-speed"]
    assert run_command(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["divergence"]["cache_bytes"] == Plan.read(Path(plan)).cache_bytes(250, 4)
    assert report["divergence"]["bf16_bytes"] == Plan.read(Path(plan)).cache_bytes(250, 2)
    assert report["divergence"]["kl"]["value"] > 0


def test_a_model_of_windows_alone_has_no_codes(tiny, tmp_path: Path, capsys: Capture) -> None:
    model = str(tiny("mistral", sliding_window=32))
    assert run_command(["calibrate", "projections", model, "-o", str(tmp_path / "p")]) == 4
    assert "sliding window in all layers" in capsys.readouterr().err
