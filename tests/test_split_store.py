"""Heads that drop tokens compute what a mask over the whole past computes, from fewer bytes."""

import pytest
import torch
from _family_cases import ALL_FULL, EXPERTS, SINKS
from conftest import FAMILIES
from torch import nn

from kvtool.attention import GroupedQueryAttention
from kvtool.checkpoint import Checkpoint
from kvtool.convert import conversion, planning
from kvtool.errors import PlanError, UnsupportedModelError
from kvtool.evaluate import retrieval
from kvtool.layer_plan import LayerPlan
from kvtool.layout import decoder_layers
from kvtool.plan import Plan, base_of
from kvtool.rope import Rope, rope_of
from kvtool.runtime import Engine
from kvtool.runtime.selection import keep, selector
from kvtool.runtime.split import SplitStore
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.stores import PAGE
from kvtool.windows import WindowPlan

SINK, WINDOW = 3, 8
RING = SINK + WINDOW
S, F = True, False
MIXED = ([S, F], [F, F], [S, S])
OWN = {"gpt_oss": {**EXPERTS, **SINKS, **ALL_FULL, "sliding_window": 24}}
"""What some families need, for every layer to see everything."""
ORIGINALS = [*FAMILIES, *OWN]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed))


def make_plan(checkpoint, streaming=MIXED, prefill="dense", budgets=None, policy=None) -> Plan:
    layers = tuple(
        LayerPlan(tuple(heads), SINK, WINDOW, None if budgets is None else tuple(budgets[i]))
        for i, heads in enumerate(streaming)
    )
    return Plan(base_of(checkpoint), layers, prefill, policy)


def beside(tiny, plan_of, masked):
    """`get(family, **plan)`: an engine and, on the same weights, the masked original."""
    made = {}

    def get(family="llama", kv_heads=2, **options):
        key = repr((family, kv_heads, sorted(options.items())))
        if key not in made:
            own = {"num_key_value_heads": kv_heads, **OWN.get(family, {})}
            checkpoint = Checkpoint.open(str(tiny(family, **own)))
            plan = plan_of(checkpoint, **options)
            made[key] = Engine.load(checkpoint, plan=plan), masked(checkpoint, plan)
        return made[key]

    return get


@pytest.fixture(scope="session")
def loaded(tiny):
    return beside(tiny, make_plan, Masked)


class MaskedAttention(nn.Module):
    """Attention with a mask `[H, T, T]` over all tokens, every score written out."""

    def __init__(self, module, name: str, rope: Rope, plan: Plan, index: int) -> None:
        super().__init__()
        self.stages, self.rope, self.plan = GroupedQueryAttention(module, name), rope, plan
        self.layer = plan.layers[index]
        self.prompt = 0

    def visible(self, unrotated, q, k, v) -> torch.Tensor:
        """What the plan means, `[H, T, T]`, for a text whose first `prompt` tokens are a prompt."""
        layer, prompt, n = self.layer, self.prompt, k.shape[1]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        causal = j <= i
        masks = []
        for head, (streams, budget) in enumerate(zip(layer.streaming, layer.budgets, strict=True)):
            mask = causal
            if streams:
                mask = causal & ((j < layer.sink) | (i - j < layer.window))
                if self.plan.prefill == "dense":
                    mask = torch.where(i < prompt, causal, mask)
            elif budget is not None and prompt:
                group = q.shape[0] // k.shape[0]
                own = slice(head * group, (head + 1) * group)
                logits = self.stages.sink_logits
                logits = None if logits is None else logits[own]
                scaling = self.stages.layout.scaling
                policy = selector(self.plan.policy, scaling, self.rope, logits)
                policy.see(q[own, :prompt], unrotated[own, :prompt], 0)
                scores = policy.scores(k[head : head + 1, :prompt], v[head : head + 1, :prompt])[0]
                dropped = torch.ones(n, dtype=torch.bool)
                dropped[keep(scores, budget)] = False
                dropped[prompt:] = False
                mask = causal & ((i < prompt) | ~dropped)
            masks.append(mask)
        return torch.stack(masks)

    def forward(self, hidden_states, position_embeddings, **_):
        stages = self.stages
        q, k, v = stages.project(hidden_states)
        unrotated, k = stages.normalise(q, k)
        repeats = stages.layout.head_dim // position_embeddings[0].shape[-1]  # 2 in gpt-oss
        tables = (table[:, None].repeat(1, 1, 1, repeats) for table in position_embeddings)
        q, k = stages.rotate(unrotated, k, *tables)
        group = q.shape[1] // k.shape[1]
        mask = self.visible(unrotated[0], q[0], k[0], v[0]).repeat_interleave(group, dim=0)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (stages.layout.scaling * q @ k.mT).masked_fill(~mask, -torch.inf)
        count = scores.shape[-1]
        if stages.sink_logits is not None:  # a key of every head, with that score and no value
            own = stages.sink_logits[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, own), dim=-1)
        weights = scores.softmax(-1)[..., :count]
        return stages.output(weights @ v, hidden_states), None


