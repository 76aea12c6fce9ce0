"""Packed latents: what fake quantisation gives, the same however tokens arrive, planned bytes."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from _convert_tools import one_thread, random_ids
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

from kvtool.calibrate.bit_options import QuantizationOptions
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.latents import _harm
from kvtool.calibrate.quantization import calibrate_quantization, everything
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.convert import conversion, planning
from kvtool.errors import PlanError, UnsupportedModelError
from kvtool.kernels.packed_attention import channel_sums
from kvtool.kernels.quantise import BITS, dequantise, quantise
from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.rope import rotate
from kvtool.runtime import Engine
from kvtool.runtime.layers import LatentRuntimeAttention
from kvtool.runtime.memory import RowMemory

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LENGTH = 96
KINDS = ("transformers", "kvtool")


@pytest.fixture(scope="module")
def latent(tiny, tmp_path_factory):
    """``latent(target)``: a converted model, stock MLA or kvtool's own."""
    made: dict[str, Checkpoint] = {}

    def get(target: str) -> Checkpoint:
        if target not in made:
            output = tmp_path_factory.mktemp(target) / "out"
            options = planning.ConvertOptions(
                method="transmla", target=target, kv_budget="60%", freqfold="2", tokens=2048
            )
            conversion.convert(Checkpoint.open(str(tiny("llama"))), output, options)
            made[target] = Checkpoint.open(str(output))
        return made[target]

    return get


