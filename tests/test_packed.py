"""Packed heads: what fake quantisation computes, the same however tokens arrive, planned bytes."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from _convert_tools import YARN, one_thread, random_ids
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

from kvtool.bits import Bits, Tier
from kvtool.checkpoint import Checkpoint
from kvtool.errors import PlanError
from kvtool.kernels.hadamard import hadamard
from kvtool.kernels.low_rank import low_rank
from kvtool.kernels.packed_attention import (
    channel_scores,
    token_scores,
    value_sums,
)
from kvtool.kernels.quantise import BITS, dequantise, quantise
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.rope import rotate
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.packed import PackedHeads
from kvtool.runtime.packed_attention import PagedPacked
from kvtool.slices import compose

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

LENGTH = 96
SMALL = {"group": 16, "sink": 3, "window": 5}
WAYS = {
    "kivi": {},
    "turned": {"hadamard": "values"},
    "before RoPE": {"kind": "unrotated"},
    "per token": {"axis": "token", "hadamard": "both"},
    "rotatekv": {"axis": "token", "kind": "unrotated", "hadamard": "both", "order": True},
    "values turned": {"hadamard": "values", "order": True},
    "two tiers": {"rest": 6},
    "two tiers per token": {"axis": "token", "rest": 8, "balanced": True},
    "gear": {"rank": 2},
    "gear per token": {"axis": "token", "kind": "unrotated", "rank": 1},
    "balanced": {"kind": "unrotated", "hadamard": "values", "balanced": True},
    "sparse": {"kept": 6},
    "sparse per token": {
        "axis": "token",
        "kind": "unrotated",
        "hadamard": "both",
        "balanced": True,
        "kept": 9,
    },
}
ways = pytest.mark.parametrize("way", WAYS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama(tiny):
    return Checkpoint.open(str(tiny("llama")))


def packed(checkpoint, way="kivi", keys=4, values=4, prefill="dense", streaming=None, **options):
    base = base_of(checkpoint)
    options = {**SMALL, **WAYS[way], **options}
    if options.pop("order", False):
        generator = torch.Generator().manual_seed(0)
        options["order"] = tuple(
            tuple(torch.randperm(base.head_dim, generator=generator).tolist())
            for _ in range(base.kv_heads)
        )
    if options.pop("balanced", False):
        drawn = (0.5 + random(2, base.kv_heads, base.head_dim).abs()).tolist()
        named = zip(("key_balance", "value_balance"), drawn, strict=True)
        options |= {name: tuple(map(tuple, rows)) for name, rows in named}
    if "rest" in options:
        options["rest"] = Tier(options["rest"], 2, min(values, 3))
    if "kept" in options:
        values = 16
    bits = Bits(keys, values, **options)
    heads = streaming or ((False,) * base.kv_heads,) * base.layers
    layers = tuple(LayerPlan(tuple(x), 3, 8, bits=bits) for x in heads)
    return Plan(base, layers, prefill)


# ------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 64])
def test_folded_scales_read_what_was_dequantised(bits, group):
    """Also with one channel that is a thousand times the others, and a constant group."""
    heads, blocks, width = 2, 20, 24
    x = random(heads, blocks, group, width)
    x[..., 3] *= 1000
    x[:, 1] = 0.5
    q = random(heads, 3, width, seed=1)
    codes, scales = quantise(x.mT, bits, group)
    keys = dequantise(codes, scales, group, bits, group).mT.flatten(1, 2)
    found = channel_scores(q, codes, scales[..., 0, :], bits, group)
    torch.testing.assert_close(found, q @ keys.mT, rtol=1e-4, atol=1e-2)

    codes, scales = quantise(x.flatten(1, 2), bits, group)
    rows = dequantise(codes, scales, width, bits, group)
    found = token_scores(q, codes, scales, bits, group)
    torch.testing.assert_close(found, q @ rows.mT, rtol=1e-4, atol=1e-2)
    weights = torch.softmax(random(heads, 3, blocks * group, seed=2), dim=-1)
    found = value_sums(weights, codes, scales, width, bits, group)
    torch.testing.assert_close(found, weights @ rows, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------------- the store


def reference(checkpoint, plan: Plan, ids: Tensor) -> Tensor:
    """Logits where each query sees fake-quantised blocks and exact tokens, written out."""
    engine = Engine.load(checkpoint)
    bits = plan.layers[0].bits
    order = None if bits.order is None else torch.tensor(bits.order)[:, None]
    balance = [
        torch.ones(()) if y is None else torch.tensor(y)[:, None]
        for y in (bits.key_balance, bits.value_balance)
    ]

    for attention in engine.attentions:

        def attend(hidden, step, store, attention=attention):
            stages = attention.stages
            cos, sin = step.tables[attention.table]
            q, k, v = stages.project(hidden)
            q, k = stages.normalise(q, k)
            turned, rotated = stages.rotate(q, k, cos[:, None], sin[:, None])
            at, group = torch.arange(len(ids)), q.shape[1] // k.shape[1]
            ends = torch.tensor([bits.sink + bits.blocks(p + 1) * bits.group for p in at])
            far = (at >= bits.sink) & (at < ends[:, None])

            def attend_to(keys):
                exact, stored = (y.repeat_interleave(group, 0) for y in (rotated[0], keys))
                scores = torch.where(far, turned[0] @ stored.mT, turned[0] @ exact.mT)
                scores = scores * stages.layout.scaling
                return scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1)

            def to_keys(x):
                x = x * balance[0]
                if order is not None:
                    x = torch.empty_like(x).scatter_(-1, order.expand(x.shape), x)
                x = hadamard(x) if bits.hadamard == "both" else x
                if bits.kind == "unrotated":
                    x = rotate(x / attention.rope.scale, cos[0], sin[0])
                return x

            x = k[0] * attention.rope.scale if bits.kind == "unrotated" else rotated[0]
            x = hadamard(x) if bits.hadamard == "both" else x
            values = v[0] if bits.hadamard == "none" else hadamard(v[0])
            x = x if order is None else x.gather(-1, order.expand(x.shape))
            x, values = x / balance[0], values / balance[1]
            for block in range(bits.blocks(len(ids))):
                first = bits.sink + block * bits.group
                own = torch.arange(first, first + bits.group)
                chosen = [own.expand(len(x), -1)]
                if bits.rest:
                    probes = torch.arange(bits.packed_at(block) - 2, bits.packed_at(block))
                    got = attend_to(to_keys(x))[:, probes][..., own]
                    saliency = got.unflatten(0, (-1, group)).sum((1, 2))
                    saliency /= (probes[:, None] >= own).sum(0)
                    ranked = first + saliency.argsort(descending=True)
                    chosen = ranked.split([bits.group - bits.rest.tokens, bits.rest.tokens], 1)
                for tier, places in zip(bits.tiers, chosen, strict=True):
                    for head, at_ in enumerate(places):
                        for y, width, axis in (
                            (x, tier.keys, bits.axis), (values, tier.values, "token"),
                        ):  # fmt: skip
                            z = y[head, at_].mT if axis == "channel" else y[head, at_]
                            group_ = bits.group
                            if width == 16:
                                least = z.abs().sort(-1).values[:, -bits.kept, None]
                                y[head, at_] = (z * (z.abs() >= least)).half().float()
                                continue
                            left = z.clone()
                            z = dequantise(*quantise(z, width, group_), z.shape[-1], width, group_)
                            left -= z
                            if bits.rank:
                                thin = low_rank(left.mT if axis == "channel" else left, bits.rank)
                                found = thin[0].float().mT @ thin[1].float()
                                z += found.mT if axis == "channel" else found
                            y[head, at_] = z.mT if axis == "channel" else z
            values = values * balance[1]
            values = values if bits.hadamard == "none" else hadamard(values)
            weights = attend_to(to_keys(x))
            exact, stored = (y.repeat_interleave(group, 0) for y in (v[0], values))
            context = (weights * far) @ stored + (weights * ~far) @ exact
            return stages.output(context[None], hidden)

        attention.attention = attend
    return logits(engine, ids, len(ids))


@ways
@pytest.mark.parametrize("bits", [(2, 2), (4, 3), (8, 4)])
def test_it_reads_what_fake_quantisation_gives(llama, way, bits, poison):
    plan = packed(llama, way, *bits, prefill="streamed")
    engine = Engine.load(llama, plan=plan)
    # A number on the edge between two of few codes, early in a text, changes all behind it.
    for text in (random_ids(LENGTH), random_ids(LENGTH, seed=1)):
        found, expected = logits(engine, text, 1), reference(llama, plan, text)
        if (found - expected).abs().median() < 1e-4:
            break
    assert_same(found, expected)
    dense = logits(Engine.load(llama), text, len(text))
    assert (found - dense).abs().max() > 3e-3  # the packing is seen


@pytest.mark.parametrize("way", ["before RoPE", "rotatekv"])
def test_a_factor_on_the_rotation_comes_off_again(tiny, way):
    checkpoint = Checkpoint.open(str(tiny("llama", rope_parameters=YARN)))
    ids = random_ids(64)
    plan = packed(checkpoint, way, 8, 8, prefill="streamed")
    found = logits(Engine.load(checkpoint, plan=plan), ids, 1)
    dense = logits(Engine.load(checkpoint), ids, len(ids))
    assert (found - dense).abs().mean() < 0.05  # 0.3 with 4 bits


@ways
def test_the_same_however_tokens_arrive(llama, way, poison):
    planned = partial(packed, llama, way, 3, 2)
    check_arrival(llama, lambda prefill: planned(prefill=prefill), random_ids(LENGTH))


def test_a_prompt_may_come_in_pieces_and_rows_decode_together(llama):
    engine = Engine.load(llama, plan=packed(llama, keys=2, values=2))
    check_prompt_in_pieces(engine, random_ids(LENGTH))


def test_rows_of_different_lengths_do_not_disturb_each_other(llama, poison):
    check_rows(Engine.load(llama, plan=packed(llama)))


@pytest.mark.parametrize("way", ["kivi", "two tiers"])
@pytest.mark.parametrize("stored", range(60, 96, 7))
def test_a_row_goes_back_where_it_can_and_starts_over_where_not(llama, way, stored, poison):
    engine = Engine.load(llama, plan=packed(llama, way, 4, 2, prefill="streamed"))
    check_crop(engine, random_ids(LENGTH), stored)


@pytest.mark.parametrize("way", ["kivi", "two tiers"])
def test_a_snapshot_is_where_it_was(llama, way):
    streaming = ([True, False],) * 3
    plan = packed(llama, way, streaming=streaming)
    check_snapshot(Engine.load(llama, plan=plan), random_ids(LENGTH))


@ways
def test_measured_bytes_are_the_planned_ones(llama, way):
    """Also beside heads that stream and heads with a token budget, and as the cache grows."""
    for bits in ((2, 3), (4, 8)):
        streaming = ([True, False], [False, False], [True, True])
        plan = packed(llama, way, *bits, streaming=streaming)
        check_bytes(Engine.load(llama, plan=plan), 4)


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("way", ["two tiers", "two tiers per token"])
def test_tiers_of_eight_bits_are_close_to_everything(llama, way, prefill):
    few = packed(llama, way, 8, 8, prefill=prefill)
    plan = replace(few, layers=tuple(_eight(layer) for layer in few.layers))
    ids = random_ids(LENGTH)
    dense, found, coarse = (logits(Engine.load(llama, plan=x), ids, 50) for x in (None, plan, few))
    assert 1e-3 < (found - dense).abs().mean() < 0.05
    assert (coarse - dense).abs().mean() > 5 * (found - dense).abs().mean()


def _eight(layer):
    rest = replace(layer.bits.rest, keys=8, values=8)
    return replace(layer, bits=replace(layer.bits, rest=rest))


def test_sparse_values_with_all_numbers_are_the_exact_ones(llama):
    """And the fewer are kept, the more is lost."""
    ids = random_ids(LENGTH)
    dense = logits(Engine.load(llama), ids, 50)
    lost = []
    for kept in (16, 15, 8, 1):
        plan = packed(llama, "sparse", 8, kept=kept)
        engine = Engine.load(llama, plan=plan)
        lost.append(float((logits(engine, ids, 50) - dense).abs().mean()))
        cache = engine.new_cache(1, LENGTH)
        engine.extend(cache, ids)
        store = cache.stores[0].full
        bitmap = store.planes["bitmap"]
        assert bitmap.shape == (1, 2, store.bits.blocks(LENGTH), 16, 2)
        places = torch.arange(8, dtype=torch.uint8)
        assert ((bitmap[..., None] >> places & 1).sum((-1, -2)) == kept).all()
    eight = logits(Engine.load(llama, plan=packed(llama, "kivi", 8, 8)), ids, 50)
    assert lost[0] <= float((eight - dense).abs().mean())
    assert all(less < more for less, more in itertools.pairwise(lost))


def test_no_kernel_reads_sparse_values():
    assert PagedPacked.possible(Bits(8, 8), 64)
    assert not PagedPacked.possible(Bits(4, 16, kept=32), 64)


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_tokens_with_more_attention_have_more_bits(llama, prefill, poison):
    """Whatever the calls were that brought them, the same tokens, with the same codes."""
    plan = packed(llama, "two tiers", prefill=prefill)
    engine, ids = Engine.load(llama, plan=plan), random_ids(LENGTH)
    stores = []
    for pieces in ((40,), (40, 56), (40, 1, 3, 30)):
        cache = engine.new_cache(1, LENGTH)
        start = 0
        for size in (*pieces, *[1] * (LENGTH - sum(pieces))):
            engine.extend(cache, ids[start : start + size])
            start += size
        stores.append(cache.stores)
    for layers in zip(*stores, strict=True):
        first, *others = (store.full for store in layers)
        for other in others:
            for name, plane in first.planes.items():
                if plane.dtype == torch.uint8:
                    assert (plane != other.planes[name]).float().mean() < 0.01
                else:  # in deeper layers sums differ in their last bits, and fp16 rounds them
                    torch.testing.assert_close(other.planes[name], plane, rtol=2e-3, atol=1e-4)
            attention = first.exact.planes["attention"]  # of the last block's two probes
            assert (attention.sum(dim=-1) > 0.1).all()
            torch.testing.assert_close(
                other.exact.planes["attention"], attention, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("piece", [200, 30])
def test_a_prompt_that_is_read_densely_is_ranked_as_one_that_streams(llama, piece):
    """Of the first layer, whose input is the same, with bits that hardly change attention."""
    length = 102  # one of two probes of the next block has come
    found, ids = [], random_ids(length)
    for prefill in ("streamed", "dense"):
        plan = packed(llama, "two tiers", 8, 8, prefill=prefill)
        plan = replace(plan, layers=tuple(_eight(layer) for layer in plan.layers))
        engine = Engine.load(llama, plan=plan)
        cache = engine.new_cache(1, length)
        for part in ids.split(piece):
            engine.extend(cache, part, prompt=length)
        found.append(cache.stores[0].full)
    streamed, dense = found
    for name, plane in streamed.planes.items():
        assert (plane != dense.planes[name]).float().mean() < 0.01
    sums = [store.exact.planes["attention"] for store in found]
    torch.testing.assert_close(*sums, rtol=0.05, atol=1e-4)


def test_true_bits_count_scales_and_minima():
    """Of 4 bits in groups of 64: 4.5 bits, keys and values alike; exact tokens beside them."""
    bits = Bits(4, 4, 64)
    assert 8 * bits.token_bytes(64) == 2 * 64 * 4.5
    assert 8 * Bits(2, 2, 32).token_bytes(64) == 2 * 64 * 3
    assert 8 * Bits(3, 2, 64, "token").token_bytes(128) == 128 * (3.5 + 2.5)
    assert bits.cache_bytes(4 + 64 + 63, 64, 2) == 2 * 2 * 64 * (4 + 64 + 64)
    assert bits.blocks(4 + 64 + 64) == 1
    assert 8 * Bits(2, 2, 64, rank=2).token_bytes(64) == 2 * 64 * (2.5 + 1)
    assert 8 * Bits(4, 16, 64, kept=20).token_bytes(64) == 64 * 4.5 + 64 + 16 * 20
    tiers = Bits(4, 4, 128, rest=Tier(64, 2, 2))
    assert 8 * tiers.token_bytes(64) == 2 * 64 * 3.5
    assert tiers.cache_bytes(0, 64, 2) == 2 * 2 * 64 * (4 + 64 + 128) + 4 * 128


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_the_memory_of_a_row_is_known_before(llama, prefill):
    plan = packed(llama, prefill=prefill, streaming=([True, False], [False] * 2, [False] * 2))
    engine = Engine.load(llama, plan=plan)
    memory = RowMemory(engine)
    for tokens in (64, 128, 640):
        assert memory.holding(tokens, tokens) == engine.new_cache(1, tokens).allocated_bytes
    assert (memory.reading(128) > memory.holding(128, 128)) == (prefill == "dense")


def test_budgets_drop_tokens_of_other_heads(llama):
    """Heads with a token budget keep them exactly, beside packed heads."""
    plan = packed(llama, keys=8, values=8)
    layers = tuple(replace(x, budget=(20, None)) for x in plan.layers)
    both = replace(plan, layers=layers, policy="snapkv")
    alone = replace(both, layers=tuple(replace(x, bits=None) for x in layers))
    ids = random_ids(LENGTH)
    found, expected = (logits(Engine.load(llama, plan=x), ids, 60, 20) for x in (both, alone))
    assert (found - expected).abs().mean() < 0.05
    cache = Engine.load(llama, plan=both).new_cache(1, 60)
    assert isinstance(cache.stores[0].full, PackedHeads)


# ---------------------------------------------------------------------------------- the plan


def test_a_plan_comes_back_from_its_file(llama, tmp_path):
    for way in WAYS:
        plan = packed(llama, way, 3, 2, key_clip=0.85)
        plan.write(tmp_path / "a.plan", overwrite=True)
        assert Plan.read(tmp_path / "a.plan").layers == plan.layers
        said = WAYS[way].keys()
        version = 5 if {"rest", "balanced", "rank", "kept"} & said else 4
        head = (tmp_path / "a.plan").read_bytes()[:200000].replace(b"\\", b"")
        assert f'"format_version":{version}'.encode() in head
        assert (b'"rest"' in head) == ("rest" in WAYS[way])


def test_plans_without_bits_are_read_by_older_versions(llama, tmp_path):
    plan = packed(llama)
    plan = replace(plan, layers=tuple(replace(x, bits=None) for x in plan.layers))
    plan.write(tmp_path / "a.plan")
    assert b'"format_version":1' in (tmp_path / "a.plan").read_bytes()[:4096].replace(b"\\", b"")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys": 5}, "keys have numbers of 2, 3, 4 or 8 bits, not of 5"),
        ({"values": 1}, "values have numbers of 2, 3, 4 or 8 bits, not of 1"),
        ({"group": 256}, "by 16, 32, 64 or 128, not by 256"),
        ({"window": 0}, "the window holds at least the current token"),
        ({"sink": -1}, "-1 exact sinks"),
        ({"key_clip": 0.0}, "a share of a range above 0, up to 1"),
        ({"value_clip": 1.5}, "a share of a range above 0, up to 1"),
        ({"order": ((0, 0),)}, "names each of them once"),
        ({"rest": Tier(32, 1, 4)}, "keys have numbers of 2, 3, 4 or 8 bits, not of 1"),
        ({"rest": Tier(64, 2, 2)}, "64 tokens of a block of 64 have fewer bits"),
        ({"rest": Tier(0, 2, 2)}, "0 tokens of a block of 64 have fewer bits"),
        ({"rest": Tier(9, 2, 2), "kind": "unrotated"}, "lie out of order"),
        ({"rank": -1}, "a block of 64 tokens has no factors of rank -1"),
        ({"rank": 65}, "a block of 64 tokens has no factors of rank 65"),
        ({"rank": 1, "rest": Tier(9, 2, 2)}, "have one tier of tokens"),
        ({"values": 16}, "values have numbers of 2, 3, 4 or 8 bits, not of 16"),
        ({"values": 4, "kept": 3}, "3 numbers of 4 bits are not what is kept of a value"),
        ({"values": 16, "kept": 0}, "0 numbers of 16 bits are not what is kept of a value"),
        ({"values": 16, "kept": 3, "keys": 16}, "keys have numbers of 2, 3, 4 or 8 bits, not of"),
        ({"values": 16, "kept": 3, "rank": 1}, "no tiers, factors or clipped codes"),
        ({"values": 16, "kept": 3, "rest": Tier(9, 2, 2)}, "no tiers, factors or clipped codes"),
        ({"values": 16, "kept": 3, "value_clip": 0.9}, "no tiers, factors or clipped codes"),
        ({"key_balance": ((1.0, 0.0),)}, "above 0 and finite"),
        ({"value_balance": ((math.nan,),)}, "above 0 and finite"),
    ],
)
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(PlanError, match=message):
        Bits(**{"keys": 4, "values": 4, **wrong})


def test_plans_that_do_not_fit_are_refused(llama, tiny, tmp_path):
    plan = packed(llama)
    wide = Bits(4, 4, window=600)
    long = replace(plan, layers=tuple(replace(x, bits=wide) for x in plan.layers))
    with pytest.raises(PlanError, match="keeps 668 tokens exactly, more than"):
        Engine.load(llama, plan=long)
    with pytest.raises(PlanError, match="1 orders of channels for 2 heads"):
        LayerPlan((False, False), bits=Bits(4, 4, order=((0, 1),)))
    with pytest.raises(PlanError, match="1 balances of channels for 2 heads"):
        LayerPlan((False, False), bits=Bits(4, 4, key_balance=((1.0, 1.0),)))
    for wrong, what in (({"order": ((0, 1), (1, 0))}, "orders"),
                        ({"value_balance": ((1.0, 2.0), (1.0, 1.0))}, "balances")):  # fmt: skip
        layers = (replace(plan.layers[0], bits=Bits(4, 4, **wrong)), *plan.layers[1:])
        with pytest.raises(PlanError, match=f"has {what} of 2 channels of"):
            replace(plan, layers=layers)
    layers = (replace(plan.layers[0], bits=Bits(4, 4, rank=20)), *plan.layers[1:])
    with pytest.raises(PlanError, match="layer 0 has factors of rank 20 for 16 channels"):
        replace(plan, layers=layers)
    layers = (replace(plan.layers[0], bits=Bits(4, 16, kept=17)), *plan.layers[1:])
    with pytest.raises(PlanError, match="layer 0 keeps 17 numbers of values of 16"):
        replace(plan, layers=layers)
    with pytest.raises(PlanError, match="few bits come last"):
        compose(plan, plan)
    sliding = Checkpoint.open(str(tiny("mistral", sliding_window=16)))
    with pytest.raises(PlanError, match="keeps the window that it sees"):
        Engine.load(sliding, plan=packed(sliding))
