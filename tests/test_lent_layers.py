"""A layer that others read may pack what it keeps: they read that, and write nothing."""

from dataclasses import replace

import pytest
import torch
from _code_tools import coded
from _convert_tools import convert, one_thread
from _family_cases import CASES
from _family_tools import logits, open_case, relative_error, tokens
from _packed import (
    TOKENS,
    check_arrival,
    check_prompt_in_pieces,
    check_rows,
    check_snapshot,
)
from torch import Tensor

from kvtool.bits import Bits, Tier
from kvtool.calibrate import far_reads
from kvtool.calibrate.bit_options import FP8, QuantizationOptions
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.quantization import calibrate_quantization, everything
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.divergence import kl_divergence
from kvtool.errors import PlanError
from kvtool.evaluate.layers import layer_damage
from kvtool.evaluate.protocol import bf16_bytes, cache_size
from kvtool.fp8 import Scales, stored_scales
from kvtool.kernels.quantise import dequantise
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.layers import Step
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.sharing import SharedPlan

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

NAME, LENDER, READERS = "gemma4_text, shared", 3, (5, 7)  # with the whole past; 1 reads its own
PLAIN = Bits(4, 4, 16, sink=3, window=5)
BITS = {
    "plain": PLAIN,
    "turned": replace(PLAIN, keys=8, values=3, hadamard="values"),
    "no sinks": replace(PLAIN, sink=0, window=1),
    "rebuilt": replace(PLAIN, kind="unrotated", axis="token", hadamard="both"),
    "two tiers": replace(PLAIN, rest=Tier(8, 2, 2)),
    "factors": replace(PLAIN, rank=2),
    "sparse values": replace(PLAIN, values=16, kept=12),
}
SCALES = Scales((0.01, 0.02), (0.02, 0.01))
HOW = {
    **{name: {"bits": bits} for name, bits in BITS.items()},
    "fp8": {"scales": SCALES},
    "fp8, window": {"scales": replace(SCALES, window=6)},
}
every_way = pytest.mark.parametrize("how", HOW)


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return open_case(tiny, NAME)


def lending(checkpoint: Checkpoint, how: str, prefill: str = "dense", *, alone=False) -> Plan:
    """All that can be packed is; `alone`: what other layers read, and nothing else."""
    layers = [
        replace(layer, **HOW[how]) if layer.heads and not (alone and layer.kept is None) else layer
        for layer in whole_layers(checkpoint)
    ]
    return Plan(base_of(checkpoint), tuple(layers), prefill)


def heads_of(engine: Engine, cache) -> object:
    """The lender's heads in a contiguous cache."""
    store = cache.stores[LENDER]
    return getattr(store, "lender", store)


