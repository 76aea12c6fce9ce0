"""The runtime computes what transformers computes, from a cache of exactly the bytes it states."""

import pytest
import torch
from conftest import FAMILIES, make_tokenizer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kvtool.checkpoint import Checkpoint
from kvtool.convert import conversion, planning
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.kernels.decode_attention import decode_attention
from kvtool.kernels.latent_attention import latent_decode_attention
from kvtool.kernels.linear import linear
from kvtool.kernels.linear.reference import in_blocks
from kvtool.runtime import Engine, Sampling
from kvtool.runtime.layers import DecodeLinear, LatentRuntimeAttention

STOCK = [*FAMILIES, "windowed"]
LATENT = ["llama", "mistral", "qwen2", "qwen3", "llama-kvtool", "exact"]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed))


def open_stock(tiny, name) -> Checkpoint:
    if name == "windowed":
        return Checkpoint.open(str(tiny("mistral", sliding_window=24)))
    return Checkpoint.open(str(tiny(name)))


@pytest.fixture(scope="session")
def latent(tiny, tmp_path_factory):
    """``latent(name)``: an engine on a converted model."""
    made = {}

    def get(name: str) -> Engine:
        if name not in made:
            family = "llama" if name == "exact" else name.removesuffix("-kvtool")
            target = "kvtool" if name in ("qwen3", "llama-kvtool") else "transformers"
            options = planning.ConvertOptions(
                method="exact" if name == "exact" else "transmla",
                target=target,
                kv_budget=None if name == "exact" else "60%",
                freqfold="auto" if name == "exact" else "2",
                tokens=2048,
            )
            output = tmp_path_factory.mktemp("latent") / name
            conversion.convert(Checkpoint.open(str(tiny(family))), output, options)
            made[name] = Engine.load(Checkpoint.open(str(output)))
        return made[name]

    return get


@pytest.fixture(params=[*STOCK, *(f"latent-{name}" for name in LATENT)])
def engine(request, tiny, latent) -> Engine:
    if request.param.startswith("latent-"):
        return latent(request.param.removeprefix("latent-"))
    return Engine.load(open_stock(tiny, request.param))


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_prefill_in_chunks_equals_transformers(tiny, name, chunk):
    checkpoint = open_stock(tiny, name)
    ids = tokens(150)
    with torch.inference_mode():
        expected = checkpoint.load_transformers(torch.float32)(ids[None]).logits[0]
    engine = Engine.load(checkpoint)
    got = engine.extend(engine.new_cache(1, 150), ids, all_logits=True, chunk=chunk)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in LATENT if n not in ("qwen3", "llama-kvtool")])
def test_a_stock_mla_checkpoint_gives_the_logits_of_transformers(latent, name):
    engine, ids = latent(name), tokens(150)
    with torch.inference_mode():
        expected = engine.checkpoint.load_transformers(torch.float32)(ids[None]).logits[0]
    got = engine.extend(engine.new_cache(1, 150), ids, all_logits=True, chunk=64)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)


def test_decode_equals_prefill_for_rows_of_different_lengths(engine):
    lengths, steps = (1, 24, 63, 25), 4
    rows = [tokens(n + steps, seed=n) for n in lengths]
    expected = [
        engine.extend(engine.new_cache(1, len(ids)), ids, all_logits=True)[-steps:] for ids in rows
    ]
    cache = engine.new_cache(len(rows), 80)
    poison(cache)
    for row, (ids, n) in enumerate(zip(rows, lengths, strict=True)):
        engine.extend(cache, ids[:n], row, chunk=16)
    for step in range(steps):
        now = torch.stack([ids[n + step] for ids, n in zip(rows, lengths, strict=True)])
        got = engine.decode(cache, now)
        wanted = torch.stack([logits[step] for logits in expected])
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-4)
    assert cache.lengths == [n + steps for n in lengths]


def test_decode_of_equal_lengths_equals_prefill(engine):
    ids = tokens(40)
    expected = engine.extend(engine.new_cache(1, 40), ids, all_logits=True)
    cache = engine.new_cache(2, 40)
    poison(cache)
    for row in (0, 1):
        engine.extend(cache, ids[:30], row)
    for at in range(30, 40):
        got = engine.decode(cache, ids[at].expand(2))
        torch.testing.assert_close(got, expected[at].expand(2, -1), atol=2e-3, rtol=1e-4)


def poison(cache) -> None:
    """NaN wherever nothing was stored: reading it would show."""
    for store in cache.stores:
        for plane in store.planes.values():
            plane.fill_(float("nan"))


