"""Layers that read the keys and values of others keep nothing, and read what those keep."""

import shutil
from dataclasses import replace

import pytest
import torch
from _convert_tools import convert
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
from safetensors.torch import load_file, save_file

from kvtool.calibrate import heads
from kvtool.calibrate.budgets import BudgetOptions, calibrate_budgets
from kvtool.calibrate.double_sparsity import calibrate_double_sparsity
from kvtool.calibrate.heads import HeadOptions, calibrate_heads
from kvtool.calibrate.past import read_again, read_past
from kvtool.calibrate.projections import (
    ProjectionOptions,
    calibrate_projections,
    memory_bytes,
)
from kvtool.calibrate.quantization import QuantizationOptions, calibrate_quantization, everything
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.cli.serve import native_bytes_per_token
from kvtool.convert import costs, planning
from kvtool.convert.options import PROBE, positions
from kvtool.convert.verify import verify
from kvtool.errors import CheckpointError, PlanError, UnsupportedModelError
from kvtool.evaluate.layers import layer_damage
from kvtool.evaluate.protocol import bf16_bytes, cache_size
from kvtool.fp8 import stored_scales
from kvtool.inspection import inspect_checkpoint
from kvtool.layer_plan import LayerPlan
from kvtool.layout import describe
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.scheduler import Scheduler
from kvtool.sharing import SharedPlan
from kvtool.windows import WindowPlan

NAME, WINDOW, BYTES = "gemma4_text, shared", 24, 4
# Of 8 layers, every other one has a window; 2 and 3 are read by 4 to 7. All can be planned for 1,
# and bits for 3 (`test_lent_layers.py`).
SMALL, LARGE = 2 * 2 * 16, 2 * 2 * 32  # numbers of a token in a layer with a window, and without
LENDS, READS = LayerPlan((), kept=SharedPlan(2, 32)), LayerPlan((), kept=SharedPlan(0, 32))
RING, READS_RING = (
    LayerPlan((), kept=WindowPlan(2, 16, WINDOW)),
    replace(READS, kept=SharedPlan(0, 16)),
)
PLANNED = (LayerPlan((False, False)),)
WHOLE = (RING, *PLANNED, RING, LENDS, *(READS_RING, READS) * 2)


@pytest.fixture
def checkpoint(tiny):
    return open_case(tiny, NAME)


def test_each_reader_names_the_last_layer_of_its_kind_that_has_keys_of_its_own(checkpoint):
    layouts = describe(checkpoint.hf_config())
    assert [x.reads for x in layouts] == [None] * 4 + [2, 3, 2, 3]
    assert [x.read for x in layouts] == [False, False, True, True] + [False] * 4
    assert [x.sees_all for x in layouts] == [False, True] + [False] * 6
    assert [x.cached_values for x in layouts] == [SMALL, LARGE] * 2 + [0] * 4


def test_a_layer_that_nobody_reads_lends_nothing(tiny):
    layouts = describe(open_case(tiny, "gemma4_text, shared by few").hf_config())
    assert [x.reads for x in layouts] == [None] * 7 + [5]
    assert [x.read for x in layouts] == [i == 5 for i in range(8)]


def test_the_cache_is_that_of_the_layers_with_keys_of_their_own(checkpoint):
    inspection = inspect_checkpoint(checkpoint)
    assert inspection.bytes_per_token == 2 * (2 * SMALL + 2 * LARGE)
    assert inspection.cache_bytes(100) == 2 * (2 * SMALL * WINDOW + 2 * LARGE * 100)
    assert [run.summary.partition("norm")[2] for run in inspection.runs[2:5]] == [
        f", window of {WINDOW} tokens, read by later layers",
        ", read by later layers",
        f", window of {WINDOW} tokens, reads layer 2",
    ]
    engine = Engine.load(checkpoint)
    for capacity in (8, WINDOW, 100):
        cache = engine.new_cache(3, capacity)
        numbers = 2 * SMALL * min(capacity, WINDOW) + 2 * LARGE * capacity
        assert cache.allocated_bytes == 3 * BYTES * numbers
        assert cache.layer_bytes[4:] == [0] * 4
        assert cache.capacity == capacity
    size = cache_size(engine)
    assert size.bytes_per_token == BYTES * 2 * LARGE
    assert size.constant_bytes == BYTES * 2 * SMALL * WINDOW
    assert bf16_bytes(engine, 60, 100) == inspection.cache_bytes(100)
    assert native_bytes_per_token(Scheduler(engine, 10**8), checkpoint) == BYTES * 2 * LARGE