def numbers(store, how: str, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[H, length, D]` that a row of so many tokens is read as, in any order."""
    if "scales" in HOW[how]:
        pairs = zip(store.planes.values(), store.scales, strict=True)
        keys, values = (
            x[0, :, :length].view(torch.float8_e4m3fn).float() * s[:, None, None] for x, s in pairs
        )
        if store.exact is None:
            return keys, values
        near, window = store.exact.newest(0, length), store.exact.window
        exact, codes = [x[0] for x in near], [x[:, : length - window] for x in (keys, values)]
    else:
        bits, exact = BITS[how], store.exact_tokens(0, length)
        read = [store.blocks_of(part, 0, 0, bits.blocks(length)) for part in ("keys", "values")]
        keys = dequantise(*read[0], bits.group, bits.keys, bits.group).mT
        values = dequantise(*read[1], store.heads.head_dim, bits.values, bits.group)
        codes = [keys.flatten(1, 2), values.flatten(1, 2)]
    keys, values = (torch.cat(pair, dim=1) for pair in zip(codes, exact, strict=True))
    assert keys.shape[1] == length
    return keys, values


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@every_way
def test_what_is_packed_finely_reads_as_what_is_not(checkpoint, how, prefill):
    """And what is packed coarsely does not: it is the packed numbers that are read."""
    ids, found = tokens(150), []
    wanted = logits(Engine.load(checkpoint), ids, 100)
    changes = [{"keys": 8, "values": 8}, {"keys": 2, "values": 2}]
    for change in changes if "bits" in HOW[how] else [{}]:
        plan = lending(checkpoint, how, prefill, alone=True)
        layers = list(plan.layers)
        if change:
            bits = replace(BITS[how], **change, rest=None, rank=0, kept=None)
            layers[LENDER] = replace(layers[LENDER], bits=bits)
        engine = Engine.load(checkpoint, plan=replace(plan, layers=tuple(layers)))
        error = (logits(engine, ids, 100) - wanted)[100:].square().mean().sqrt()
        found.append(float(error / wanted.std()))
    assert 0 < found[0] < (0.02 if change else 0.1)
    assert found[0] == found[-1] or 10 * found[0] < found[-1]


@pytest.mark.parametrize("how", ["plain", "no sinks", "fp8", "fp8, window"])
def test_readers_read_what_the_lender_keeps_and_write_nothing(checkpoint, how):
    engine, length = Engine.load(checkpoint, plan=lending(checkpoint, how)), 120
    cache = engine.new_cache(1, length)
    engine.extend(cache, tokens(length))
    store = heads_of(engine, cache)
    kept = {name: plane.clone() for name, plane in store.planes.items()}
    for reader in READERS:
        attention = engine.attentions[reader]
        q = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(reader)) / 10
        step = Step(cache.stores, None, [length - 1], [length], positions=torch.tensor([[0]]))

        def weighted(attention=attention, q=q) -> Tensor:
            keys, values = (x.repeat_interleave(2, 0) for x in numbers(store, how, length))
            scores = attention.stages.layout.scaling * (q[0] @ keys.mT)
            return (scores.softmax(-1) @ values)[None]

        before = attention.read(q, step)
        torch.testing.assert_close(before, weighted(), atol=1e-4, rtol=1e-4)
        assert all(map(torch.equal, kept.values(), store.planes.values()))
        for name in ("keys", "values"):
            byte = store.planes[name][0].flatten()[:1]
            byte += 1  # one code, or two that lie in a byte
            after = attention.read(q, step)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, weighted(), atol=1e-4, rtol=1e-4)
            byte -= 1


@every_way
def test_how_tokens_arrive_does_not_matter(checkpoint, how):
    check_arrival(checkpoint, lambda prefill: lending(checkpoint, how, prefill), tokens(96))


@every_way
def test_a_prompt_may_come_in_pieces_and_rows_together(checkpoint, how):
    engine = Engine.load(checkpoint, plan=lending(checkpoint, how))
    check_prompt_in_pieces(engine, tokens(96))
    check_rows(engine)
    check_snapshot(engine, tokens(96))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@every_way
def test_whoever_is_not_asked_changes_nothing(checkpoint, how, prefill):
    """Of a prompt readers see the last token alone, if nobody asks for more."""
    engine, ids = Engine.load(checkpoint, plan=lending(checkpoint, how, prefill)), tokens(130)
    cache = engine.new_cache(1, 8)
    found = [engine.extend(cache, piece, chunk=40) for piece in (ids[:90], ids[90:110])]
    found += [engine.decode(cache, token[None])[0] for token in ids[110:]]
    wanted = logits(engine, ids, 90, 20)
    apart = torch.stack(found) - wanted[[89, *range(109, 130)]]
    assert apart.abs().mean(dim=-1).max() < 5e-3  # but for numbers on the edge between two codes


@every_way
def test_bytes_are_told_as_they_are_allocated(checkpoint, how):
    plan = lending(checkpoint, how)
    engine = Engine.load(checkpoint, plan=plan)
    for length in TOKENS:
        assert engine.new_cache(1, length).allocated_bytes == plan.cache_bytes(length, 4)
    slope = plan.cache_bytes(1600, 2) - plan.cache_bytes(1440, 2)
    assert slope == 160 * cache_size(engine).bytes_per_token_bf16
    assert bf16_bytes(engine, 60, 100) == plan.cache_bytes(100, 2)
    memory = RowMemory(engine)
    for length in (5, 64, 200):
        cache = engine.new_cache(1, 1)
        engine.extend(cache, tokens(length))
        cache.resize(-(-length // 64) * 64)
        assert memory.holding(length, length) == cache.allocated_bytes
    own, lent = (plan.layers[i].cache_bytes(500, 32, 2) for i in (1, LENDER))
    assert own == lent  # once, however many read it
    bare = Plan(plan.base, whole_layers(checkpoint))
    assert plan.cache_bytes(500, 2) == bare.cache_bytes(500, 2) - 2 * (4 * 32 * 2 * 500 - lent)
    assert RowMemory(engine).reading(300) >= plan.cache_bytes(300, 4) + 2 * 300 * 4 * 2 * 64


@pytest.mark.parametrize("how", ["turned", "fp8, window"])
def test_requests_are_served(checkpoint, how):
    plan = lending(checkpoint, how, "streamed")
    engine = Engine.load(checkpoint, plan=plan)
    scheduler = Scheduler(engine, 2**22, piece=32)
    requests = [Request(tokens(n).tolist(), 4, ignore_eos=True) for n in (100, 20, 3, 110)]
    for request in requests:
        scheduler.add(request)
        while not scheduler.idle:
            scheduler.step()
    assert scheduler.counters.prefix_hits > 0
    for request in requests:
        alone = list(engine.generate([request.prompt], max_new_tokens=4, ignore_eos=True))
        assert request.tokens == [step[0] for step in alone]


@pytest.mark.parametrize("how", ["plain", "fp8", "fp8, window"])
def test_the_damage_of_a_lender_is_that_of_all_who_read_it(checkpoint, how):
    base = Engine.load(checkpoint)
    engine, ids = Engine.load(checkpoint, plan=lending(checkpoint, how, alone=True)), tokens(140)

    def said(one: Engine) -> Tensor:
        cache = one.new_cache(1, 140)
        one.extend(cache, ids[:80])
        return one.extend(cache, ids[80:], all_logits=True).double().log_softmax(-1)

    alone = float(kl_divergence(said(base), said(engine)).mean())
    found = [damage.kl for damage in layer_damage(engine, base, ids, 80)]
    assert found[LENDER] == pytest.approx(alone, rel=1e-3)
    assert alone > 0
    assert found[:LENDER] + found[LENDER + 1 :] == [0] * 7


def test_a_plan_is_read_again(checkpoint, tmp_path, capsys):
    for how in HOW:
        plan = lending(checkpoint, how)
        plan.write(tmp_path / "a.plan", overwrite=True)
        assert Plan.read(tmp_path / "a.plan").layers == plan.layers
        head = (tmp_path / "a.plan").read_bytes()[:65536].replace(b"\\", b"")
        assert b'"format_version":10' in head
    older = replace(plan, layers=(*plan.layers[:3], whole_layers(checkpoint)[3], *plan.layers[4:]))
    older.write(tmp_path / "b.plan")  # as before, with bits for the layer that nobody else reads
    assert b'"format_version":9' in (tmp_path / "b.plan").read_bytes()[:65536].replace(b"\\", b"")
    shown = []
    for name in ("a", "b"):
        assert run_command(["plan", "show", str(tmp_path / f"{name}.plan")]) == 0
        shown.append(" ".join(capsys.readouterr().out.split()))
    assert "2 layers: every number" in shown[0]
    assert "1 layer that they read: all tokens, packed" in shown[0]
    assert "1 layer that they read: all tokens, as without a plan" in shown[1]


def test_what_cannot_be_packed_is_refused(checkpoint):
    for layer in (2, 5):  # a window, and a layer that keeps nothing
        with pytest.raises(PlanError, match="no KV heads to plan"):
            replace(whole_layers(checkpoint)[layer], bits=PLAIN)
    with pytest.raises(PlanError, match="scales of 3 heads for 2"):
        LayerPlan((), kept=SharedPlan(2, 32), scales=Scales((1.0,) * 3, (1.0,) * 3))
    with pytest.raises(PlanError, match="1 orders of channels for 2 heads"):
        LayerPlan((), kept=SharedPlan(2, 32), bits=replace(PLAIN, order=((0, 1),)))
    layers = list(whole_layers(checkpoint))
    layers[LENDER] = LayerPlan((), kept=SharedPlan(2, 16), bits=PLAIN)
    with pytest.raises(PlanError, match="layer 3 packs 2 heads x 16, of a model with 2 heads x 32"):
        Plan(base_of(checkpoint), tuple(layers))


def test_lenders_are_packed_beside_heads_that_drop_tokens(checkpoint):
    ids, whole = tokens(150), whole_layers(checkpoint)
    streams = LayerPlan((True, False), 3, 9, bits=PLAIN)
    budgets = LayerPlan((False, False), budget=(20, 40))
    for first, policy in ((streams, None), (budgets, "snapkv")):
        layers = (whole[0], first, whole[2], replace(whole[3], bits=PLAIN), *whole[4:])
        plan = Plan(base_of(checkpoint), layers, policy=policy)
        engine = Engine.load(checkpoint, plan=plan)
        found = [logits(engine, ids, 100, 30), logits(engine, ids, 100)]
        torch.testing.assert_close(*found, atol=5e-3, rtol=1e-3)
        assert cache_size(engine).bytes_per_token_bf16 <= plan.bytes_per_token(2)
        cache = engine.new_cache(1, 100)
        engine.extend(cache, ids[:100])
        assert cache.allocated_bytes == plan.cache_bytes(100, 4)


def test_a_lender_may_be_packed_beside_codes(checkpoint):
    plan, whole = coded(checkpoint), whole_layers(checkpoint)[LENDER]
    for how in ("plain", "fp8"):
        layers = list(plan.layers)
        layers[LENDER] = replace(whole, **HOW[how])
        both = replace(plan, layers=tuple(layers))
        engine = Engine.load(checkpoint, plan=both)
        assert engine.new_cache(1, 200).allocated_bytes == both.cache_bytes(200, 4)
        saved = plan.cache_bytes(200, 2) - both.cache_bytes(200, 2)
        assert saved == whole.cache_bytes(200, 32, 2) - layers[LENDER].cache_bytes(200, 32, 2) > 0
        assert both.bytes_per_token(2) < plan.bytes_per_token(2)
        found = [
            logits(x, tokens(150), 100)[100:] for x in (engine, Engine.load(checkpoint, plan=plan))
        ]
        assert 0 < relative_error(*found) < 0.5


def test_the_gradient_of_a_lender_is_that_of_all_its_readers(checkpoint, monkeypatch):
    """Differences of predictions, as its stored numbers are moved, say the same."""
    monkeypatch.setattr(far_reads, "END", 40)
    ids, window, seed = tokens(120), 5, 3
    (read,) = WholeModel(checkpoint).far_reads(ids[None], [0], (0, window), seed)
    engine, past = Engine.load(checkpoint), slice(0, 80 - window)  # whose reads are all far
    cache = engine.new_cache(1, 120)
    engine.extend(cache, ids[:80])
    planes = cache.stores[LENDER].planes

    def said() -> Tensor:
        found = engine.extend(cache, ids[80:], all_logits=True).double().log_softmax(-1)
        cache.lengths = [80]
        return found

    mark = cache.snapshot(0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(said().float().exp(), 1, generator=generator)
    for part, felt in zip(("keys", "values"), read.felt[LENDER], strict=True):
        along = torch.zeros_like(planes[part])
        along[:, :, past] = torch.randn(1, 2, 75, 32, generator=generator)
        moved = []
        for size in (0.002, -0.002):
            cache.restore(0, mark)
            planes[part] += size * along
            moved.append(float(said().gather(1, drawn).sum()))
            planes[part] -= size * along
        slope = float((felt * along[:, :, : felt.shape[2]]).sum())
        assert (moved[0] - moved[1]) / 0.004 == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("share", ["30%", None])
def test_bits_by_harm_go_to_lenders_as_well(checkpoint, text, share):
    bits = None if share else (4, 4)
    options = QuantizationOptions(bits=bits, group=32, data=text, tokens=1024, context=512)
    start = everything(checkpoint, base_of(checkpoint), options)
    budget = start.native_bytes(512, 2) * 45 // 100 if share else None
    plan = calibrate_quantization(checkpoint, options, start, budget, 2)
    assert [i for i, layer in enumerate(plan.layers) if layer.packed] == [1, LENDER]
    said = plan.provenance[-1]["harm"]
    for part in ("keys", "values"):
        assert [i for i, harm in enumerate(said[part]) if harm > 0] == [1, LENDER]
    if share:
        assert 0.8 * budget < plan.cache_bytes(512, 2) <= budget
    else:
        same = [replace(x, bits=options.everywhere()) if x.heads else x for x in start.layers]
        assert plan.cache_bytes(512, 2) <= replace(start, layers=tuple(same)).cache_bytes(512, 2)
    engine = Engine.load(checkpoint, plan=plan)
    assert engine.new_cache(1, 512).allocated_bytes == plan.cache_bytes(512, 4)
    ids = tokens(300)
    wanted, found = (logits(x, ids, 280) for x in (Engine.load(checkpoint), engine))
    assert 0 < relative_error(found, wanted) < 0.1


def test_scales_of_a_lender_are_measured_or_those_of_the_checkpoint(checkpoint, text, tmp_path):
    options = QuantizationOptions(FP8, data=text, tokens=1024, context=512, window=0)
    convert(checkpoint.path, tmp_path / "out", to="fp8-kv")
    for model in (checkpoint, Checkpoint.open(str(tmp_path / "out"))):
        start = everything(model, base_of(model), options)
        plan = calibrate_quantization(model, options, start, None, 2)
        assert [i for i, layer in enumerate(plan.layers) if layer.scales] == [1, LENDER]
        ids = tokens(150)
        wanted = logits(Engine.load(checkpoint), ids, 100)
        found = logits(Engine.load(model, plan=plan), ids, 100)
        assert 0 < relative_error(found, wanted) < 0.3
    for reader in (LENDER, *READERS):  # which the checkpoint has for those that read it, too
        keys, values = stored_scales(model, reader)
        own = plan.layers[LENDER].scales
        assert own.keys == (float(keys),) * 2
        assert own.values == (float(values),) * 2


def test_a_model_whose_whole_pasts_are_all_lent_is_packed(tiny, tmp_path, capsys, text):
    family, more = CASES[NAME]
    more = more | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5}
    model, ids = str(tiny(family, **more)), tokens(150)
    command = ["calibrate", "quantization", model, "-o", str(tmp_path / "a.plan")]
    options = ["--group", "32", "--data", text, "--tokens", "1024", "--context", "256"]
    for method in (["--method", "kivi", "--bits", "8"], ["--bits", "8"], ["--bits", "fp8"]):
        asked = options if method[-1] != "fp8" else options[2:]
        assert run_command([*command, *method, *asked, "--overwrite"]) == 0, capsys.readouterr()
        plan = Plan.read(tmp_path / "a.plan")
        assert [i for i, layer in enumerate(plan.layers) if layer.packed] == [3]
        assert plan.planned_layers == []
        checkpoint = Checkpoint.open(model)
        wanted = logits(Engine.load(checkpoint), ids, 140)
        found = logits(Engine.load(checkpoint, plan=plan), ids, 140)
        assert 0 < relative_error(found, wanted) < 0.3