@pytest.mark.parametrize("lengths", [[50, 50], [1, 24, 50]])
@pytest.mark.parametrize("name", LATENT)
def test_absorbed_decode_equals_expanded_attention(latent, name, lengths):
    attention = latent(name).attentions[0]
    stages, batch = attention.stages, len(lengths)
    store = attention.new_store(batch, 60)
    latents = store.planes["latents"].fill_(torch.nan)
    q = torch.randn(batch, 1, stages.heads, stages.rope_query.shape[1])
    angles = torch.rand(batch, 1, stages.rope_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = []
    for b, n in enumerate(lengths):
        latents[b, :n] = torch.randn(n, latents.shape[-1])
        c, k_pe = latents[b : b + 1, :n].split([stages.rank, stages.rope_dim], dim=-1)
        row = slice(b, b + 1)
        expected.append(stages.attend_expanded(q[row], c, k_pe, cos[row], sin[row]))
    got = attention._absorbed(q[:, 0], cos, sin, lambda q: store.attend(q, None, lengths))
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LATENT)
def test_chunks_store_the_same_latents_and_give_the_same_attention(latent, name):
    engine, ids = latent(name), tokens(50)
    caches = [engine.new_cache(1, 50) for _ in range(2)]
    logits = [
        engine.extend(cache, ids, all_logits=True, chunk=chunk)
        for cache, chunk in zip(caches, (7, 2048), strict=True)
    ]
    whole, pieces = (cache.stores[0].planes["latents"] for cache in caches)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    probabilities = [x.softmax(-1) for x in logits]
    torch.testing.assert_close(*probabilities, atol=1e-5, rtol=1e-3)


def test_a_rope_query_that_reads_the_content_query_is_not_computed_twice(latent):
    stages = latent("llama").attentions[0].stages
    assert stages.down_sizes[0] == stages.heads * 16  # not heads * (16 + d_r)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": 20},
        {"q_lora_rank": 20, "attention_bias": True},
        {"rope_interleave": False},
        {"rope_parameters": YARN},
        {"unread": 4},
        {"unwritten": 4},
    ],
    ids=str,
)
def test_a_mla_model_that_no_gqa_gave_birth_to_decodes_as_transformers_does(tmp_path, overrides):
    torch.manual_seed(0)
    fields = {k: v for k, v in overrides.items() if not k.startswith("un")}
    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2, vocab_size=300,
        max_position_embeddings=256, n_routed_experts=1, n_group=1, topk_group=1,
        num_experts_per_tok=1, bos_token_id=0, eos_token_id=1, **{"q_lora_rank": None} | fields,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2) if weight.ndim == 2 else weight.add_(
                0.1 * torch.randn_like(weight)
            )
        for layer in model.model.layers:
            # Latent columns that nobody reads still count in the norm; unwritten ones are zero.
            layer.self_attn.kv_b_proj.weight[:, 24 - overrides.get("unread", 0) :] = 0
            layer.self_attn.kv_a_proj_with_mqa.weight[24 - overrides.get("unwritten", 0) : 24] = 0
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ids = tokens(40)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    engine = Engine.load(Checkpoint.open(str(tmp_path)))
    assert engine.attentions[0].stages.rank == 24 - overrides.get("unwritten", 0)
    cache = engine.new_cache(1, 40)
    got = [engine.extend(cache, ids[:30], all_logits=True)]
    got += [engine.decode(cache, ids[t : t + 1]) for t in range(30, 40)]
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-4, rtol=1e-4)


def test_float16_is_refused_where_the_latent_norm_would_underflow(latent):
    checkpoint = latent("llama").checkpoint
    with pytest.raises(UnsupportedModelError, match="float16"):
        Engine.load(checkpoint, dtype=torch.float16)
    Engine.load(latent("llama-kvtool").checkpoint, dtype=torch.float16)


def test_a_prompt_that_is_in_the_cache_already_is_continued(tiny):
    engine = Engine.load(open_stock(tiny, "llama"))
    prompt = tokens(20).tolist()
    expected = list(engine.generate([prompt], max_new_tokens=5, ignore_eos=True))
    cache = engine.new_cache(1, 40)
    engine.extend(cache, torch.tensor(prompt))
    got = list(engine.generate([prompt], max_new_tokens=5, ignore_eos=True, cache=cache))
    assert got == expected


@pytest.mark.parametrize("name", LATENT)
def test_allocated_bytes_are_the_stated_ones(latent, name):
    engine = latent(name)
    plan = 32 if name == "exact" else int(64 * 0.6) // 2
    rope_and_rank = [a.stages.rank + a.stages.rope_dim for a in engine.attentions]
    cache = engine.new_cache(3, 100)
    assert cache.bytes_per_token() == 4 * sum(rope_and_rank)
    assert all(n <= 2 * plan for n in rope_and_rank)
    assert all(isinstance(a, LatentRuntimeAttention) for a in engine.attentions)
    assert {tuple(s.planes) for s in cache.stores} == {("latents",)}


def test_up_projections_are_kept_once_per_kv_head(latent):
    assert latent("llama").attentions[0].absorb_query.shape[0] == 2  # not 4, one per query head


def test_dense_cache_is_that_of_grouped_queries(tiny):
    engine = Engine.load(open_stock(tiny, "llama"))
    cache = engine.new_cache(2, 64)
    assert cache.bytes_per_token() == 3 * 2 * 2 * 16 * 4
    assert cache.allocated_bytes == cache.bytes_per_token() * 2 * 64