@pytest.mark.parametrize("pieces", [(60,), (1,), (7, 30, 1, 2), (23, 1, 1, 40)])
def test_pieces_of_a_text_do_not_matter(checkpoint, pieces):
    ids = tokens(90)
    same(logits(Engine.load(checkpoint), ids, *pieces), by_transformers(checkpoint, ids))


def test_rows_of_a_batch_do_not_see_each_other(checkpoint):
    engine, rows = Engine.load(checkpoint), [tokens(70), tokens(9)]
    cache = engine.new_cache(2, 8)
    for row, ids in enumerate(rows):
        engine.extend(cache, ids, row)
    caches = [engine.new_cache(1, 64) for _ in rows]
    for alone, ids in zip(caches, rows, strict=True):
        engine.extend(alone, ids)
    for step in range(3):
        new = torch.tensor([5 + step, 6 + step])
        together, apart = engine.decode(cache, new), engine.decode_rows(caches, new.tolist())
        for row in range(2):
            rows[row] = torch.cat((rows[row], new[row, None]))
            wanted = by_transformers(checkpoint, rows[row])[-1]
            same(together[row], wanted)
            same(apart[row], wanted)


def test_a_row_goes_back_to_where_windows_are_whole(checkpoint):
    engine, ids = Engine.load(checkpoint), tokens(60)
    cache = engine.new_cache(1, 64)
    engine.extend(cache, ids[:20])
    cache.crop(0, 10)
    assert cache.lengths == [10]
    same(engine.extend(cache, ids[10:]), by_transformers(checkpoint, ids)[-1])
    cache.crop(0, 30)
    assert cache.lengths == [0]  # the ring has lost what those tokens saw
    engine.extend(cache, ids[:40])
    mark = cache.snapshot(0)
    engine.extend(cache, tokens(30))
    cache.restore(0, mark)
    same(engine.extend(cache, ids[40:]), by_transformers(checkpoint, ids)[-1])


def test_a_plan_counts_what_is_kept_once_and_is_read_again(checkpoint, tmp_path):
    plan = Plan(base_of(checkpoint), whole_layers(checkpoint))
    assert plan.layers == WHOLE
    assert plan.planned_layers == [1]
    assert plan.cache_bytes(100, 2) == inspect_checkpoint(checkpoint).cache_bytes(100)
    assert plan.bytes_per_token(2) == plan.native_bytes_per_token(2) == 2 * 2 * LARGE
    plan.write(tmp_path / "a.plan")
    assert Plan.read(tmp_path / "a.plan").layers == plan.layers
    head = (tmp_path / "a.plan").read_bytes()[:4096].replace(b"\\", b"")
    assert b'"format_version":9' in head
    assert SharedPlan.of(describe(checkpoint.hf_config())[2]) is None  # its window says it
    ids = tokens(60)
    same(logits(Engine.load(checkpoint, plan=plan), ids, 40), by_transformers(checkpoint, ids))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((RING, *PLANNED * 3, *WHOLE[4:]), "layer 2 .* the window that it sees, and the plan is"),
        ((*WHOLE[:3], *PLANNED, *WHOLE[4:]), "layer 3 .* a past that several layers read"),
        ((*WHOLE[:4], RING, *WHOLE[5:]), "layer 4 .* a past that several layers read"),
        ((*WHOLE[:4], READS, *WHOLE[5:]), "layer 4 .* shares 0 heads x 16, and 0 heads x 32"),
        ((*WHOLE[:7], LENDS), "layer 7 .* shares 0 heads x 32, and 2 heads x 32 is planned"),
    ],
)
def test_a_plan_that_shares_otherwise_is_refused(checkpoint, layers, said):
    with pytest.raises(PlanError, match=said):
        Engine.load(checkpoint, plan=Plan(base_of(checkpoint), layers))


@pytest.mark.parametrize("numbers", [(-1, 32), (2, 0)])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(PlanError, match="impossible"):
        SharedPlan(*numbers)