def planned(checkpoint, share=0.5, prefill="dense", group=16, sink=3, window=5) -> Plan:
    """A plan with random widths, or 4 bits for a share of the numbers."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for attention in Engine.load(checkpoint).attentions:
        stages = attention.stages
        width = stages.rank + stages.rope_dim
        bits = [BITS[i] for i in torch.randint(0, 4, (width,), generator=generator)]
        if share is not None:
            bits = [4 if x < share else 2 for x in torch.rand(width, generator=generator)]
        kept = LatentPlan(stages.rank, stages.rope_dim, tuple(bits), group, sink, window)
        layers.append(LayerPlan((), kept=kept))
    return Plan(base_of(checkpoint), tuple(layers), prefill)


@pytest.mark.parametrize("bits", BITS)
def test_folded_scales_sum_what_was_dequantised(bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 150, 24, 16, generator=generator)  # several tiles
    codes, scales = quantise(x, bits, 16)
    rows = dequantise(codes, scales, 16, bits, 16).mT.flatten(1, 2)
    weights = torch.softmax(torch.randn(2, 3, 150 * 16, generator=generator), dim=-1)
    found = channel_sums(weights, codes, scales[..., 0, :], bits, 16)
    torch.testing.assert_close(found, weights @ rows, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------------- the store


def reference(checkpoint, plan: Plan, ids):
    """Logits where each query sees fake-quantised blocks and exact tokens, written out."""
    engine = Engine.load(checkpoint)
    for index, attention in enumerate(engine.attentions):
        kept = plan.layers[index].kept

        def attend(hidden, step, store, attention=attention, kept=kept):
            stages = attention.stages
            cos, sin = step.tables[attention.table]
            q, c, k_pe = stages.query_and_compress(hidden)
            exact = torch.cat((c, rotate(k_pe, cos, sin)), dim=-1)[0]
            stored = exact.clone()
            for block in range(kept.blocks(len(ids))):
                first = kept.sink + block * kept.group
                own = slice(first, first + kept.group)
                for at, bits in enumerate(kept.bits):
                    codes, scales = quantise(exact[own, at], bits, kept.group)
                    stored[own, at] = dequantise(codes, scales, kept.group, bits, kept.group)
            at = torch.arange(len(ids))
            ends = torch.tensor([kept.sink + kept.blocks(p + 1) * kept.group for p in at])
            far = (at >= kept.sink) & (at < ends[:, None])
            query = stages.expand_query(q, cos, sin)[0]
            heads = query.shape[0]
            parts = []
            for x in (exact, stored):
                own = x[None].split([kept.rank, kept.rope_dim], dim=-1)
                parts.append(
                    [y[0].repeat_interleave(heads // y.shape[1], 0) for y in stages.expand(*own)]
                )
            (k, v), (k_far, v_far) = parts
            scores = torch.where(far, query @ k_far.mT, query @ k.mT) * stages.scaling
            weights = scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1)
            context = (weights * far) @ v_far + (weights * ~far) @ v
            return stages.output(context.transpose(0, 1)[None])

        attention.attention = attend
    return logits(engine, ids, len(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1.0, None])
def test_it_reads_what_fake_quantisation_gives(latent, kind, share, poison):
    checkpoint, ids = latent(kind), random_ids(LENGTH)
    plan = planned(checkpoint, share, "streamed")
    expected = reference(checkpoint, plan, ids)
    found = logits(Engine.load(checkpoint, plan=plan), ids, 1)
    assert_same(found, expected)
    dense = logits(Engine.load(checkpoint), ids, len(ids))
    assert (found - dense).abs().max() > 3e-3  # the packing is seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_however_tokens_arrive(latent, kind, poison):
    checkpoint = latent(kind)
    planner = partial(planned, checkpoint, None)
    check_arrival(checkpoint, planner, random_ids(LENGTH))


def test_a_prompt_may_come_in_pieces_and_rows_decode_together(latent):
    engine = Engine.load(latent("transformers"), plan=planned(latent("transformers")))
    check_prompt_in_pieces(engine, random_ids(LENGTH))


def test_rows_of_different_lengths_do_not_disturb_each_other(latent, poison):
    check_rows(Engine.load(latent("kvtool"), plan=planned(latent("kvtool"))))


@pytest.mark.parametrize("stored", [60, 77, 94])
def test_a_row_goes_back_where_it_can_and_starts_over_where_not(latent, stored, poison):
    checkpoint = latent("transformers")
    engine = Engine.load(checkpoint, plan=planned(checkpoint, prefill="streamed"))
    check_crop(engine, random_ids(LENGTH), stored)


def test_a_snapshot_is_where_it_was(latent):
    engine = Engine.load(latent("transformers"), plan=planned(latent("transformers")))
    check_snapshot(engine, random_ids(LENGTH))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_are_the_planned_ones(latent, kind, dtype):
    checkpoint = latent(kind)
    for share in (0.5, None):
        plan = planned(checkpoint, share)
        check_bytes(Engine.load(checkpoint, dtype=dtype, plan=plan), dtype.itemsize)
        plain = Engine.load(checkpoint, dtype=dtype).new_cache(1, 64)
        assert plain.allocated_bytes == plan.native_bytes(64, dtype.itemsize)


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_the_memory_of_a_row_is_known_before(latent, prefill):
    checkpoint = latent("transformers")
    plan = planned(checkpoint, prefill=prefill)
    engine = Engine.load(checkpoint, plan=plan)
    memory = RowMemory(engine)
    for tokens in (64, 128, 640):
        assert memory.holding(tokens, tokens) == engine.new_cache(1, tokens).allocated_bytes
    cache = engine.new_cache(1, 128)
    engine.extend(cache, random_ids(40), prompt=128)
    assert memory.reading(128) == cache.allocated_bytes
    assert (memory.reading(128) > memory.holding(128, 128)) == (prefill == "dense")


# ---------------------------------------------------------------------------------- the plan


def test_a_plan_comes_back_from_its_file(latent, tmp_path):
    plan = planned(latent("transformers"), None)
    plan.write(tmp_path / "a.plan")
    read = Plan.read(tmp_path / "a.plan")
    assert (read.layers, read.base) == (plan.layers, plan.base)


def test_plans_that_do_not_fit_are_refused(latent, tiny):
    checkpoint = latent("transformers")
    plan = planned(checkpoint)
    kept = plan.layers[0].kept
    for change, message in (
        ({"bits": (4,)}, "1 widths for a latent"),
        ({"bits": (5,) * kept.width}, "of 2, 3, 4 or 8 bits, not of 5"),
        ({"rank": 0}, "widths for a latent of 0"),
        ({"group": 48}, "by 16, 32, 64 or 128, not by 48"),
        ({"window": 0}, "the window holds at least the current token"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(kept, **change)
    other = replace(kept, rank=kept.rank - 1, rope_dim=kept.rope_dim + 1)
    layers = (LayerPlan((), kept=other), *plan.layers[1:])
    with pytest.raises(PlanError, match="of other sizes"):
        Engine.load(checkpoint, plan=replace(plan, layers=layers))
    wide = LayerPlan((), kept=replace(kept, window=600))
    with pytest.raises(PlanError, match="more than the 512 positions"):
        Engine.load(checkpoint, plan=replace(plan, layers=(wide, *plan.layers[1:])))
    heads = LayerPlan((False,))
    with pytest.raises(PlanError, match="keeps latents, and the plan is for KV heads"):
        Engine.load(checkpoint, plan=replace(plan, layers=(heads, *plan.layers[1:])))
    with pytest.raises(UnsupportedModelError, match="heads share one latent"):
        Engine.load(checkpoint, plan=replace(plan, layers=(heads,) * 3))
    with pytest.raises(PlanError, match="made for"):
        Engine.load(Checkpoint.open(str(tiny("llama"))), plan=plan)


def test_latents_without_a_plan_are_stored_as_before(latent):
    engine = Engine.load(latent("transformers"))
    assert all(type(x) is LatentRuntimeAttention for x in engine.attentions)


# ------------------------------------------------------------------------------- the command


def command(checkpoint, output, *words):
    options = ["--tokens", "1024", "--context", "256", "-q"]
    if "fp8" not in words:  # which has no blocks
        options += ["--sink", "3", "--window", "5", "--group", "16"]
    return run_command(
        ["calibrate", "quantization", checkpoint.source, "-o", str(output), *options, *words]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_writes_a_plan_that_runs(latent, kind, tmp_path, capsys):
    checkpoint, path = latent(kind), tmp_path / "p"
    assert command(checkpoint, path, "--bits", "4", "--dry-run", "--json") == 0
    most = json.loads(capsys.readouterr().out)["bytes_at_most"]
    assert command(checkpoint, path, "--bits", "4", "--json") == 0
    said, plan = json.loads(capsys.readouterr().out), Plan.read(path)
    assert said["bytes"] == plan.cache_bytes(256, 2) <= most
    assert said["native_bytes"] == plan.native_bytes(256, 2)
    assert len({bits for layer in plan.layers for bits in layer.kept.bits}) > 1  # they differ
    harm = plan.provenance[0]["harm"]
    assert len(harm["latent"]) == len(harm["shared_key"]) == 3
    assert run_command(["plan", "show", str(path), "--context", "400"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the first 3 and at least the last 5 tokens" in shown
    assert "bits in the mean" in shown
    generate = ["generate", checkpoint.source, "some text " * 30, "--plan", str(path)]
    assert run_command([*generate, "--max-new-tokens", "4", "--json", "-q"]) == 0


def test_the_same_bits_for_all_numbers_need_no_text(latent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load_transformers", None)  # nor the model in memory
    checkpoint, path = latent("transformers"), tmp_path / "p"
    assert command(checkpoint, path, "--method", "kivi", "--bits", "3", "--json") == 0
    said, plan = json.loads(capsys.readouterr().out), Plan.read(path)
    assert all(set(layer.kept.bits) == {3} for layer in plan.layers)
    assert said["bytes"] == plan.cache_bytes(256, 2) < said["native_bytes"] / 2
    assert plan.provenance[0]["method"] == "kivi"


def test_bits_go_to_numbers_that_predictions_feel(latent):
    """A budget is kept, a larger one never takes bits away, and harm falls."""
    checkpoint = latent("transformers")
    options = QuantizationOptions(bits=None, context=256, tokens=1024, group=16, sink=3, window=5)
    start = everything(checkpoint, base_of(checkpoint), options)
    found = []
    for share in (0.4, 0.45, 0.55):
        budget = int(share * start.native_bytes(256, 2))
        plan = calibrate_quantization(checkpoint, options, start, budget, 2)
        assert plan.cache_bytes(256, 2) <= budget
        harm = plan.provenance[0]["harm"]
        found.append((plan, sum(harm["latent"]) + sum(harm["shared_key"])))
    for (less, worse), (more, better) in pairwise(found):
        assert better < worse
        for one, other in zip(less.layers, more.layers, strict=True):
            assert all(a <= b for a, b in zip(one.kept.bits, other.kept.bits, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "K4V2"], "keys and values at once"),
        (["--bits", "S8"], "no layer of"),
        (["--method", "gear"], "by what predictions feel"),
        (["--bits", "fp8"], "--bits fp8 is for keys and values of heads, and not for latents"),
        (["--read", "rebuilt"], "read as stored"),
        (["--bits", "auto", "--kv-budget", "1%"], "with 2 bits everywhere, the cache takes"),
    ],
)
def test_bad_input_ends_in_a_sentence(latent, tmp_path, capsys, words, message):
    assert command(latent("transformers"), tmp_path / "p", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


# -------------------------------------------------------------------------- what is felt of them


def test_the_gradient_is_what_a_change_of_a_latent_does_to_predictions(latent):
    checkpoint, ids = latent("transformers"), random_ids(64)
    # Of the first token every read is far, and of those that read it, none.
    ((seen, felt, end),) = WholeModel(checkpoint).far_reads(ids[None], [0], (0, 32), 0)
    engine = Engine.load(checkpoint)
    rank = engine.attentions[1].stages.rank

    def said(change: float, number: int) -> Tensor:
        cache = engine.new_cache(1, 64)
        engine.extend(cache, ids[:-end])
        cache.stores[1].planes["latents"][0, 0, number] += change
        return engine.extend(cache, ids[-end:], all_logits=True).log_softmax(-1)

    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(said(0.0, 0).exp(), 1, generator=generator)
    for number in (0, 3, rank, rank + 5):
        up, down = (said(x, number).gather(1, drawn).sum() for x in (0.05, -0.05))
        slope = float(up - down) / 0.1
        assert float(felt[1][0][0, 0, 0, number]) == pytest.approx(slope, rel=0.02, abs=1e-3)
    assert seen[1][0].shape == (1, 1, 64, engine.attentions[1].stages.rope_dim + rank)


def test_harm_is_half_the_square_of_what_an_error_is_felt_as():
    generator = torch.Generator().manual_seed(0)
    y, g = torch.randn(2, 32, 5, generator=generator)
    found = _harm(y, g, 16)
    for at, bits in enumerate(BITS):
        for number in range(5):
            expected = 0.0
            for block in range(2):
                own = slice(16 * block, 16 * block + 16)
                codes, scales = quantise(y[own, number], bits, 16)
                error = dequantise(codes, scales, 16, bits, 16) - y[own, number]
                expected += float((error * g[own, number]).square().sum()) / 2
            assert float(found[number, at]) == pytest.approx(expected, rel=1e-3, abs=1e-9)