def test_cropping_forgets_and_growing_keeps(engine):
    ids = tokens(90)
    expected = engine.extend(engine.new_cache(1, 90), ids, all_logits=True)
    cache = engine.new_cache(1, 20)
    engine.extend(cache, ids[:10])
    engine.extend(cache, tokens(30, seed=9))  # outgrows the 20 tokens
    assert cache.capacity >= 40
    cache.crop(0, 10)
    kept = cache.lengths[0]  # a sliding window of 24 has to start over
    got = engine.extend(cache, ids[kept:], all_logits=True)[10 - kept :]
    torch.testing.assert_close(got, expected[10:], atol=2e-3, rtol=1e-4)


def test_rows_do_not_disturb_each_other(engine):
    prompts = [tokens(n, seed=n).tolist() for n in (5, 17, 40)]
    together = list(engine.generate(prompts, max_new_tokens=12, ignore_eos=True))
    for row, prompt in enumerate(prompts):
        alone = list(engine.generate([prompt], max_new_tokens=12, ignore_eos=True))
        assert [step[row] for step in together] == [step[0] for step in alone]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(tiny, name):
    checkpoint = open_stock(tiny, name)
    prompt = tokens(20)
    model = checkpoint.load_transformers(torch.float32)
    expected = model.generate(
        prompt[None], max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=-1
    )[0, 20:].tolist()
    engine = Engine.load(checkpoint)
    steps = engine.generate([prompt.tolist()], max_new_tokens=30, ignore_eos=True)
    assert [step[0] for step in steps] == expected


def test_a_finished_row_yields_none_and_the_others_go_on(tiny):
    engine = Engine.load(open_stock(tiny, "llama"))
    prompts = [tokens(5, seed=1).tolist(), tokens(9, seed=2).tolist()]
    free = list(engine.generate(prompts, max_new_tokens=8, ignore_eos=True))
    engine.eos_ids = {free[2][0]}
    stop = [step[0] for step in free].index(free[2][0])
    steps = list(engine.generate(prompts, max_new_tokens=8))
    assert [s[0] for s in steps[: stop + 1]] == [s[0] for s in free[: stop + 1]]
    assert all(s[0] is None for s in steps[stop + 1 :])


def test_a_seed_fixes_the_text_and_another_changes_it(tiny):
    engine = Engine.load(open_stock(tiny, "llama"))
    hot = Sampling(temperature=2.0, top_p=0.95, top_k=100, min_p=0.001, repetition_penalty=1.1)

    def text(seed):
        prompt = [tokens(6).tolist()]
        return [s[0] for s in engine.generate(prompt, max_new_tokens=20, sampling=hot, seed=seed)]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_text_longer_than_the_context_is_refused_with_both_numbers(tiny):
    engine = Engine.load(open_stock(tiny, "llama"))
    with pytest.raises(UsageError, match=r"513.*512"):
        engine.extend(engine.new_cache(1, 600), tokens(513))
    with pytest.raises(UsageError, match=r"520.*512"):
        list(engine.generate([tokens(500).tolist()], max_new_tokens=20))


@pytest.mark.parametrize("lengths", [[1], [7, 7], [1, 5, 30]])
def test_decode_kernels_equal_the_definition_and_ignore_the_rest(lengths):
    batch, capacity = len(lengths), 32
    q = torch.randn(batch, 6, 8, dtype=torch.float64)
    keys = torch.full((batch, 2, capacity, 8), torch.nan, dtype=torch.float64)
    latents = torch.full((batch, capacity, 8), torch.nan, dtype=torch.float64)
    for b, n in enumerate(lengths):
        keys[b, :, :n] = torch.randn(2, n, 8, dtype=torch.float64)
        latents[b, :n] = torch.randn(n, 8, dtype=torch.float64)
    dense = decode_attention(q, keys, keys.clone(), lengths, 0.4)
    absorbed = latent_decode_attention(q, latents, 5, lengths, 0.4)
    for b, n in enumerate(lengths):
        for head in range(6):
            k = keys[b, head // 3, :n]
            torch.testing.assert_close(dense[b, head], torch.softmax(0.4 * k @ q[b, head], 0) @ k)
            c = latents[b, :n]
            expected = torch.softmax(0.4 * c @ q[b, head], 0) @ c[:, :5]
            torch.testing.assert_close(absorbed[b, head], expected)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("out", [1, 7, 12, 300])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_linear_over_few_tokens_equals_linear(tokens, out, threads):
    before = torch.get_num_threads()
    x, weight, bias = torch.randn(1, tokens, 24), torch.randn(out, 24), torch.randn(out)
    try:
        torch.set_num_threads(threads)
        for b in (None, bias):
            expected = torch.nn.functional.linear(x, weight, b)
            for product in (linear, in_blocks):
                torch.testing.assert_close(product(x, weight, b), expected, atol=1e-4, rtol=1e-4)
            swapped = in_blocks(x.transpose(0, 1), weight, b)
            torch.testing.assert_close(swapped, expected.transpose(0, 1), atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_every_linear_layer_of_the_host_is_the_fast_one_and_shares_its_weights(tiny):
    engine = Engine.load(open_stock(tiny, "qwen2"))
    layers = [m for m in engine.model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers
    assert all(type(layer) is DecodeLinear for layer in layers)
    tied = Engine.load(Checkpoint.open(str(tiny("llama", tie_word_embeddings=True)))).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