def test_heads_that_only_one_layer_reads_stream(checkpoint):
    ids, plan = tokens(80), streaming(checkpoint, 4, 100)
    assert plan.streaming_heads == 2
    same(logits(Engine.load(checkpoint, plan=plan), ids, 50), by_transformers(checkpoint, ids))
    short = Engine.load(checkpoint, plan=streaming(checkpoint, 4, 10))
    memory = RowMemory(short)
    for length in (5, 64, 100, 200):
        cache = short.new_cache(1, 1)
        short.extend(cache, tokens(length))
        cache.resize(-(-length // 64) * 64)
        assert memory.holding(length, length) == cache.allocated_bytes
    assert not torch.allclose(logits(short, ids, 50), by_transformers(checkpoint, ids), atol=1e-2)


@pytest.mark.parametrize("method", ["ablation", "duo", "retrieval", "entropy"])
def test_heads_are_scored(checkpoint, monkeypatch, text, method):
    monkeypatch.setattr(heads, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(heads, "MAX_NLL", float("inf"))
    options = HeadOptions(method, 4, 24, lengths=(300,), samples=2, steps=3, data=text)
    plan = calibrate_heads(checkpoint, options)
    assert plan.planned_heads == 2
    assert plan.scores[1].unique().numel() == 2


def test_budgets_are_for_the_layer_that_nobody_else_reads(checkpoint, text):
    plan = Plan(base_of(checkpoint), whole_layers(checkpoint))
    wanted = plan.cache_bytes(100, 2) - 2 * LARGE * 50
    options = BudgetOptions("mass", context=100, minimum=10, data=text, tokens=400)
    plan = calibrate_budgets(checkpoint, options, wanted, 2)
    assert plan.cache_bytes(100, 2) == wanted
    assert [i for i, layer in enumerate(plan.layers) if layer.budget] == [1]
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, 64)
    engine.extend(cache, tokens(100))
    cache.resize(100)
    assert cache.allocated_bytes == 2 * wanted


@pytest.mark.parametrize("method", ["aware", "kivi", "rotatekv"])
def test_few_bits_are_for_the_layers_that_keep_a_whole_past(checkpoint, text, method):
    ids, read = tokens(160), "rebuilt" if method == "rotatekv" else "absorbed"
    found = []
    for bits in ((8, 8), (2, 2)):
        options = QuantizationOptions(
            method, read=read, bits=bits, group=32, data=text, tokens=1024, context=512
        )
        start = everything(checkpoint, base_of(checkpoint), options)
        plan = calibrate_quantization(checkpoint, options, start, None, 2)
        assert [i for i, layer in enumerate(plan.layers) if layer.bits] == [1, 3]
        found.append(logits(Engine.load(checkpoint, plan=plan), ids, 150))
    wanted = by_transformers(checkpoint, ids)
    error = [relative_error(x, wanted) for x in found]
    assert 0 < error[0] < 0.05 < error[1]


@pytest.mark.parametrize("method", ["pca", "cskv", "aware", "matryoshka"])
def test_codes_are_for_the_layer_that_nobody_else_reads(checkpoint, text, method):
    start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    budget = start.native_bytes(200, 2) - LARGE * 200
    options = ProjectionOptions(method, sink=2, window=8, context=200, data=text, tokens=1024)
    plan = calibrate_projections(checkpoint, options, budget, 2)
    assert plan.coded_layers == [[1]]
    assert plan.cache_bytes(200, 2) <= budget
    assert plan.bytes_per_token(2) == 2 * LARGE + sum(code.token_bytes(2) for code in plan.codes)
    size = cache_size(Engine.load(checkpoint, plan=plan))
    assert size.bytes_per_token_bf16 == plan.bytes_per_token(2)
    logits(Engine.load(checkpoint, plan=plan), tokens(60), 40)


def test_the_layer_that_nobody_else_reads_is_read_sparsely(checkpoint, text):
    start, ids = Plan(base_of(checkpoint), whole_layers(checkpoint)), tokens(150)
    options = StatisticsOptions(data=text, tokens=512)
    plan = calibrate_double_sparsity(checkpoint, start, 4, 40, options)
    assert [i for i, layer in enumerate(plan.layers) if layer.sparse] == [1]
    found, wanted = (
        logits(Engine.load(checkpoint, plan=plan), ids, 30),
        by_transformers(checkpoint, ids),
    )
    same(found[:40], wanted[:40])
    assert not torch.allclose(found[60:], wanted[60:], atol=1e-2)


def test_no_heads_are_planned_where_whole_pasts_are_all_shared(tiny):
    family, more = CASES[NAME]
    more = more | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5}
    checkpoint, ids = Checkpoint.open(str(tiny(family, **more))), tokens(50)
    same(logits(Engine.load(checkpoint), ids, 40), by_transformers(checkpoint, ids))
    with pytest.raises(UnsupportedModelError, match="whose keys and values no other layer reads"):
        calibrate_heads(checkpoint, HeadOptions())
    plans = inspect_checkpoint(checkpoint).plans
    assert [x.command for x in plans if not x.reasons] == ["calibrate quantization"]


def test_what_budgets_leave_alone_is_said(checkpoint, tmp_path, capsys):
    command = ["calibrate", "budgets", str(checkpoint.path), "-o", str(tmp_path / "a.plan")]
    command += ["--method", "uniform", "--context", "200", "--minimum", "10", "--kv-budget"]
    said = "2 layers with a sliding window and 5 layers that share keys and values"
    assert run_command([*command, "80%", "--dry-run"]) == 0
    assert f"left alone {said}" in " ".join(capsys.readouterr().out.split())
    assert run_command([*command, "20%"]) == 2
    assert f"; left alone, and counted: {said}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", [NAME, "gemma3_text"])