class Masked:
    """transformers' own model with nothing but the mask of its attention changed."""

    attention = MaskedAttention

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.model = checkpoint.load_transformers(torch.float32)
        rope = rope_of(checkpoint.hf_config())
        for i, layer in enumerate(decoder_layers(self.model)):
            layer.self_attn = self.attention(layer.self_attn, str(i), rope, plan, i)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        for layer in decoder_layers(self.model):
            layer.self_attn.prompt = prompt
        return self.model(ids[None]).logits[0]


def same(got, expected) -> None:
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), atol=1e-4, rtol=1e-3)


def poison(cache) -> None:
    """NaN wherever nothing was stored: reading it would show."""
    for store in cache.stores:
        for part in store.parts if isinstance(store, SplitStore) else [store]:
            for plane in part.planes.values():
                plane.fill_(float("nan"))


def prefill_and_decode(engine, ids, prompt, **options) -> torch.Tensor:
    """Logits after every token: a prompt in one call, then one token at a time."""
    cache = engine.new_cache(1, len(ids))
    poison(cache)
    logits = [engine.extend(cache, ids[:prompt], all_logits=True, **options)]
    logits += [engine.decode(cache, token[None]) for token in ids[prompt:]]
    return torch.cat(logits)


# ------------------------------------------------------------------------------ streaming heads


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("family", ORIGINALS)
def test_prefill_then_decode_is_the_masked_original_for_three_turns_of_the_ring(
    loaded, family, prefill
):
    engine, masked = loaded(family, prefill=prefill)
    ids = tokens(20 + 3 * WINDOW + 2)
    same(prefill_and_decode(engine, ids, 20), masked(ids, 20))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("prompt", [1, 2, SINK, RING - 1, RING, RING + 1, 40])
def test_prompts_below_at_and_above_the_ring(loaded, prefill, prompt):
    engine, masked = loaded(prefill=prefill)
    ids = tokens(prompt + 2 * RING, seed=prompt)
    same(prefill_and_decode(engine, ids, prompt), masked(ids, prompt))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize(
    ("kv_heads", "streaming"),
    [
        (1, ([S], [F], [S])),
        (2, ([F, S], [S, F], [S, S])),
        (4, ([S, F, F, F], [F, S, S, S], [S, F, S, F])),
        (4, ([S, S, S, S], [S, S, S, S], [S, S, S, S])),
    ],
)
def test_any_heads_of_a_layer_may_stream(loaded, prefill, kv_heads, streaming):
    engine, masked = loaded("qwen2", kv_heads, streaming=streaming, prefill=prefill)
    ids = tokens(50)
    same(prefill_and_decode(engine, ids, 30), masked(ids, 30))


