"""Packed states: what rounding at chunks gives, the same however tokens arrive, planned bytes."""

import json
from dataclasses import replace

import pytest
import torch
from _convert_tools import one_thread
from _hybrid_tools import write_hybrid
from _packed import assert_same, logits

from kvtool.bits import Bits
from kvtool.calibrate.bit_options import QuantizationOptions
from kvtool.calibrate.quantization import everything, with_states
from kvtool.calibrate.receptive_field import thresholds
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.errors import PlanError
from kvtool.evaluate.protocol import cache_size
from kvtool.kernels.quantise import dequantise_rows, quantise_rows
from kvtool.kernels.ssd import ssd_recurrence
from kvtool.mamba import Past, Projected
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.recurrent import RuntimeMixer
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.slices import compose

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

IDS = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(3))
CHUNKS = (1, 5, 8)


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    """A hybrid with mixers in layers 0 and 2 of 3."""
    path = tmp_path_factory.mktemp("hybrid")
    write_hybrid(tiny("llama"), path, [0, 2])
    return Checkpoint.open(str(path))


def planned(checkpoint, bits=8, chunk=8, heads: Bits | None = None) -> Plan:
    plan = with_states(everything(checkpoint, base_of(checkpoint), QuantizationOptions()), bits)
    layers = tuple(
        replace(x, bits=heads) if x.kept is None else replace(x, kept=replace(x.kept, chunk=chunk))
        for x in plan.layers
    )
    return replace(plan, layers=layers)


# --------------------------------------------------------------------------------- the codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e20])
def test_a_row_is_read_to_half_a_step_at_any_size(bits, size):
    x = size * torch.randn(3, 5, 13, generator=torch.Generator().manual_seed(0))
    x[1, 2] = 0
    codes, scales = quantise_rows(x, bits)
    read = dequantise_rows(codes, scales, 13, bits)
    assert codes.shape[-1] == (13 if bits == 8 else 7)
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((read - x).abs() <= 0.505 * step).all()  # a scale has 8 bits, and is rounded up
    assert (read[1, 2] == 0).all()
    again, other = quantise_rows(read, bits)
    torch.testing.assert_close(dequantise_rows(again, other, 13, bits), read, rtol=0.01, atol=0)


# --------------------------------------------------------------------------------- the store