def test_what_goes_from_layer_to_layer_is_part_of_what_a_conversion_takes(tiny, name):
    checkpoint = open_case(tiny, name)
    options = planning.ConvertOptions(to="fp8-kv", tokens=4096)
    stream = LayerStream(checkpoint)
    wide, hidden = stream.columns.width, stream.layouts[0].hidden_size
    assert (wide > hidden) == (name == NAME)
    asked = planning.plan(checkpoint, options)
    more = planning.plan(checkpoint, replace(options, tokens=8192))
    states = 4 * 4096 * wide
    assert more["memory_bytes"] - asked["memory_bytes"] == states
    assert more["disk_bytes"] - asked["disk_bytes"] == 2 * states  # old and new
    probe = 4 * min(PROBE, positions(checkpoint)) * wide
    assert costs.disk_bytes(stream, 0, 0, 0) == 2 * probe
    start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    assert memory_bytes(checkpoint, start, ProjectionOptions("asvd", tokens=4096)) == states


def test_statistics_are_of_layers_with_keys_of_their_own(checkpoint, text):
    options = StatisticsOptions(data=text, tokens=512, window=64)
    found = collect(checkpoint, options)
    stream = LayerStream(checkpoint)
    assert found.layer(3).queries.mean.shape == (4, 32)
    with pytest.raises(KeyError):
        found.layer(4)
    assert stream.columns.width == 64 + 1 + 2 * 2 * 16 + 2 * 2 * 32
    layer, hidden = stream.layer(4), stream.embed(tokens(9)[None])
    layer.run(hidden, stream.exact_attention(layer))
    assert layer.attention.lent is None


def test_the_end_of_a_text_is_read_behind_its_past(checkpoint):
    ids, model = tokens(60), TailModel(LayerStream(checkpoint))
    past = read_past(model, ids, 20)
    same(past.expected, by_transformers(checkpoint, ids)[-20:].log_softmax(-1))
    same(read_again(model, past, [None] * 8), past.expected)


def test_a_damaged_layer_harms_those_that_read_it(tiny, tmp_path):
    base, ids = open_case(tiny, NAME), tokens(60)
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{x}.weight" for x in ("3.self_attn.v_proj", "5.mlp.up_proj")]
    noise = [0.1 * torch.randn(base.tensors[x].shape, generator=generator) for x in names]

    def damaged(*which: int) -> Checkpoint:
        folder = tmp_path / "".join(map(str, which))
        shutil.copytree(base.path, folder)
        stored = load_file(folder / "model.safetensors")
        for i in which:
            stored[names[i]] += noise[i]
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return Checkpoint.open(str(folder))

    def kl(other: Checkpoint) -> float:
        log_p, log_q = (
            by_transformers(x, ids)[40:].double().log_softmax(-1) for x in (base, other)
        )
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    found = list(layer_damage(Engine.load(damaged(0, 1)), Engine.load(base), ids, 40))
    for layer, alone in ((3, kl(damaged(0))), (5, kl(damaged(1)))):
        assert alone > 1e-3
        assert found[layer].kl == pytest.approx(alone, rel=1e-3)
    assert [x.kl for i, x in enumerate(found) if i not in (3, 5)] == [0] * 6
    ring = "model.layers.2.self_attn.v_proj.weight"
    names[0], noise[0] = ring, noise[0][: base.tensors[ring].shape[0]]
    shutil.rmtree(tmp_path / "0")
    found = list(layer_damage(Engine.load(damaged(0)), Engine.load(base), ids, 40))
    assert found[2].kl == pytest.approx(kl(Checkpoint.open(str(tmp_path / "0"))), rel=1e-3)
    assert [x.kl for i, x in enumerate(found) if i != 2] == [0] * 7


