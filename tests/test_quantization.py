"""`kvtool calibrate quantization`: bits by harm, in the bytes asked for, of heads and of codes."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _convert_tools import YARN, edited_copy, one_thread, random_ids

from kvtool._transformers import cache_argument
from kvtool.bits import Bits, Tier, read_keys, read_values
from kvtool.calibrate import fp8_scales
from kvtool.calibrate.allocate import choose
from kvtool.calibrate.bit_options import QuantizationOptions, parse_bits, parse_tiers
from kvtool.calibrate.far_reads import END
from kvtool.calibrate.head_bits import harms, offered
from kvtool.calibrate.projections import (
    ProjectionOptions,
    calibrate_projections,
    text_windows,
)
from kvtool.calibrate.quantization import calibrate_quantization
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.codes import Positions
from kvtool.convert.verify import Fp8Cache
from kvtool.divergence import kl_divergence
from kvtool.errors import UsageError
from kvtool.fp8 import stored_scales
from kvtool.kernels.hadamard import turn
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.runtime.packed import PackedHeads
from kvtool.runtime.stores import KVHeads
from kvtool.slices import stream_heads

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

SMALL = {"group": 16, "sink": 2, "window": 6, "context": 400, "tokens": 1024}
WORDS = [f"--{name}={value}" for name, value in SMALL.items()] + ["-q"]
IN_BLOCKS = ("--group", "--sink", "--window")
"""What says how tokens lie in blocks, which fp8 has not."""


@pytest.fixture(scope="module")
def llama(tiny):
    return Checkpoint.open(str(tiny("llama")))


def dense(checkpoint) -> Plan:
    base = base_of(checkpoint)
    return Plan(base, (LayerPlan((False,) * base.kv_heads),) * base.layers)


def calibrated(checkpoint, plan=None, budget=None, **options) -> Plan:
    asked = QuantizationOptions(**{**SMALL, **options})
    return calibrate_quantization(checkpoint, asked, plan or dense(checkpoint), budget, 2)


# --------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("kind", ["rotated", "unrotated"])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("hadamard", ["none", "values", "both"])
@pytest.mark.parametrize("kept", [None, 7])
def test_calibration_reads_what_the_store_reads(tiny, kind, axis, hadamard, kept):
    engine = Engine.load(Checkpoint.open(str(tiny("llama", rope_parameters=YARN))))
    rope, heads, size, count = engine._ropes[0], 2, 16, 5
    order = torch.stack([torch.randperm(size) for _ in range(heads)])
    values, clip = (2, 0.7) if kept is None else (16, 1.0)
    bits = Bits(3, values, 16, axis, kind, hadamard, None, 0.9, clip, sink=2, window=6, kept=kept)
    positions = Positions(rope, torch.empty(0))
    of = KVHeads(heads, size, torch.empty(0), 1.0)
    store = PackedHeads(of, 1, 100, bits, order, positions, dense_prompt=True)
    generator = torch.Generator().manual_seed(0)
    k, v, q = torch.randn(3, heads, 16 * count, size, generator=generator)
    store.pack(0, 0, (k, v))
    cos, sin = positions.tables(2, 2 + 16 * count)
    keys, values = read_keys(k, bits, order, cos, sin, rope.scale), read_values(v, bits)
    torch.testing.assert_close(
        store._scores(q[:, :4], 0, count), q[:, :4] @ keys.mT, rtol=1e-4, atol=1e-4
    )
    weights = torch.softmax(store._scores(q[:, :4], 0, count), dim=-1)
    nothing = torch.empty(heads, 0, size)
    found = store.attend(q[:, :4], (nothing, nothing), 0, bits.packed_at(count - 1))
    torch.testing.assert_close(found, weights @ values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_the_best_of_all_where_its_bytes_are_on_the_hull(seed):
    """Against all combinations; and a larger budget never takes a step back."""
    generator = torch.Generator().manual_seed(seed)
    costs = [[2, 3, 5, 9]] * 3
    losses = [(-torch.rand(4, generator=generator)).cumsum(0).tolist() for _ in range(3)]
    least = [0.0] * 3
    for budget in range(6, 28):
        chosen = choose(costs, losses, budget)
        spent = sum(cost[i] for cost, i in zip(costs, chosen, strict=True))
        lost = sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
        assert spent <= budget
        best = min(
            sum(loss[i] for loss, i in zip(losses, way, strict=True))
            for way in itertools.product(range(4), repeat=3)
            if sum(cost[i] for cost, i in zip(costs, way, strict=True)) <= spent
        )
        assert lost == pytest.approx(best)
        now = [cost[i] for cost, i in zip(costs, chosen, strict=True)]
        assert all(a >= b for a, b in zip(now, least, strict=True))
        least = now
    with pytest.raises(UsageError, match="the least that can be stored is 6"):
        choose(costs, losses, 5)


def test_bits_as_users_write_them():
    assert [parse_bits(x) for x in ("4", "K4V2", "k8v3", "auto")] == [(4, 4), (4, 2), (8, 3), None]
    for wrong in ("5", "K4", "V2K4", "16", "", "K4V1", "fp8"):
        with pytest.raises(UsageError, match="is not possible"):
            parse_bits(wrong)
    assert parse_tiers("4/2") == ((4, 4), (2, 2))
    assert parse_tiers("K8V4/K4V2") == ((8, 4), (4, 2))
    assert parse_tiers("3") == ((3, 3), None)
    for wrong in ("4/", "4/2/2", "auto/2", "4/auto", "/"):
        with pytest.raises(UsageError, match="is not possible"):
            parse_tiers(wrong)


@pytest.mark.parametrize(
    ("method", "bits", "words", "meant"),
    [
        ("aware", "4", {}, {}),
        ("aware", "auto", {"tokens": 9}, {"bits": None, "tokens": 9}),
        ("aware", "K4V2S8", {}, {"bits": (4, 2), "states": 8}),
        ("aware", "S4", {}, {"states": 4, "heads": False}),
        ("aware", "fp8", {}, {"method": "fp8", "bits": (8, 8), "window": 0}),
        ("aware", "fp8", {"window": 64}, {"method": "fp8", "bits": (8, 8), "window": 64}),
        ("kivi", "4", {}, {"sink": 0, "window": 128}),
        ("kivi", "4", {"sink": 4, "window": 0}, {"sink": 4, "window": 0}),
        ("rotatekv", "2", {}, {"bits": (2, 2), "read": "rebuilt"}),
        ("rotatekv", "2", {"read": "absorbed"}, {"bits": (2, 2), "read": "absorbed"}),
        ("zipcache", "4/2", {"salient": "25%"}, {"group": 128, "rest": (2, 2), "salient": 32}),
        ("mikv", "4/2", {"salient": "25%", "group": 64},
         {"group": 64, "rest": (2, 2), "salient": 16}),
        ("gear", "4", {"rank": 3}, {"rank": 3}),
    ],
)  # fmt: skip
def test_what_is_not_given_is_usual_with_the_method(method, bits, words, meant):
    expected = replace(QuantizationOptions(method), **meant)
    assert QuantizationOptions.asked(method, bits, **words) == expected


# -------------------------------------------------------------------------------- the methods


def measured(checkpoint, plan: Plan, windows) -> float:
    """Mean KL behind the ends of windows, through the cache."""
    found = []
    for ids in windows:
        said = []
        for engine in (Engine.load(checkpoint), Engine.load(checkpoint, plan=plan)):
            cache = engine.new_cache(1, len(ids))
            engine.extend(cache, ids[:-END])
            said.append(engine.extend(cache, ids[-END:], all_logits=True).log_softmax(-1))
        found.append(float(kl_divergence(*said).sum()) / END)
    return sum(found) / len(found)


@pytest.mark.parametrize("read", ["absorbed", "rebuilt"])
def test_the_harm_is_what_the_model_loses(llama, read):
    """Of 8 bits, whose errors are small, within a half; and fewer bits do more."""
    options = QuantizationOptions(**SMALL, bits=(8, 8), read=read)
    windows, _ = text_windows(llama, None, 1024, 0)
    offsets = [0] * len(windows)
    choices = offered(options.everywhere())
    harm = harms(llama, dense(llama), choices, windows, offsets, options.seed, lambda *_: None)
    at = next(i for i, x in enumerate(choices) if x.keys == 8 and x.hadamard == "none")
    plan = dense(llama)
    plan = replace(plan, layers=tuple(replace(x, bits=choices[at]) for x in plan.layers))
    lost = measured(llama, plan, windows)
    assert 0.5 * lost < float(harm[..., at].sum()) < 1.5 * lost
    plain = [i for i, x in enumerate(choices) if x.hadamard == "none" and x.key_clip == 1]
    widths = [float(harm[..., i].sum()) for i in plain]
    assert all(more > 2 * less for more, less in itertools.pairwise(widths))


def test_aware_spends_the_bytes_of_equal_bits_where_they_do_least_harm(llama):
    alike = calibrated(llama, method="kivi", bits=(3, 3))
    plan = calibrated(llama, bits=(3, 3))
    assert plan.cache_bytes(400, 2) <= alike.cache_bytes(400, 2)
    assert len({(x.bits.keys, x.bits.values) for x in plan.layers}) > 1
    assert [len(x) for x in plan.provenance[0]["harm"].values()] == [3, 3]
    windows, _ = text_windows(llama, None, 1024, 0)
    assert measured(llama, plan, windows) < measured(llama, alike, windows)


def test_two_bits_are_clipped_where_that_does_less_harm(llama):
    options = QuantizationOptions(**SMALL, bits=(2, 2))
    windows, offsets = text_windows(llama, None, 1024, 0)
    choices = offered(options.everywhere())
    asked = (llama, dense(llama), choices, windows, offsets, options.seed, lambda *_: None)
    harm = harms(*asked)
    two = [i for i, x in enumerate(choices) if x.keys == 2]
    plan = calibrated(llama, bits=(2, 2))
    for layer, (keys, values) in zip(plan.layers, harm, strict=True):
        best = [choices[min(two, key=lambda i: float(part[i]))] for part in (keys, values)]
        assert layer.bits.key_clip == best[0].key_clip
        assert (layer.bits.value_clip, layer.bits.hadamard) == (
            best[1].value_clip, best[1].hadamard,
        )  # fmt: skip
    assert min(layer.bits.value_clip for layer in plan.layers) < 1


def test_nothing_is_clipped_where_there_are_more_than_three_bits(llama):
    for bits, clipped in (((3, 3), True), ((4, 4), False)):
        layers = [layer.bits for layer in calibrated(llama, bits=bits).layers]
        least = min(min(x.key_clip, x.value_clip) for x in layers)
        assert (least < 1) == clipped


def test_a_budget_is_met(llama):
    native = dense(llama).native_bytes(400, 2)
    last = 0
    for share in (0.40, 0.45, 0.55):
        plan = calibrated(llama, budget=int(share * native), bits=None)
        size = plan.cache_bytes(400, 2)
        assert last < size <= share * native
        assert size > share * native - 0.05 * native
        last = size


@pytest.mark.parametrize("read", ["absorbed", "rebuilt"])
def test_rotatekv_orders_the_turned_channels_by_their_means(llama, read):
    plan = calibrated(llama, method="rotatekv", read=read)
    statistics = collect(llama, StatisticsOptions(tokens=1024, sinks=2))
    for index, layer in enumerate(plan.layers):
        sums = statistics.layer(index)
        mean = (sums.joint if read == "rebuilt" else sums.rotated_keys).mean[:32].float()
        turned = turn(mean.unflatten(0, (2, -1)))
        ordered = turned.gather(1, torch.tensor(layer.bits.order))
        assert (ordered.diff(dim=1) >= 0).all()
        assert (layer.bits.axis, layer.bits.hadamard) == ("token", "both")


def test_zipcache_and_mikv_divide_channels_by_what_the_text_showed(llama):
    statistics = collect(llama, StatisticsOptions(tokens=1024, sinks=2))
    zipcache, mikv = (calibrated(llama, method=x, rest=(2, 3)) for x in ("zipcache", "mikv"))
    for index, (zipped, mixed) in enumerate(zip(zipcache.layers, mikv.layers, strict=True)):
        sums = statistics.layer(index)
        expected = sums.joint.peak[32:].view(2, 16).sqrt()
        found = torch.tensor(zipped.bits.value_balance)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        queries = sums.rotated_queries.peak.view(2, -1, 16).amax(1)
        expected = (sums.rotated_keys.peak.view(2, 16) / queries).sqrt()
        found = torch.tensor(mixed.bits.key_balance)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        assert (zipped.bits.axis, mixed.bits.axis) == ("channel", "token")
        assert (zipped.bits.rest, mixed.bits.rest) == (Tier(7, 2, 3), Tier(8, 2, 3))
    assert calibrated(llama, method="mikv", salient=3).layers[0].bits.rest == Tier(13, 2, 2)


def test_gear_holds_what_the_codes_leave_out(llama):
    """At the rank of a block nearly all of it; and each rank more brings the model nearer."""
    windows, _ = text_windows(llama, None, 1024, 0)
    lost = [
        measured(llama, calibrated(llama, method="gear", bits=(2, 2), rank=rank), windows[:2])
        for rank in (1, 4, 16)
    ]
    assert lost[0] > 1.5 * lost[1] > 100 * lost[2]
    assert calibrated(llama, method="gear").layers[0].bits == Bits(
        4, 4, 16, sink=2, window=6, rank=2
    )


def test_mustafar_keeps_a_share_of_each_value(llama):
    """The smaller it is, the more is lost."""
    windows, _ = text_windows(llama, None, 1024, 0)
    plans = [calibrated(llama, method="mustafar", bits=(8, 8), kept=kept) for kept in (16, 8, 2)]
    lost = [measured(llama, plan, windows[:2]) for plan in plans]
    assert 4 * lost[0] < lost[1] < lost[2] / 4
    assert plans[1].layers[0].bits == Bits(8, 16, 16, sink=2, window=6, kept=8)
    assert (plans[1].provenance[0]["corpus"], plans[1].provenance[0]["tokens"]) == (None, 0)
    with pytest.raises(UsageError, match="keeps some numbers of each value"):
        calibrated(llama, method="mustafar")


@pytest.mark.parametrize("scales", ["head", "tensor"])
def test_fp8_has_the_scales_that_a_conversion_writes_and_takes_those_of_its_output(
    converted, scales
):
    """And so it predicts what a stock model does that reads everything from an fp8 cache."""
    source, output = (
        Checkpoint.open(str(x)) for x in converted("llama", {}, to="fp8-kv", scales=scales)
    )
    asked = {"method": "fp8", "bits": (8, 8), "window": 0}
    own, taken = calibrated(source, **asked), calibrated(output, **asked)
    for index, (measured_, read) in enumerate(zip(own.layers, taken.layers, strict=True)):
        written = [x.flatten() for x in stored_scales(output, index)]
        for expected, name in zip(written, ("keys", "values"), strict=True):
            found, told = (torch.tensor(getattr(x.scales, name)) for x in (measured_, read))
            assert torch.equal(told, expected.expand(2))
            if scales == "tensor":
                found = found.amax(dim=0, keepdim=True)
            assert torch.equal(found, expected)
    (said,) = taken.provenance
    assert (said["method"], said["scales"], said["corpus"]) == ("fp8", "of the checkpoint", None)

    ids, stock = random_ids(400), output.load_transformers(torch.float32)
    with torch.inference_mode():
        exact = stock(ids[None]).logits[0, -20:].log_softmax(-1)
        cache = Fp8Cache.of(output)
        engines = stock(ids[None], **{cache_argument(): cache}).logits[0, -20:].log_softmax(-1)
    engine = Engine.load(output, plan=replace(taken, prefill="streamed"))
    store = engine.new_cache(1, 400)
    engine.extend(store, ids[:380])
    found = engine.extend(store, ids[380:], all_logits=True).log_softmax(-1)
    assert float(kl_divergence(engines, found).sum()) < 0.002 * float(
        kl_divergence(exact, found).sum()
    )


def test_a_head_whose_values_are_all_zero_has_any_scale(llama):
    found = SimpleNamespace(
        sinks={
            "rotated_keys": SimpleNamespace(peak=torch.zeros(32)),
            "joint": SimpleNamespace(peak=torch.zeros(64)),
        },
        rotated_keys=SimpleNamespace(peak=torch.full((32,), 448.0)),
        joint=SimpleNamespace(peak=torch.tensor([9.0] * 48 + [0.0] * 16)),
    )
    scales = fp8_scales.measured(found, base_of(llama), 0)
    assert scales.keys == (1.0, 1.0)
    assert scales.values == pytest.approx([9 / 448, 1.0])


def test_another_slice_of_a_plan_has_every_head_in_fp8(llama):
    """Also in layers that had none that kept everything."""
    heads = (LayerPlan((True, True), 3, 8), LayerPlan((True, False), 3, 8), LayerPlan((False,) * 2))
    plan = replace(dense(llama), layers=heads, scores=torch.arange(6.0).view(3, 2))
    found = calibrated(llama, plan, method="fp8", bits=(8, 8), window=0)
    whole = stream_heads(found, 0, 3, 8)
    assert whole.cache_bytes(64, 2) == 3 * 2 * 2 * 16 * 64
    assert found.cache_bytes(64, 2) == 3 * 2 * 16 * 64 + 3 * 2 * 2 * 16 * 11
    Engine.load(llama, plan=found).new_cache(1, 64)


def test_scales_that_are_none_are_refused(converted, tmp_path, capsys):
    output = converted("llama", {}, to="fp8-kv")[1]
    name = "model.layers.1.self_attn.k_scale"
    for number, damage in enumerate((
        lambda x: x[name].fill_(0.0), lambda x: x.update({name: torch.ones(3)}),
    )):  # fmt: skip
        bad = edited_copy(output, tmp_path / f"{number}", damage)
        assert quantize(str(bad), tmp_path / "p", "--bits", "fp8") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "scales for fp8 that are not one number above 0 for a layer, or 2 for" in said
    bad = edited_copy(output, tmp_path / "gone", lambda x: x.pop(name))
    assert quantize(str(bad), tmp_path / "p", "--bits", "fp8") == 1
    assert f"does not hold {name}" in " ".join(capsys.readouterr().err.split())


def test_a_balance_saves_the_codes_of_small_channels(llama):
    """Keys with a channel 100 times the others, that queries hardly ask for."""
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 1, 16, 16, generator=generator)
    k[..., 3] *= 100
    q[..., 3] /= 100
    factors = (k.abs().amax(1) / q.abs().amax(1)).sqrt()[:, None]
    rope = Positions(Engine.load(llama)._ropes[0], torch.empty(0))
    errors = []
    for balance in (None, factors):
        store = PackedHeads(
            KVHeads(1, 16, torch.empty(0), 1.0), 1, 100, Bits(4, 4, 16, "token"), None, rope,
            dense_prompt=True, balances=(balance, balance),
        )  # fmt: skip
        store.pack(0, 0, (k, k))
        errors.append(float((store._scores(q, 0, 1) - q @ k.mT).square().mean()))
        sums = store._sums(torch.eye(16)[None], 0, 1)
        read = sums if balance is None else sums * balance
        assert (read - k).abs().max() < 20
    assert errors[1] < errors[0] / 50


def test_heads_that_stream_stay_as_they_are(llama):
    streaming = ((True, False), (False, False), (True, True))
    heads = replace(dense(llama), layers=tuple(LayerPlan(x, 2, 8) for x in streaming))
    heads = replace(heads, provenance=({"method": "ablation"},))
    plan = calibrated(llama, heads)
    assert [x.streaming for x in plan.layers] == list(streaming)
    assert [x.bits is not None for x in plan.layers] == [True, True, False]
    assert [x["method"] for x in plan.provenance] == ["ablation", "aware"]
    engine = Engine.load(llama, plan=plan)
    assert engine.new_cache(1, 400).allocated_bytes == plan.cache_bytes(400, 4)
    assert plan.cache_bytes(400, 2) < heads.cache_bytes(400, 2)


def test_codes_get_bits_and_read_as_before_without_them(llama):
    made = ProjectionOptions(read="rebuilt", together=2, sink=2, window=6, context=400, tokens=1024)
    native = dense(llama).native_bytes(400, 2)
    codes = calibrate_projections(llama, made, int(0.5 * native), 2)
    plan = calibrated(llama, codes, bits=(4, 4))
    assert [x["method"] for x in plan.provenance] == ["aware", "aware"]
    alike = replace(codes, codes=tuple(replace(x, bits=4) for x in codes.codes))
    assert plan.cache_bytes(400, 2) <= alike.cache_bytes(400, 2)
    engine = Engine.load(llama, plan=plan)
    assert engine.new_cache(1, 400).allocated_bytes == plan.cache_bytes(400, 4)
    exact = replace(plan, codes=tuple(replace(x, bits=None) for x in plan.codes))
    ids = random_ids(60)
    found = [
        Engine.load(llama, plan=x).extend(Engine.load(llama, plan=x).new_cache(1, 60), ids)
        for x in (codes, exact)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    small = calibrated(llama, codes, budget=int(0.3 * native), bits=None)
    assert small.cache_bytes(400, 2) <= 0.3 * native
    with pytest.raises(UsageError, match="has bits already"):
        calibrated(llama, plan)
    with pytest.raises(UsageError, match="--bits fp8 is for keys and values, and the plan of"):
        calibrated(llama, codes, method="fp8", bits=(8, 8))


# ------------------------------------------------------------------------------- the command


def quantize(model, output, *words):
    fp8 = any(word.startswith("fp8") for word in words)
    given = [x for x in WORDS if not fp8 or not x.startswith(IN_BLOCKS)]
    return run_command(["calibrate", "quantization", model, "-o", str(output), *given, *words])


def test_the_command_writes_a_plan_that_runs(llama, tmp_path, capsys):
    path = tmp_path / "p"
    for words in (["--bits", "3"], ["--bits", "K4V2", "--method", "kivi", "--overwrite"]):
        assert quantize(llama.source, path, *words, "--json") == 0
        said = json.loads(capsys.readouterr().out)
        plan = Plan.read(path)
        assert said["bytes"] == plan.cache_bytes(400, 2)
        assert said["layers"][0]["bits"]["values"] == plan.layers[0].bits.values
    assert run_command(["plan", "show", str(path), "--context", "400"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "bits of keys 4 bits of values 2" in shown
    assert "exact the first 2 and at least the last 6 tokens" in shown
    command = ["generate", llama.source, "some text " * 30, "--plan", str(path)]
    assert run_command([*command, "--max-new-tokens", "4", "--json", "-q"]) == 0


def test_how_prompts_are_read_is_that_of_the_plan_before_unless_it_is_said(llama, tmp_path, capsys):
    said, none = ["--bits", "3", "--prefill"], ["--bits", "3"]
    path, other = tmp_path / "p", tmp_path / "q"
    for words, prefill in (
        (none, "dense"), ([*said, "streamed"], "streamed"), (["--bits", "fp8"], "streamed"),
        (["--bits", "fp8", "--prefill", "dense"], "dense"),
    ):  # fmt: skip
        assert quantize(llama.source, path, *words, "--overwrite") == 0
        assert Plan.read(path).prefill == prefill
    command = ["calibrate", "projections", llama.source, "-o", str(path), "--overwrite"]
    small = ["--tokens", "1024", "--method", "cskv", "--sink", "2", "--window", "6"]
    size = ["--context", "400", "--kv-budget", "60%"]
    assert run_command([*command, *small, *size, "--prefill", "streamed"]) == 0
    for words, prefill in ((none, "streamed"), ([*said, "dense"], "dense")):
        words = [*words, "--plan", str(path), "--overwrite"]
        assert quantize(llama.source, other, *words) == 0, capsys.readouterr().err
        assert Plan.read(other).prefill == prefill


@pytest.mark.parametrize(
    ("words", "methods", "shown"),
    [
        (["zipcache"], "zipcache", "bits of keys 4/2 bits of values 4/2 tiers 9 of 16 tokens"),
        (["gear", "--bits", "2", "--rank", "3"], "gear",
         "bits of keys 2 bits of values 2 stored a scale and a minimum (4 bytes) for 16 numbers "
         "of a channel factors of rank 3, of what the codes leave out"),
        (["mustafar", "--bits", "8", "--sparsity", "70%"], "mustafar",
         "bits of keys 8 bits of values 16 kept the 5 numbers of largest magnitude, and a bitmap"),
        (["mustafar"], "mustafar",
         "bits of keys 4 bits of values 16 kept the 8 numbers of largest magnitude, and a bitmap"),
        (["aware", "--bits", "fp8"], "fp8",
         "fp8 (e4m3) 3 layers: every number of the heads that keep everything"),
        (["aware", "--bits", "fp8", "--window", "5"], "fp8", "exact the last 5 tokens as well"),
        (["mikv", "--bits", "K8V4/4", "--salient", "25%"], "mikv",
         "bits of keys 8/4 bits of values 4/4 tiers 4 of 16 tokens"),
    ],
)  # fmt: skip
def test_plans_of_other_methods_are_shown_and_run(llama, tmp_path, capsys, words, methods, shown):
    path = tmp_path / "p"
    assert quantize(llama.source, path, "--method", *words, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["bytes_at_most"]
    assert quantize(llama.source, path, "--method", *words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["methods"] == [methods]
    assert said["bytes"] == planned == Plan.read(path).cache_bytes(400, 2)
    assert run_command(["plan", "show", str(path), "--context", "400"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    streams = "streamed" if methods == "fp8" else "dense"
    assert f"method {methods} prefill {streams}" in text
    assert shown in text
    command = ["generate", llama.source, "some text " * 30, "--plan", str(path)]
    assert run_command([*command, "--max-new-tokens", "4", "--json", "-q"]) == 0


def test_a_dry_run_knows_the_bytes(llama, tmp_path, capsys):
    assert quantize(llama.source, tmp_path / "p", "--bits", "3", "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "p").exists()
    assert quantize(llama.source, tmp_path / "p", "--bits", "3") == 0
    assert Plan.read(tmp_path / "p").cache_bytes(400, 2) <= said["bytes_at_most"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--bits", "5"], 2, "--bits 5 is not possible"),
        (["--bits", "auto"], 2, "come together"),
        (["--kv-budget", "20%"], 2, "come together"),
        (["--bits", "auto", "--kv-budget", "1%"], 2, "with 2 bits everywhere, the cache takes"),
        (["--bits", "auto", "--kv-budget", "50%", "--method", "kivi"], 2, "for --method aware"),
        (["--bits", "4/2"], 2, "the same bits for all tokens"),
        (["--method", "kivi", "--salient", "50%"], 2, "the same bits for all tokens"),
        (["--method", "kivi", "--rank", "2"], 2, "--method kivi has no factors"),
        (["--method", "gear", "--rank", "20"], 2, "no factors of rank 20"),
        (["--method", "kivi", "--sparsity", "50%"], 2, "kivi keeps all numbers of a value"),
        (["--method", "mustafar", "--sparsity", "100%"], 2, "so --sparsity is below 100%"),
        (["--method", "mustafar", "--sparsity", "half"], 2, "neither a share such as 50%"),
        (["--method", "mustafar", "--bits", "K4V2"], 2, "--bits are those of keys, such as 4"),
        (["--bits", "4/2/2", "--method", "mikv"], 2, "two tiers have bits such as 4/2"),
        (["--salient", "100%", "--method", "mikv"], 2, "must be some and not all"),
        (["--read", "rebuilt", "--method", "zipcache"], 2, "lie out of order"),
        (["--group", "0"], 2, "share a scale by 16, 32, 64 or 128, not by 0"),
        (["--bits", ""], 2, "is not possible"),
        (["--bits", "2/4", "--method", "zipcache"], 2, "more attention fewer bits"),
        (["--bits", "fp8", "--method", "kivi"], 2, "--bits fp8 is a method of its own"),
        (["--bits", "fp8/4"], 2, "fp8 for all tokens, keys and values alike"),
        (["--bits", "K4Vfp8"], 2, "fp8 for all tokens, keys and values alike"),
        (["--bits", "fp8", "--kv-budget", "50%"], 2, "come together"),
        (["--bits", "fp8", "--salient", "50%"], 2, "--bits fp8 has the same bits for all tokens"),
        (["--bits", "fp8", "--rank", "2"], 2, "--bits fp8 has no factors"),
        (["--bits", "fp8", "--sparsity", "50%"], 2, "--bits fp8 keeps all numbers of a value"),
        (["--bits", "fp8", "--read", "rebuilt"], 2, "stores every token alike, and has no --read"),
        (["--bits", "fp8", "--sink", "4"], 2, "stores every token alike"),
        (["--bits", "fp8S8"], 2, "no layer of"),
        (["--window", "512"], 2, "tokens exactly, more than the 512 positions of"),
        (["--bits", "fp8", "--window", "513"], 2, "--window: layer 0 keeps 513 tokens exactly"),
        (["--sink", "5000"], 2, "--sink, --window and --group: layer 0 keeps"),
        (["--sink", "491"], 2, "keeps 513 tokens exactly, more than the 512 positions of"),
        (["--group", "48"], 2, "share a scale by 16, 32, 64 or 128, not by 48"),
        (["--tokens", "3"], 2, "less than one window"),
        (["--plan", "nowhere"], 3, "no such file"),
    ],
)
def test_bad_input_ends_in_a_sentence(llama, tmp_path, capsys, words, code, message):
    assert quantize(llama.source, tmp_path / "p", *words) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "p").exists()


def test_a_plan_whose_rings_have_no_room_is_refused_before_it_is_packed(llama, tmp_path, capsys):
    base = base_of(llama)
    layer = LayerPlan((True,) + (False,) * (base.kv_heads - 1), 0, 513)
    Plan(base, (layer,) * base.layers).write(tmp_path / "heads")
    words = ("--plan", str(tmp_path / "heads"), "--method", "kivi", "--dry-run")
    assert quantize(llama.source, tmp_path / "p", *words) == 3
    assert "layer 0 keeps 513 tokens exactly" in capsys.readouterr().err


def test_sinks_that_fill_the_windows_that_are_measured_are_refused():
    bits = Bits(4, 4, group=16, sink=2033, window=8)
    with pytest.raises(UsageError, match="leaves no block of 16 in the windows of 2048 tokens"):
        bits.check_windows(2048)
    bits.check_windows(2049)


def test_plans_that_leave_nothing_to_pack_are_refused(llama, tmp_path, capsys):
    base = base_of(llama)
    streams = LayerPlan((True,) * base.kv_heads, 2, 8)
    Plan(base, (streams,) * base.layers).write(tmp_path / "heads")
    assert quantize(llama.source, tmp_path / "p", "--plan", str(tmp_path / "heads")) == 2
    assert "no head keeps everything" in capsys.readouterr().err
    calibrated(llama, method="kivi").write(tmp_path / "bits")
    assert quantize(llama.source, tmp_path / "p", "--plan", str(tmp_path / "bits")) == 2
    assert "has bits already" in capsys.readouterr().err