def reference(checkpoint, plan: Plan, ids):
    """Logits where the state is rounded behind every whole chunk of the text, written out."""
    engine = Engine.load(checkpoint)
    for attention, layer in zip(engine.attentions, plan.layers, strict=True):
        if not isinstance(attention, RuntimeMixer):
            continue

        def attend(hidden, step, store, stages=attention.stages, kept=layer.kept):
            z, new = stages.project(hidden)
            past, parts = None, []
            pieces = zip(*(x.split(kept.chunk, dim=1) for x in new), strict=True)
            for piece in pieces:
                y, past = stages.scan(Projected(*piece), past)
                codes, scales = quantise_rows(past.state, kept.bits)
                past = Past(past.conv, dequantise_rows(codes, scales, kept.state, kept.bits))
                parts.append(y)
            return stages.out_proj(stages.gate(torch.cat(parts, dim=1), z))

        attention.attention = attend
    return logits(engine, ids, len(ids))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_state_is_rounded_behind_every_chunk_and_nowhere_else(hybrid, bits, chunk):
    plan = planned(hybrid, bits, chunk)
    expected = reference(hybrid, plan, IDS)
    exact = logits(Engine.load(hybrid), IDS, 90)
    engine = Engine.load(hybrid, plan=plan)
    for pieces in ((90,), (1,), (3, 1, 2, 60, 24), (40, 50)):
        assert_same(logits(engine, IDS, *pieces), expected)
    assert (expected - exact).abs().max() > 1e-3  # the packing is seen
    torch.testing.assert_close(expected[:chunk], exact[:chunk], rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_do_not_disturb_each_other(hybrid):
    engine = Engine.load(hybrid, plan=planned(hybrid, 4))
    cache = engine.new_cache(2, 90)
    engine.extend(cache, IDS[:40], 0)
    engine.extend(cache, IDS[:13], 1)
    more = IDS[40:60]
    both = torch.stack([engine.decode(cache, token.expand(2)) for token in more])
    for row, start in enumerate((40, 13)):
        alone = engine.new_cache(1, 90)
        engine.extend(alone, IDS[:start])
        assert_same(both[:, row], engine.extend(alone, more, all_logits=True))


def test_a_row_that_starts_over_remembers_nothing(hybrid):
    engine = Engine.load(hybrid, plan=planned(hybrid))
    cache = engine.new_cache(1, 90)
    engine.extend(cache, IDS[20:])
    cache.crop(0, 30)
    assert cache.lengths == [0]
    again = engine.extend(cache, IDS, all_logits=True)
    torch.testing.assert_close(again, logits(engine, IDS, 90), rtol=0, atol=0)


def test_a_snapshot_is_where_it_was(hybrid):
    engine = Engine.load(hybrid, plan=planned(hybrid, 4))
    cache = engine.new_cache(1, 90)
    engine.extend(cache, IDS[:43])
    saved = cache.snapshot(0)
    expected = engine.extend(cache, IDS[43:60], all_logits=True)
    cache.restore(0, saved)
    assert torch.equal(engine.extend(cache, IDS[43:60], all_logits=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_are_the_planned_ones(hybrid, dtype):
    item = dtype.itemsize
    for bits, chunk, heads in (
        (8, 8, None),
        (4, 1, None),
        (8, 5, Bits(4, 3, 16, sink=3, window=5)),
    ):
        plan = planned(hybrid, bits, chunk, heads)
        engine = Engine.load(hybrid, dtype=dtype, plan=plan)
        for tokens in (1, 64, 300):
            assert engine.new_cache(1, tokens).allocated_bytes == plan.cache_bytes(tokens, item)
        assert (
            plan.native_bytes(64, item)
            == Engine.load(hybrid, dtype=dtype).new_cache(1, 64).allocated_bytes
        )
        size = cache_size(engine)
        assert size.bytes_per_token_bf16 == plan.bytes_per_token(2)
        memory = RowMemory(engine)
        for tokens in (64, 128):
            assert memory.holding(tokens, tokens) == plan.cache_bytes(tokens, item)
    # 4 heads of 16 x 16: int8 and a scale per row; 7 tokens of x, B and Δ; conv of x, B and C.
    kept = planned(hybrid).layers[0].kept
    assert kept.cache_bytes(999, 2) == 4 * 16 * (16 + 2) + 7 * (2 * 64 * 2 + 4 * 4) + 3 * 3 * 64 * 2


def test_requests_that_are_served_together_answer_as_alone(hybrid):
    plan = planned(hybrid, 8, 8, Bits(4, 4, 16, sink=3, window=5))
    engine = Engine.load(hybrid, plan=plan)
    prompts = [IDS.tolist(), IDS[:31].tolist(), IDS[5:60].tolist()]

    def run(*ids):
        scheduler = Scheduler(engine, 10**8, piece=16)
        requests = [Request(x, 12, ignore_eos=True) for x in ids]
        for request in requests:
            scheduler.add(request)
        while not scheduler.idle:
            scheduler.step()
            rows = scheduler._rows()
            assert scheduler.used == sum(row.cache.allocated_bytes for row in rows)
        return [request.tokens for request in requests]

    assert run(*prompts) == [run(x)[0] for x in prompts]


# ---------------------------------------------------------------------------------- the plan


def test_a_plan_comes_back_from_its_file(hybrid, tmp_path):
    plan = planned(hybrid, 4, 5, Bits(4, 3))
    plan.write(tmp_path / "a.plan")
    read = Plan.read(tmp_path / "a.plan")
    assert (read.layers, read.base) == (plan.layers, plan.base)
    engine = Engine.load(hybrid, plan=read)
    assert engine.new_cache(1, 64).allocated_bytes == plan.cache_bytes(64, 4)


def test_plans_that_do_not_fit_are_refused(hybrid, tiny):
    plan = planned(hybrid)
    for change, message in (
        ({"bits": 5}, "states have numbers of 4 or 8 bits, not of 5"),
        ({"chunk": 0}, "cannot be packed every 0 tokens"),
        ({"groups": 3}, "do not divide"),
        ({"state": 0}, "without any number"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(plan.layers[0].kept, **change)
    with pytest.raises(PlanError, match="no KV heads to plan"):
        replace(plan.layers[0], bits=Bits(4, 4))
    wide = replace(plan.layers[0], kept=replace(plan.layers[0].kept, state=32))
    with pytest.raises(PlanError, match=r"layer 0 .* has a state of another kind"):
        Engine.load(hybrid, plan=replace(plan, layers=(wide, *plan.layers[1:])))
    moved = (plan.layers[1], plan.layers[0], plan.layers[2])
    with pytest.raises(PlanError, match="keeps states, and the plan is for KV heads"):
        Engine.load(hybrid, plan=replace(plan, layers=moved))
    with pytest.raises(PlanError, match="made for"):
        Engine.load(Checkpoint.open(str(tiny("llama"))), plan=plan)


# ------------------------------------------------------------------------------- the command


def command(hybrid, output, *words):
    options = ["--tokens", "1024", "--context", "256", "--sink", "3", "--window", "5", "-q"]
    return run_command(
        ["calibrate", "quantization", hybrid.source, "-o", str(output), *options, *words]
    )


def test_the_command_writes_a_plan_that_runs(hybrid, tmp_path, capsys):
    path = tmp_path / "p"
    for words, heads, states in (
        (["--bits", "S8"], None, 8),
        (["--bits", "K4V2S4", "--method", "kivi", "--group", "16"], 4, 4),
        (["--bits", "8", "--group", "16"], 8, 8),
    ):
        assert command(hybrid, path, *words, "--overwrite", "--json") == 0
        said, plan = json.loads(capsys.readouterr().out), Plan.read(path)
        assert said["bytes"] == plan.cache_bytes(256, 2)
        assert said["native_bytes"] == plan.native_bytes(256, 2)
        assert said["native_bytes_per_token"] == 2 * 2 * 16 * 2  # of one layer: states do not grow
        assert [x.kept.bits for x in plan.layers if x.kept] == [states] * 2
        bits = plan.layers[1].bits
        assert heads == (bits and bits.keys)
    assert run_command(["plan", "show", str(path), "--context", "400"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 layers: 8 bits, packed every 8 tokens" in shown
    generate = ["generate", hybrid.source, "some text " * 30, "--plan", str(path)]
    assert run_command([*generate, "--max-new-tokens", "4", "--json", "-q"]) == 0


def test_a_budget_counts_the_states(hybrid, tmp_path, capsys):
    words = ["--bits", "auto", "--kv-budget", "90%", "--group", "16"]
    assert command(hybrid, tmp_path / "p", *words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] <= 0.9 * said["native_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "S3"], "states have 4 or 8 bits"),
        (["--bits", "auto", "--kv-budget", "1%"], "with 2 bits everywhere, the cache takes"),
    ],
)
def test_bad_input_ends_in_a_sentence(hybrid, tmp_path, capsys, words, message):
    assert command(hybrid, tmp_path / "p", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bits_of_states_are_refused_where_there_are_none(tiny, tmp_path, capsys):
    words = [str(tiny("llama")), "-o", str(tmp_path / "p"), "--bits", "S8"]
    assert run_command(["calibrate", "quantization", *words]) == 2
    assert "keeps a state" in capsys.readouterr().err


# --------------------------------------------------------------------------- receptive fields


def far_seeing(checkpoint, taught=20, least=(0.7, 0.0, 0.75, 0.0), bits=None) -> Plan:
    """Thresholds for two of the four heads of each state."""
    plan = everything(checkpoint, base_of(checkpoint), QuantizationOptions())
    if bits:
        plan = with_states(plan, bits)
    layers = (
        x if x.kept is None else replace(x, kept=replace(x.kept, taught=taught, least=least))
        for x in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def test_behind_what_was_taught_heads_pass_over_tokens_of_small_steps(hybrid):
    plan = far_seeing(hybrid)
    kept = plan.layers[0].kept
    engine, passed = Engine.load(hybrid), []
    for attention in engine.attentions:
        if isinstance(attention, RuntimeMixer):

            def attend(hidden, step, store, stages=attention.stages):
                z, new = stages.project(hidden)
                x, dt, b, c, _ = stages.convolve(new, None)
                late = torch.arange(len(IDS)) >= kept.taught
                over = late[None, :, None] & (dt < torch.tensor(kept.least))
                passed.append(float(over.float().mean()))
                y, _ = ssd_recurrence(x, dt.masked_fill(over, 0), stages.decay, b, c)
                return stages.out_proj(stages.gate(stages.skip(y, x), z))

            attention.attention = attend
    expected = logits(engine, IDS, 90)
    assert all(0.05 < share < 0.6 for share in passed)
    found = Engine.load(hybrid, plan=plan)
    for pieces in ((90,), (1,), (15, 30)):
        torch.testing.assert_close(logits(found, IDS, *pieces), expected, rtol=1e-4, atol=1e-4)
    plain = logits(Engine.load(hybrid), IDS, 90)
    torch.testing.assert_close(expected[:20], plain[:20], rtol=1e-4, atol=1e-4)
    assert (expected - plain)[20:].abs().max() > 1e-3
    caches = [found.new_cache(1, 90) for _ in range(2)]  # with spare rows
    for cache in caches:
        found.extend(cache, IDS[:60])
    steps = [found.decode_rows(caches, [int(token)] * 2)[1] for token in IDS[60:]]
    torch.testing.assert_close(torch.stack(steps), expected[60:], rtol=1e-4, atol=1e-4)


def test_thresholds_let_steps_add_up_to_what_was_taught():
    steps = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0))
    rates = torch.tensor([-1e-3, -1e-3, -1.0])  # the last forgets within tokens
    least = thresholds(steps, rates, taught=1000, length=4000)
    assert least[2] == 0
    for head in (0, 1):
        own = steps[:, head]
        kept = own[own >= least[head]].sum() / own.sum()
        assert kept == pytest.approx(0.25, abs=0.01)
    assert (thresholds(steps, rates, 1000, 1001)[:2] < 0.05).all()


def test_the_command_plans_receptive_fields_beside_bits(hybrid, tiny, tmp_path, capsys):
    bits, path = tmp_path / "bits", tmp_path / "p"
    assert command(hybrid, bits, "--bits", "S8") == 0
    words = ["calibrate", "receptive-field", hybrid.source, "-o", str(path), "--tokens", "1024"]
    assert run_command([*words, "--length", "400", "-q"]) == 2
    assert "does not say with how long texts it was taught" in capsys.readouterr().err
    assert run_command([*words, "--length", "400", "--taught", "500", "-q"]) == 2
    assert "is not beyond the 500" in capsys.readouterr().err
    without = [*words[:2], str(tiny("llama")), *words[3:]]
    assert run_command([*without, "--length", "400", "-q"]) == 4
    assert "no layer of" in capsys.readouterr().err
    words += ["--length", "400", "--taught", "2", "--plan", str(bits), "-q"]
    assert run_command([*words, "--dry-run", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert not path.exists()
    assert run_command(words) == 0
    plan = Plan.read(path)
    assert foreseen["bytes"] == plan.cache_bytes(400, 2) < plan.native_bytes(400, 2)
    assert foreseen["native_bytes"] == plan.native_bytes(400, 2)
    assert foreseen["memory_bytes"] >= 4 * hybrid.parameters
    heads = sum(x > 0 for layer in plan.layers if layer.kept for x in layer.kept.least)
    assert plan.provenance[-1]["global_heads"] == heads > 0
    assert [x.kept.bits for x in plan.layers if x.kept] == [8, 8]
    assert f"{heads} heads pass tokens over behind 2 tokens" in capsys.readouterr().out
    Engine.load(hybrid, plan=plan)
    for change in ({"taught": None}, {"least": (1.0,)}):
        with pytest.raises(PlanError, match="threshold"):
            replace(plan.layers[0].kept, **change)


def test_bits_of_states_are_not_lost(hybrid):
    few = planned(hybrid, 4, 16)
    assert with_states(few, None).layers == few.layers
    assert {x.kept.bits for x in with_states(few, 8).layers if x.kept is not None} == {8}
    plain = everything(hybrid, base_of(hybrid), QuantizationOptions())
    assert {x.kept.bits for x in with_states(plain, None).layers if x.kept is not None} == {8}
    with pytest.raises(PlanError, match="same states"):
        compose(plain, few)