def test_weights_that_no_layer_uses_are_passed_over(tiny, tmp_path):
    base, ids = open_case(tiny, NAME), tokens(30)
    shutil.copytree(base.path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    more = {f"model.layers.5.self_attn.{x}.weight": torch.ones(4, 4) for x in ("k_proj", "v_norm")}
    save_file(load_file(file) | more, file, {"format": "pt"})  # as published checkpoints have them
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    same(logits(Engine.load(checkpoint), ids, 20), by_transformers(base, ids))
    LayerStream(checkpoint).layer(5)
    more = {"model.layers.3.self_attn.more.weight": torch.ones(4, 4)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="more"):
        LayerStream(Checkpoint.open(str(tmp_path / "model")))


def test_a_token_without_an_input_of_its_own_is_refused(tiny):
    family, more = CASES[NAME]
    folder = tiny(family, **more | {"vocab_size_per_layer_input": 290})
    with pytest.raises(CheckpointError, match="its embedding has 290 rows"):
        LayerStream(Checkpoint.open(str(folder))).embed(torch.tensor([[295]]))


def test_scales_of_a_reader_are_those_of_what_it_reads(checkpoint, tmp_path):
    convert(checkpoint.path, tmp_path / "out", to="fp8-kv")
    output = Checkpoint.open(str(tmp_path / "out"))
    scales = [stored_scales(output, i) for i in range(8)]
    for reader, lender in ((4, 2), (5, 3), (6, 2), (7, 3)):
        assert all(map(torch.equal, scales[reader], scales[lender]))
    assert len({float(keys) for keys, _ in scales}) == 4
    report = verify(output.path, checkpoint)
    assert report.passed, report.to_dict()
    native = inspect_checkpoint(checkpoint).bytes_per_token
    assert report.measured["fp8_bytes_per_token"] == native / 2
    assert len(report.measured["layer_kl"]) == 4
    ids = tokens(60)
    same(logits(Engine.load(output), ids, 40), by_transformers(checkpoint, ids))
    file = output.path / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.6.self_attn.k_scale"] *= 2
    save_file(stored, file, {"format": "pt"})
    wrong = {check.name: check for check in verify(output.path, checkpoint).checks}["scales"]
    assert "layer 6 has other scales than layer 2, which it reads" in wrong.detail
    assert not wrong.passed


def test_who_reads_a_layer_that_fp8_hurts_is_skipped_with_it(checkpoint, tmp_path):
    convert(checkpoint.path, tmp_path / "out", to="fp8-kv")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    for layer in (3, 5, 7):
        stored[f"model.layers.{layer}.self_attn.k_scale"] *= 1e-3
    save_file(stored, file, {"format": "pt"})
    assert verify(tmp_path / "out", checkpoint).measured["skip_layers"] == [3, 5, 7]


@pytest.mark.parametrize("folded", ["smooth", "turn_values"])
def test_nothing_is_folded_where_layers_share_keys_and_values(checkpoint, folded):
    options = planning.ConvertOptions(to="fp8-kv", tokens=1024, **{folded: True})
    with pytest.raises(UnsupportedModelError, match="several layers read the same keys"):
        planning.plan(checkpoint, options)


@pytest.mark.parametrize("chunk", [8192, 25])
def test_layers_that_store_nothing_see_only_the_tokens_that_are_asked_for(checkpoint, chunk):
    engine, ids = Engine.load(checkpoint), tokens(70)
    seen: list[list[int]] = [[] for _ in engine.attentions]
    for index, attention in enumerate(engine.attentions):
        attention.register_forward_pre_hook(
            lambda _, args, given, index=index: seen[index].append(given["hidden_states"].shape[1]),
            with_kwargs=True,
        )
    found = engine.extend(engine.new_cache(1, 70), ids, chunk=chunk)
    same(found, by_transformers(checkpoint, ids)[-1])
    pieces = -(-70 // chunk)
    assert [sum(own) for own in seen] == [70] * 4 + [pieces] * 4
    seen = [[] for _ in seen]
    same(
        engine.extend(engine.new_cache(1, 70), ids, all_logits=True),
        by_transformers(checkpoint, ids),
    )
    assert [sum(own) for own in seen] == [70] * 8


def test_a_plan_says_what_is_shared(checkpoint, tmp_path, capsys):
    Plan(base_of(checkpoint), whole_layers(checkpoint)).write(tmp_path / "a.plan")
    assert run_command(["plan", "show", str(tmp_path / "a.plan")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "shared 4 layers without a cache; 1 layer that they read: all tokens" in said
