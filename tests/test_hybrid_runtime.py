"""Hybrid checkpoints: the stock layout is exact, and the runtime carries states through any cut."""

import pytest
import torch
from _hybrid_tools import MULTIPLIERS, write_hybrid

from kvtool._transformers import cache_argument
from kvtool.calibrate.past import read_past
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.hybrid import HybridModel
from kvtool.layout import decoder_layers
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler

IDS = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(3))
FAMILIES = ("llama", "mistral", "qwen2")


@torch.inference_mode()
def stock_logits(path, ids=IDS):
    model = Checkpoint.open(str(path)).load_transformers(torch.float32)
    return model(ids[None], use_cache=False).logits[0]


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    """A hybrid with mixers in layers 0 and 2 of 3."""
    path = tmp_path_factory.mktemp("hybrid")
    write_hybrid(tiny("llama"), path, [0, 2])
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}])
def test_all_layers_kept_the_logits_are_the_sources_to_the_bit(tiny, tmp_path, family, overrides):
    source = tiny(family, **overrides)
    write_hybrid(source, tmp_path, [])  # loading refuses missing and unexpected tensors
    assert torch.equal(stock_logits(tmp_path), stock_logits(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_mixer_is_written_exactly_whatever_the_norm_takes_its_mean_over(
    tiny, tmp_path, family
):
    source = tiny(family)
    mixers = write_hybrid(source, tmp_path, [0, 2])
    model = Checkpoint.open(str(source)).load_transformers(torch.float32)
    meant = HybridModel(model, mixers, lambda i, _: mixers[i])
    with torch.inference_mode():
        expected = model.lm_head(meant.states(IDS[None]))[0]
    torch.testing.assert_close(stock_logits(tmp_path), expected, rtol=1e-4, atol=1e-4)
    engine = Engine.load(Checkpoint.open(str(tmp_path)))
    ours = engine.extend(engine.new_cache(1, 90), IDS, all_logits=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    stock = Checkpoint.open(str(tmp_path)).load_transformers(torch.float32)
    for layer in decoder_layers(stock):
        if layer.mamba is not None:
            norm = layer.mamba.norm
            if not hasattr(norm, "group_size"):
                pytest.skip("in this version of transformers all channels have one mean")
            norm.group_size = len(norm.weight) // (1 if norm.group_size < len(norm.weight) else 4)
    with torch.inference_mode():
        other = stock(IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_stock_mixer_with_groups_norm_and_multipliers_runs_as_in_transformers(tmp_path, groups):
    from conftest import make_tokenizer
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    torch.manual_seed(groups)
    config = GraniteMoeHybridConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, shared_intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["mamba", "attention", "mamba"], num_local_experts=0, num_experts_per_tok=0,
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=12, mamba_n_groups=groups, mamba_expand=2,
        embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.7,
        attention_multiplier=0.2, max_position_embeddings=512,
    )  # fmt: skip
    model = GraniteMoeHybridForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    engine = Engine.load(Checkpoint.open(str(tmp_path)))
    cache = engine.new_cache(1, 90)
    ours = engine.extend(cache, IDS[:50], all_logits=True)
    steps = torch.stack([engine.decode(cache, token[None])[0] for token in IDS[50:]])
    expected = stock_logits(tmp_path)  # its attention has no positions: its config says no rope
    torch.testing.assert_close(torch.cat((ours, steps)), expected, rtol=1e-4, atol=1e-4)


def test_calibration_reads_a_granite_without_mixers_as_transformers_does(tiny, tmp_path):
    write_hybrid(tiny("llama"), tmp_path, [], **MULTIPLIERS)
    expected = stock_logits(tmp_path)
    stream = LayerStream(Checkpoint.open(str(tmp_path)))
    hidden = stream.embed(IDS[None])
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer))
    torch.testing.assert_close(stream.logits(hidden)[0], expected, rtol=1e-4, atol=1e-4)
    past = read_past(TailModel(stream), IDS, 40)
    log_probabilities = expected[-40:].log_softmax(dim=-1)
    torch.testing.assert_close(past.expected, log_probabilities, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuts", [[90], [1, 89], [3, 1, 2, 60, 24], [64, 26], [1] * 90])
def test_prefill_pieces_and_steps_agree(hybrid, cuts):
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    cache = engine.new_cache(1, 90)
    parts = [engine.extend(cache, piece, all_logits=True) for piece in IDS.split(cuts)]
    torch.testing.assert_close(torch.cat(parts), stock_logits(hybrid), rtol=1e-4, atol=1e-4)


def test_what_stock_transformers_makes_of_tokens_appended_together(hybrid):
    """It once dropped the state before them without a word; whatever it does, ours is right."""
    model = Checkpoint.open(str(hybrid)).load_transformers(torch.float32)
    with torch.inference_mode():
        own, first = cache_argument(), model(IDS[None, :40], use_cache=True)
        appended = model(IDS[None, 40:], **{own: first[own]}).logits[0]
    whole = stock_logits(hybrid)
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    cache = engine.new_cache(1, 90)
    engine.extend(cache, IDS[:40])
    ours = engine.extend(cache, IDS[40:], all_logits=True)
    torch.testing.assert_close(ours, whole[40:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(appended, whole[40:], rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_do_not_disturb_each_other(hybrid):
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    cache = engine.new_cache(2, 90)
    engine.extend(cache, IDS[:40], 0)
    engine.extend(cache, IDS[:10], 1)
    more = IDS[40:50]
    both = torch.stack([engine.decode(cache, token.expand(2)) for token in more])
    for row, start in enumerate((40, 10)):
        alone = engine.new_cache(1, 90)
        engine.extend(alone, IDS[:start])
        expected = engine.extend(alone, more, all_logits=True)
        torch.testing.assert_close(both[:, row], expected, rtol=1e-4, atol=1e-4)


def test_a_snapshot_brings_the_state_back_and_a_crop_starts_over(hybrid):
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    cache = engine.new_cache(1, 90)
    engine.extend(cache, IDS[:40])
    saved = cache.snapshot(0)
    expected = engine.extend(cache, IDS[40:60], all_logits=True)
    cache.restore(0, saved)
    assert torch.equal(engine.extend(cache, IDS[40:60], all_logits=True), expected)
    cache.crop(0, 59)  # a state cannot go back by a token
    assert cache.lengths == [0]
    again = engine.extend(cache, IDS[:60], all_logits=True)[40:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_the_state_takes_the_same_bytes_at_any_length(hybrid):
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    short, long = (engine.new_cache(1, n) for n in (128, 512))
    sizes = [[store.allocated_bytes for store in cache.stores] for cache in (short, long)]
    state, conv = 4 * 16 * 16, 3 * 3 * 64  # fp32; three planes of conv inputs of x, B and C
    assert sizes[0][0] == sizes[1][0] == sizes[0][2] == 4 * (state + conv)
    assert sizes[1][1] == 4 * sizes[0][1]
    memory = RowMemory(engine)
    assert memory.bytes_per_token == 2 * 2 * 16 * 4
    assert memory.constant == sizes[0][0] + sizes[0][2]


def test_requests_share_what_was_marked_and_answer_alike(hybrid):
    engine = Engine.load(Checkpoint.open(str(hybrid)))
    prompt = IDS.tolist() * 2  # longer than a piece
    alone = [row[0] for row in engine.generate([prompt], max_new_tokens=6, ignore_eos=True)]
    scheduler = Scheduler(engine, 10**8)
    requests = [Request(prompt, 6, ignore_eos=True), Request([*prompt, 5], 6, ignore_eos=True)]
    for request in requests:
        scheduler.add(request)
        while not scheduler.idle:
            scheduler.step()
    assert requests[0].tokens == alone
    assert requests[1].cached == 128
    longer = engine.generate([[*prompt, 5]], max_new_tokens=6, ignore_eos=True)
    assert requests[1].tokens == [row[0] for row in longer]