def test_a_plan_of_full_heads_changes_no_bit(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    engines = [
        Engine.load(checkpoint, plan=plan)
        for plan in (None, make_plan(checkpoint, ([F, F], [F, F], [F, F])))
    ]
    ids = tokens(40)
    assert torch.equal(*(prefill_and_decode(engine, ids, 30) for engine in engines))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_a_text_that_fits_the_ring_is_that_of_the_original(loaded, prefill):
    engine, _ = loaded(prefill=prefill)
    original = Engine.load(engine.checkpoint)
    ids = tokens(RING)
    same(prefill_and_decode(engine, ids, 6), prefill_and_decode(original, ids, 6))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_chunks_changes_nothing(loaded, prefill, chunk):
    engine, _ = loaded(prefill=prefill)
    ids = tokens(80)
    whole, pieces = (prefill_and_decode(engine, ids, 70, chunk=c) for c in (512, chunk))
    same(pieces, whole)


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
@pytest.mark.parametrize("prompt", [2, 30])
@pytest.mark.parametrize("chunk", [5, 512])
def test_a_question_in_one_call_is_a_question_token_by_token(loaded, prefill, prompt, chunk):
    engine, _ = loaded(prefill=prefill)
    ids = tokens(prompt + 25)
    expected = prefill_and_decode(engine, ids, prompt)
    cache = engine.new_cache(1, len(ids))
    poison(cache)
    engine.extend(cache, ids[:prompt])
    got = engine.extend(cache, ids[prompt:-1], all_logits=True, chunk=chunk)
    same(got, expected[prompt:-1])
    same(engine.decode(cache, ids[-1:]), expected[-1:])


def test_later_tokens_stream_even_if_the_prompt_was_dense(loaded):
    engine, masked = loaded()
    ids = tokens(60)
    cache = engine.new_cache(1, 60)
    got = [engine.extend(cache, part, all_logits=True) for part in ids.split(20)]
    same(torch.cat(got), masked(ids, 20))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_rows_of_different_lengths_are_each_as_if_alone(loaded, prefill):
    engine, _ = loaded(prefill=prefill)
    lengths, steps = (1, RING, 30, 9), 2 * WINDOW
    rows = [tokens(n + steps, seed=n) for n in lengths]
    expected = [
        prefill_and_decode(engine, ids, n)[n:] for ids, n in zip(rows, lengths, strict=True)
    ]
    cache = engine.new_cache(len(rows), 16)  # grows while the rings turn
    poison(cache)
    for row, (ids, n) in enumerate(zip(rows, lengths, strict=True)):
        engine.extend(cache, ids[:n], row, chunk=16)
    for step in range(steps):
        now = torch.stack([ids[n + step] for ids, n in zip(rows, lengths, strict=True)])
        same(engine.decode(cache, now), torch.stack([logits[step] for logits in expected]))


def test_generate_is_the_loop_by_hand_and_continues_what_is_stored(loaded):
    engine, _ = loaded()
    prompt = tokens(30)
    cache = engine.new_cache(1, 50)
    logits, text = engine.extend(cache, prompt), []
    for _ in range(15):
        text.append(int(logits.argmax()))
        logits = engine.decode(cache, torch.tensor(text[-1:]))[0]
    kept = engine.new_cache(1, 50)
    first = list(engine.generate([prompt.tolist()], max_new_tokens=8, ignore_eos=True, cache=kept))
    assert kept.lengths == [37]
    longer = [*prompt.tolist(), *text[:8]]
    rest = list(engine.generate([longer], max_new_tokens=7, ignore_eos=True, cache=kept))
    assert [step[0] for step in first + rest] == text


def test_prompt_keys_are_held_one_layer_at_a_time_and_not_afterwards(loaded, monkeypatch):
    engine, _ = loaded(streaming=([S, S], [S, S], [S, S]))
    held = []
    whole = SplitStore.add

    def watch(store, new, step):
        context = whole(store, new, step)
        held.append(sum(s.streaming.prompt is not None for s in step.stores))
        return context

    monkeypatch.setattr(SplitStore, "add", watch)
    cache = engine.new_cache(1, 64)
    before = cache.allocated_bytes
    engine.extend(cache, tokens(60))
    assert held == [0, 0, 0]
    assert cache.allocated_bytes == before
    engine.extend(engine.new_cache(1, 64), tokens(60), chunk=32)
    assert held[3:] == [1, 2, 3, 2, 1, 0]


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("streaming", [MIXED, ([S, S], [S, F], [S, S])])
def test_allocated_bytes_are_the_planned_ones(tiny, streaming):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    plan = make_plan(checkpoint, streaming)
    engine = Engine.load(checkpoint, plan=plan)
    for length in (1, PAGE - 1, PAGE, PAGE + 1, 100, 3 * PAGE):
        cache = engine.new_cache(1, length)
        engine.extend(cache, tokens(length))
        assert cache.allocated_bytes == plan.cache_bytes(length, 4)
    assert engine.new_cache(5, PAGE).allocated_bytes == 5 * plan.cache_bytes(PAGE, 4)


def test_planes_of_full_heads_grow_by_doubling_whole_pages(loaded):
    engine, _ = loaded(streaming=([S, F], [S, F], [S, F]))
    cache = engine.new_cache(1, 10)
    sizes = {cache.capacity}
    for token in tokens(2 * PAGE + 1):
        engine.decode(cache, token[None])
        sizes.add(cache.capacity)
    assert sorted(sizes) == [10, PAGE, 2 * PAGE, 4 * PAGE]
    cache = engine.new_cache(1, 10)
    engine.extend(cache, tokens(2 * PAGE + 1))
    assert cache.capacity == 3 * PAGE


# ------------------------------------------------------------------------------ going back


def test_a_snapshot_brings_back_what_a_question_overwrote(loaded):
    engine, _ = loaded()
    ids, questions = tokens(40), [tokens(2 * RING, seed=s) for s in (1, 2)]
    cache = engine.new_cache(2, 80)
    engine.extend(cache, tokens(25, seed=5), 1)
    engine.extend(cache, ids)
    saved = cache.snapshot(0)
    for question in questions:
        got = engine.extend(cache, question, all_logits=True)
        fresh = engine.new_cache(1, 80)
        engine.extend(fresh, ids)
        assert torch.equal(got, engine.extend(fresh, question, all_logits=True))
        cache.restore(0, saved)
        assert cache.lengths == [40, 25]


def test_a_retrieval_question_does_not_see_those_before_it(loaded, monkeypatch):
    engine, _ = loaded(
        streaming=([S, F], [F, F], [F, S]),
        budgets=([None, 40], [50, 36], [44, None]),
        policy="snapkv",
    )
    answers = []
    monkeypatch.setattr(retrieval, "is_exact", lambda text, _: answers.append(text) or False)
    first, second = (retrieval.Question(tokens(RING, seed=s).tolist(), "1") for s in (1, 2))
    for questions in ([first, second, first, second], [second]):
        retrieval.ask(engine, retrieval.Case("needle", 70, None, tokens(70).tolist(), questions))
    assert answers == [*answers[:2], *answers[:2], answers[1]]
    assert answers[0] != answers[1]


def test_a_row_goes_back_as_long_as_no_slot_was_overwritten_and_starts_over_after(loaded):
    engine, _ = loaded()
    ids = tokens(40)
    expected = prefill_and_decode(engine, ids, 5)
    for stored, length, back in [(RING, 6, 6), (RING + 1, 6, 0), (30, 30, 30), (30, 99, 30)]:
        cache = engine.new_cache(1, 40)
        engine.extend(cache, ids[:5])
        engine.extend(cache, ids[5:6])
        engine.extend(cache, torch.cat((ids[6:length], tokens(stored - 6, seed=3)))[: stored - 6])
        cache.crop(0, length)
        assert cache.lengths == [back]
        if back == 6:
            same(engine.extend(cache, ids[6:], all_logits=True), expected[6:])
        if back == 0:
            poison(cache)
            engine.extend(cache, ids[:5])
            same(engine.extend(cache, ids[5:], all_logits=True), expected[5:])


# ------------------------------------------------------------------------------ token budgets

RAGGED = ([40, None], [36, 50], [None, 45])
EQUAL = ([44, 44], [None, None], [44, 44])
NONE = ([F, F], [F, F], [F, F])
PROMPT = 70


@pytest.mark.parametrize("policy", ["snapkv", "expected"])
@pytest.mark.parametrize("family", ORIGINALS)
def test_budgets_are_a_mask_over_the_prompt_chosen_at_its_end(loaded, family, policy):
    engine, masked = loaded(family, streaming=NONE, budgets=RAGGED, policy=policy)
    ids = tokens(PROMPT + PAGE + 6)  # the tail grows on the way
    expected = masked(ids, PROMPT)
    same(prefill_and_decode(engine, ids, PROMPT), expected)
    cache = engine.new_cache(1, 1)
    engine.extend(cache, ids[:PROMPT])
    same(engine.extend(cache, ids[PROMPT:], all_logits=True), expected[PROMPT:])


@pytest.mark.parametrize("policy", ["snapkv", "expected"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_budgets_of_equal_heads_of_any_group(loaded, kv_heads, policy):
    budgets = ([44] * kv_heads, [None] * kv_heads, [20] * kv_heads)
    streaming = ([F] * kv_heads,) * 3
    engine, masked = loaded("qwen3", kv_heads, streaming=streaming, budgets=budgets, policy=policy)
    ids = tokens(PROMPT + 10)
    same(prefill_and_decode(engine, ids, PROMPT), masked(ids, PROMPT))


@pytest.mark.parametrize("prefill", ["dense", "streamed"])
def test_full_streaming_and_budgeted_heads_live_in_one_layer(loaded, prefill):
    engine, masked = loaded(
        "llama", 4,
        streaming=([F, S, F, S], [S, F, F, F], [F, F, S, F]),
        budgets=([38, None, None, None], [None, None, 50, 41], [40, 40, None, 40]),
        policy="snapkv", prefill=prefill,
    )  # fmt: skip
    ids = tokens(PROMPT + 2 * RING)
    same(prefill_and_decode(engine, ids, PROMPT), masked(ids, PROMPT))


@pytest.mark.parametrize("policy", ["snapkv", "expected"])
def test_a_prompt_within_the_budget_is_that_of_the_original(loaded, policy):
    engine, _ = loaded(streaming=NONE, budgets=EQUAL, policy=policy)
    ids = tokens(60)
    expected = prefill_and_decode(Engine.load(engine.checkpoint), ids, 44)
    same(prefill_and_decode(engine, ids, 44), expected)


@pytest.mark.parametrize("policy", ["snapkv", "expected"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_choose_the_same_tokens(loaded, policy, chunk):
    engine, _ = loaded(streaming=NONE, budgets=RAGGED, policy=policy)
    ids = tokens(PROMPT)
    kept = []
    for size in (512, chunk):
        cache = engine.new_cache(1, PROMPT)
        engine.extend(cache, ids, chunk=size)
        kept.append([store.budgeted.kept[0] for store in cache.stores])
    for whole, pieces in zip(*kept, strict=True):
        assert pieces.counts == whole.counts
        torch.testing.assert_close(pieces.keys, whole.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pieces.values, whole.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budgets", [RAGGED, EQUAL])
@pytest.mark.parametrize("chunk", [5, 512])
def test_a_question_about_a_budgeted_prompt_is_one_token_by_token(loaded, budgets, chunk):
    engine, _ = loaded(streaming=NONE, budgets=budgets, policy="expected")
    ids = tokens(PROMPT + 20)
    expected = prefill_and_decode(engine, ids, PROMPT)[PROMPT:]
    cache = engine.new_cache(1, PROMPT)
    engine.extend(cache, ids[:PROMPT])
    same(engine.extend(cache, ids[PROMPT:], all_logits=True, chunk=chunk), expected)


def test_budgeted_rows_of_different_lengths_are_each_as_if_alone(loaded):
    engine, _ = loaded(streaming=NONE, budgets=RAGGED, policy="snapkv")
    lengths, steps = (PROMPT, 3, 90), 10
    rows = [tokens(n + steps, seed=n) for n in lengths]
    cache = engine.new_cache(3, 64)
    poison(cache)
    for row, (ids, n) in enumerate(zip(rows, lengths, strict=True)):
        engine.extend(cache, ids[:n], row)
    expected = [
        prefill_and_decode(engine, ids, n)[n:] for ids, n in zip(rows, lengths, strict=True)
    ]
    for step in range(steps):
        now = torch.stack([ids[n + step] for ids, n in zip(rows, lengths, strict=True)])
        same(engine.decode(cache, now), torch.stack([logits[step] for logits in expected]))


def test_a_row_without_a_prompt_keeps_all_it_decodes(loaded):
    engine, _ = loaded(streaming=NONE, budgets=RAGGED, policy="snapkv")
    ids = tokens(80)
    cache = engine.new_cache(1, 80)
    got = torch.cat([engine.decode(cache, token[None]) for token in ids])
    same(got, prefill_and_decode(Engine.load(engine.checkpoint), ids, 1))


@pytest.mark.parametrize("budgets", [RAGGED, EQUAL, ([1, 200], [200, 200], [64, 63])])
@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 100, 2 * PAGE])
def test_bytes_of_budgeted_heads_are_the_planned_ones(tiny, budgets, length):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    plan = make_plan(checkpoint, NONE, budgets=budgets, policy="snapkv")
    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, length)
    full = sum(row.count(None) for row in budgets)
    assert cache.allocated_bytes == full * 2 * 4 * 16 * length  # no room for the prompt
    engine.extend(cache, tokens(length))
    assert cache.allocated_bytes == plan.cache_bytes(length, 4)
    for pages in (1, 2, 3):  # a tail is as long as what came after the prompt, in whole pages
        while cache.lengths[0] < length + pages * PAGE:
            engine.decode(cache, tokens(1))
        grown = sum(
            row.count(None) * (getattr(store, "full", store).capacity - length)
            for row, store in zip(budgets, cache.stores, strict=True)
        )
        assert cache.allocated_bytes == plan.cache_bytes(length, 4) + 2 * 4 * 16 * (
            (6 - full) * pages * PAGE + grown
        )


def test_a_budgeted_row_goes_back_to_its_prompt_and_no_further(loaded):
    engine, _ = loaded(streaming=NONE, budgets=RAGGED, policy="snapkv")
    ids = tokens(PROMPT + 20)
    expected = prefill_and_decode(engine, ids, PROMPT)[PROMPT:]
    cache = engine.new_cache(1, 128)
    engine.extend(cache, ids[:PROMPT])
    for length, back in [(PROMPT + 5, PROMPT + 5), (PROMPT, PROMPT), (PROMPT - 1, 0)]:
        engine.extend(cache, tokens(20, seed=8))
        cache.crop(0, PROMPT)
        engine.extend(cache, ids[PROMPT : PROMPT + 12])
        cache.crop(0, length)
        assert cache.lengths == [back]
        if back:
            same(engine.extend(cache, ids[back:], all_logits=True), expected[back - PROMPT :])
            cache.crop(0, PROMPT)
    engine.decode(cache, ids[:1])  # begins a row anew: nothing of the old prompt is seen
    original = Engine.load(engine.checkpoint)
    same(
        engine.decode(cache, ids[1:2]),
        original.extend(original.new_cache(1, 2), ids[:2])[None],
    )


def test_a_snapshot_serves_several_questions_of_a_budgeted_context(loaded):
    engine, _ = loaded(
        streaming=([S, F], [F, F], [F, S]),
        budgets=([None, 40], [50, 36], [44, None]),
        policy="expected",
    )
    context, questions = tokens(PROMPT), [tokens(30, seed=s) for s in (1, 2)]
    cache = engine.new_cache(1, 128)
    engine.extend(cache, context)
    saved = cache.snapshot(0)
    for question in questions:
        fresh = engine.new_cache(1, 128)
        engine.extend(fresh, context)
        cache.restore(0, saved)
        got = engine.extend(cache, question, all_logits=True)
        assert torch.equal(got, engine.extend(fresh, question, all_logits=True))


# ------------------------------------------------------------------------------ refusals


def test_a_plan_for_another_model_is_refused(tiny):
    plan = make_plan(Checkpoint.open(str(tiny("llama"))))
    with pytest.raises(PlanError):
        Engine.load(Checkpoint.open(str(tiny("qwen3"))), plan=plan)


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_latent_models_have_no_heads_to_plan(tiny, tmp_path, target):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    options = planning.ConvertOptions(
        method="transmla", target=target, kv_budget="60%", freqfold="2", tokens=512
    )
    conversion.convert(checkpoint, tmp_path / "latent", options)
    with pytest.raises(UnsupportedModelError, match="heads share one latent"):
        Engine.load(Checkpoint.open(str(tmp_path / "latent")), plan=make_plan(checkpoint))


def test_heads_of_a_layer_with_a_sliding_window_cannot_stream(tiny):
    checkpoint = Checkpoint.open(str(tiny("mistral", sliding_window=24)))
    with pytest.raises(PlanError, match=r"the window that it sees, and the plan is for KV heads"):
        Engine.load(checkpoint, plan=make_plan(checkpoint))
    plan = Plan(base_of(checkpoint), (LayerPlan((), kept=WindowPlan(2, 16, 25)),) * 3)
    with pytest.raises(PlanError, match="of 24 tokens of 2 heads x 16, and 25 tokens"):
        Engine.load(checkpoint, plan=plan)


def test_reordered_heads_compute_the_same_layer(tiny):
    checkpoint = Checkpoint.open(str(tiny("qwen2", num_key_value_heads=2)))
    module = decoder_layers(checkpoint.load_transformers(torch.float32))[0].self_attn
    module.o_proj.bias = nn.Parameter(torch.randn(64))
    stages = GroupedQueryAttention(module, "layer")
    hidden = torch.randn(1, 9, 64)

    def run():
        q, k, v = stages.project(hidden)
        return k, stages.output(stages.attend(*stages.normalise(q, k), v), hidden)

    keys, expected = run()
    stages.reorder_kv_heads([1, 0])
    swapped, got = run()
    assert torch.equal(swapped, keys[:, [1, 0]])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_only_layers_that_drop_something_get_a_split_store(loaded):
    engine, _ = loaded()
    assert [isinstance(a, SplitAttention) for a in engine.attentions] == [True, False, True]


@pytest.mark.parametrize("streaming", [MIXED, NONE])
def test_an_interrupted_row_is_fed_again_before_it_is_believed(loaded, monkeypatch, streaming):
    engine, _ = loaded(streaming=streaming)
    cache, other = engine.new_cache(1, 128), engine.new_cache(1, 128)
    text, more = tokens(60), tokens(20, seed=1)
    engine.extend(cache, text)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.attentions[2], "attention", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.extend(cache, tokens(30, seed=2))
    held = cache.lengths[0]
    if held:
        engine.extend(other, text[:held])
    fed = torch.cat((text, more))[held:]
    torch.testing.assert_close(
        engine.extend(cache, fed), engine.extend(other, fed), atol=1e-4, rtol=0
    )
