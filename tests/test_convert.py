"""Conversions to MLA: what is lossless, what stays untouched, what is written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _convert_tools import (
    LLAMA3,
    MANIFEST,
    PROJECTIONS,
    YARN,
    convert,
    digests,
    edited_copy,
    engine,
    engine_greedy,
    engine_logits,
    greedy,
    logits,
    mean_kl,
    one_thread,
    random_ids,
    stock,
    vllm_epsilon,
    weights,
)
from conftest import FAMILIES, make_tokenizer
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, rms_norm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.convert import conversion, deepseek_v3, planning, targets, transmla
from kvtool.convert.verify import verify
from kvtool.corpus import calibration_text
from kvtool.recipe import ConvertStep, load_recipe
from kvtool.runtime import Engine

Tiny = Callable[..., Path]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)


# --------------------------------------------------------------------------------------- exact

EXACT = {
    **{family: (family, "transformers", {}) for family in ("llama", "mistral", "qwen2")},
    **{f"{family}-kvtool": (family, "kvtool", {}) for family in FAMILIES},
    "vllm": ("llama", "vllm", {"num_key_value_heads": 1}),
    "vllm-tied": ("llama", "vllm", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "tied": ("llama", "transformers", {"tie_word_embeddings": True}),
    "tied-kvtool": ("qwen3", "kvtool", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", "transformers", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", "transformers", {"rope_parameters": YARN}),
    "yarn-kvtool": ("qwen3", "kvtool", {"rope_parameters": YARN}),
    "mha": ("llama", "transformers", {"num_key_value_heads": 4}),
    "head-24": ("llama", "transformers", {"head_dim": 24}),
    "qwen2-one-kv-head": ("qwen2", "transformers", {"num_key_value_heads": 1}),
    "qwen2-head-24": ("qwen2", "transformers", {"head_dim": 24}),
    "bias-everywhere": ("llama", "transformers", {"attention_bias": True}),
    "eps-1e-5": ("qwen2", "transformers", {"rms_norm_eps": 1e-5}),
}


@pytest.fixture(params=EXACT.values(), ids=EXACT.keys())
def lossless(request, converted) -> tuple[str, Path, Path]:
    """A target, a model, and its exact conversion."""
    family, target, overrides = request.param
    return target, *converted(family, overrides, method="exact", target=target)


def test_exact_gives_the_same_logits_and_the_same_greedy_text(lossless):
    target, model, output = lossless
    ids, prompt = random_ids(), random_ids(12, seed=1)
    original, ours = stock(model), engine(output)
    expected, text = logits(original, ids), greedy(original, prompt)
    assert (engine_logits(ours, ids) - expected).abs().max() <= 1e-3
    assert engine_greedy(ours, prompt) == text
    if target != "kvtool":
        loaded = stock(output)
        assert type(loaded).__name__ == "DeepseekV3ForCausalLM"
        assert (logits(loaded, ids) - expected).abs().max() <= 1e-3
        assert greedy(loaded, prompt) == text


def test_exact_keeps_the_bytes_of_the_cache(lossless):
    _, model, output = lossless
    before, after = (engine(path).new_cache(1, 10).bytes_per_token() for path in (model, output))
    assert after == before
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["plan"]["bytes_per_token_after"] == after / 2  # bf16 there, fp32 here


def test_exact_on_bfloat16_weights_verifies(converted):
    model, output = converted("llama", {"dtype": "bfloat16"}, method="exact")
    assert {t.dtype for t in weights(output).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(output).dtype == torch.bfloat16
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks
    assert report.measured["kl"] < 2e-2


@pytest.mark.parametrize("method", ["exact", "aware"])
@pytest.mark.parametrize("target", ["transformers", "kvtool"])
@pytest.mark.parametrize(("source", "saved"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_attention_may_be_saved_in_another_dtype(converted, method, target, source, saved):
    overrides, options = {"dtype": source}, {"dtype": saved, "method": method, "target": target}
    model, output = converted("llama", overrides, **options)
    for name, tensor in weights(output).items():
        own = ("kv_", "q_proj") if target == "transformers" else (".latent.",)
        own += ("o_proj",) * (method == "aware")
        expected = saved if any(part in name for part in own) else source
        if "inv_freq" in name:
            expected = "float32"
        assert str(tensor.dtype) == f"torch.{expected}", name
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


@pytest.mark.parametrize("method", ["exact", "aware"])
def test_a_float16_model_converts_for_our_own_runtime(converted, method):
    model, output = converted("llama", {"dtype": "float16"}, method=method, target="kvtool")
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


def test_our_own_runtime_stops_where_the_generation_config_says(converted, tmp_path):
    _, output = converted("llama", {}, method="exact", target="kvtool")
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert Engine.load(Checkpoint.open(str(tmp_path / "out"))).eos_ids == {1, 5}


def test_shards_of_source_and_output_do_not_matter(tiny, converted, tmp_path):
    model, whole = converted("llama", {}, method="exact")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="40KB")
    make_tokenizer().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    output = tmp_path / "out"
    convert(sharded, output, method="exact", shard_size="50KB")
    assert len(list(output.glob("*.safetensors"))) > 2
    one, many = weights(whole), weights(output)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    stock(output)
    report = verify(output, Checkpoint.open(str(sharded)))
    assert report.passed, report.checks


def test_vllm_reads_the_same_model_whatever_its_epsilon(converted):
    overrides = {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model, output = converted("llama", overrides, method="exact", target="vllm")
    ids = random_ids()
    got = logits(vllm_epsilon(stock(output)), ids)
    assert (got - logits(stock(model), ids)).abs().max() <= 1e-3


@pytest.mark.parametrize("method", ["exact", "transmla", "aware"])
def test_an_output_for_vllm_verifies_whatever_its_epsilon(converted, method):
    overrides = {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model, output = converted("llama", overrides, method=method, target="vllm")
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


def test_our_runtime_reads_an_output_for_vllm_whatever_its_epsilon(converted):
    overrides = {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model, output = converted("llama", overrides, method="exact", target="vllm")
    ids = random_ids()
    got = engine_logits(engine(output), ids)
    assert (got - logits(stock(model), ids)).abs().max() <= 1e-3


def test_the_stock_config_says_what_its_class_would_default_wrongly(tiny, tmp_path):
    model = tiny("llama", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    convert(model, tmp_path / "out", method="exact")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert config.q_lora_rank is None
    assert config.first_k_dense_replace == config.num_hidden_layers == 3
    assert config.max_position_embeddings == 512


# ---------------------------------------------------------------------------- transmla and aware

LOSSY = [
    *((family, target) for family in ("llama", "mistral") for target in targets.TARGETS),
    ("qwen2", "transformers"),
    ("qwen2", "kvtool"),
    ("qwen3", "kvtool"),
]


@pytest.mark.parametrize("method", ["transmla", "aware"])
@pytest.mark.parametrize(("family", "target"), LOSSY)
def test_a_conversion_verifies_and_our_runtime_equals_the_stock_model(
    converted, family, target, method
):
    model, output = converted(family, {}, target=target, kv_budget="50%", method=method)
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks
    assert report.measured["bytes_per_token"] == 192
    if target != "kvtool":
        ids = random_ids()
        expected = logits(stock(output), ids)
        assert (engine_logits(engine(output), ids) - expected).abs().max() <= 1e-3


SHAPES = {
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "head-24": ("llama", {"head_dim": 24}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2-one-kv-head": ("qwen2", {"num_key_value_heads": 1}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "bias-everywhere": ("llama", {"attention_bias": True}),
}


@pytest.mark.parametrize("method", ["transmla", "aware"])
@pytest.mark.parametrize(("family", "overrides"), SHAPES.values(), ids=SHAPES.keys())
def test_a_conversion_verifies_on_models_of_every_shape(converted, family, overrides, method):
    model, output = converted(family, overrides, rope_dim=8, kv_budget="60%", method=method)
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


def test_verify_looks_beyond_2048_tokens_where_the_model_does(converted):
    model, output = converted("llama", {"max_position_embeddings": 4096}, tokens=2048)
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks
    assert report.measured["tokens"] > 2048


def partial_rope_logits(
    model: Path, windows: torch.Tensor, ids: torch.Tensor, rope_dim: int, fold: int
) -> torch.Tensor:
    """Logits for `ids [N, T]` of the model that lost RoPE but for what `windows` say to keep."""
    stream = LayerStream(Checkpoint.open(str(model)))
    original, partial = stream.embed(windows), stream.embed(ids)
    for index in range(len(stream)):
        layer = stream.layer(index)
        gram = transmla.measure_gram(stream, layer, original)
        basis = transmla.RotatedBasis(gram, rope_dim, fold)
        layer.run(partial, transmla.partial_rope_attention(stream, layer, basis))
    return stream.logits(partial)


def calibration_windows(model: Path, tokens: int) -> torch.Tensor:
    tokenizer = Checkpoint.open(str(model)).tokenizer()
    return calibration_text().windows(tokenizer, 512, tokens // 512, chat=0.25)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("llama", {"rope_parameters": YARN}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama", "yarn", "qwen2", "qwen3"],
)
def test_at_full_rank_only_the_dropped_rope_is_lost(tiny, tmp_path, family, overrides):
    # A rank of 2K - d_r would not shrink the cache and is refused. Where some value channels are
    # dead, a rank smaller by their number loses just as little.
    dead, rope_dim, fold, tokens = 4, 8, 4, 1024

    def kill_channels(tensors):
        for name in tensors:
            if "v_proj" in name:
                tensors[name][-dead:] = 0

    model = edited_copy(tiny(family, **overrides), tmp_path / "model", kill_channels)
    output, rank = tmp_path / "out", 2 * 32 - rope_dim - dead
    target = "kvtool" if family == "qwen3" else "transformers"
    widths = {"rank": rank, "rope_dim": rope_dim, "freqfold": str(fold), "method": "transmla"}
    assert convert(model, output, target=target, tokens=tokens, **widths).ranks == [rank] * 3

    ids = random_ids()
    windows = calibration_windows(model, tokens)
    expected = partial_rope_logits(model, windows, ids[None], rope_dim, fold)[0]
    if target == "transformers":
        assert (logits(stock(output), ids) - expected).abs().max() <= 1e-3
    assert (engine_logits(engine(output), ids) - expected).abs().max() <= 1e-3
    # And that is another model than the original.
    assert (logits(stock(model), ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("family", "rope_dim"), [("llama", 16), ("llama", 8), ("qwen3", 16)])
def test_freqfold_is_doubled_while_the_model_without_rope_gets_better(
    tiny, tmp_path, family, rope_dim
):
    model = tiny(family)
    windows = calibration_windows(model, 1024)
    expected, lowest, fold = 0, float("inf"), 16 // rope_dim
    while fold <= 8:
        predictions = partial_rope_logits(model, windows, windows, rope_dim, fold)[:, :-1]
        loss = float(cross_entropy(predictions.flatten(0, 1), windows[:, 1:].flatten()))
        if loss >= lowest:
            break
        expected, lowest, fold = fold, loss, 2 * fold
    options = {"rope_dim": rope_dim, "target": "kvtool", "method": "transmla"}
    result = convert(model, tmp_path / "out", **options)
    assert result.freqfold == expected
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["freqfold"] == expected


@pytest.mark.parametrize("method", ["transmla", "aware"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_larger_budget_is_closer_to_the_original(converted, kv_heads, method):
    ids, kl = random_ids(), {}
    for budget in ("50%", "90%"):
        overrides = {"num_key_value_heads": kv_heads}
        model, output = converted("llama", overrides, kv_budget=budget, method=method)
        kl[budget] = mean_kl(logits(stock(model), ids), logits(stock(output), ids))
    assert kl["90%"] < kl["50%"]


# ---------------------------------------------------------------------------- what is written

WRITTEN = {
    "exact": ("qwen2", {"method": "exact"}),
    "transmla": ("llama", {"kv_budget": "50%", "method": "transmla", "target": "transformers"}),
    "transmla-kvtool": ("qwen3", {"kv_budget": "50%", "method": "transmla", "target": "kvtool"}),
    "aware": ("llama", {"kv_budget": "50%", "method": "aware", "target": "transformers"}),
    "aware-biases": ("qwen2", {"kv_budget": "50%", "method": "aware", "target": "transformers"}),
    "aware-vllm": ("llama", {"kv_budget": "50%", "method": "aware", "target": "vllm"}),
    "aware-kvtool": ("qwen3", {"kv_budget": "50%", "method": "aware", "target": "kvtool"}),
}


@pytest.fixture(params=WRITTEN.values(), ids=WRITTEN.keys())
def written(request, converted) -> tuple[Path, Path]:
    """A model and its conversion, one of every kind."""
    family, options = request.param
    return converted(family, {}, **options)


def test_only_attention_tensors_change(written):
    model, output = written
    before, after = weights(model), weights(output)
    manifest = json.loads((output / MANIFEST).read_text())
    parts = [*PROJECTIONS, "rotary_emb"] if manifest["target"] != "kvtool" else []
    parts += ["o_proj"] if manifest["method"] == "aware" else []
    assert manifest["replaced"] == parts
    replaced = {name for name in before if any(f".self_attn.{part}." in name for part in parts)}
    kept = before.keys() - replaced
    assert {name for name in kept if "self_attn" not in name}
    for name in kept:
        assert before[name].dtype == after[name].dtype
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name
    for name in replaced & {name for name in after if "o_proj.weight" in name}:
        assert after[name].shape == before[name].shape
        assert not torch.equal(after[name], before[name])
    assert all(".self_attn." in name for name in after.keys() - kept)


def test_side_files_are_carried_byte_for_byte(written):
    model, output = written
    carried = {file.name for file in Checkpoint.open(str(model)).side_files()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= carried
    for name in carried:
        assert (output / name).read_bytes() == (model / name).read_bytes(), name
    chat = [{"role": "user", "content": "Hello"}]
    tokenizers = [Checkpoint.open(str(path)).tokenizer() for path in (model, output)]
    before, after = (t.apply_chat_template(chat, tokenize=False) for t in tokenizers)
    assert after == before
    assert GenerationConfig.from_pretrained(output).eos_token_id == 1


def test_config_and_manifest_say_what_was_done(written):
    model, output = written
    manifest = json.loads((output / MANIFEST).read_text())
    block = json.loads((output / "config.json").read_text())["kvtool"]
    assert (block["method"], block["target"]) == (manifest["method"], manifest["target"])
    assert block["base"] == str(model)
    assert block["ranks"] == manifest["ranks"]
    assert len(block["ranks"]) == 3
    assert manifest["base"]["fingerprint"] == Checkpoint.open(str(model)).fingerprint()
    files = {str(f.relative_to(output)) for f in output.rglob("*") if f.is_file()}
    assert manifest["sha256"].keys() == files - {MANIFEST, "README.md"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    assert not list(output.parent.glob("*.partial"))


def test_the_plan_predicts_the_size_of_the_output(written):
    _, output = written
    manifest = json.loads((output / MANIFEST).read_text())
    actual = sum(tensor.nbytes for tensor in weights(output).values())
    assert manifest["plan"]["output_bytes"] == pytest.approx(actual, rel=0.01)
    assert manifest["plan"]["disk_bytes"] >= actual


def test_the_recipe_replays_to_the_same_bits(converted, tmp_path, monkeypatch):
    from kvtool.cli import _conversion
    from kvtool.cli.run import run

    model, output = converted("llama", {}, kv_budget="50%")
    method = planning.ConvertOptions().method
    recipe = load_recipe(output / "recipe.yaml")
    step = recipe.steps[0]
    assert recipe.model == str(model)
    assert isinstance(step, ConvertStep)
    assert (step.kv_budget, step.tokens, step.method) == ("50%", 1024, method)
    passed = {"passed": True, "checks": [], "measured": {}}
    monkeypatch.setattr(_conversion, "verify_in_fresh_process", lambda *_, **__: passed)
    run(output / "recipe.yaml", output=tmp_path / "replayed", quiet=True)
    assert digests(tmp_path / "replayed") == digests(output)


def test_two_runs_give_the_same_bits(converted, tmp_path):
    model, output = converted("llama", {}, kv_budget="50%")
    convert(model, tmp_path / "again", kv_budget="50%")
    assert digests(tmp_path / "again") == digests(output)


def test_overwrite_replaces_the_older_output(converted, tmp_path):
    model, whole = converted("llama", {}, method="exact")
    output = tmp_path / "out"
    convert(model, output, kv_budget="50%")
    convert(model, output, method="exact", overwrite=True)
    assert digests(output) == digests(whole)


# ---------------------------------------------------------------------------------- true ranks


def dead_channels(tensors: dict[str, torch.Tensor]) -> None:
    """Values of layer 1 span 8 of 32 dimensions."""
    tensors["model.layers.1.self_attn.v_proj.weight"][8:] = 0


def low_rank(tensors: dict[str, torch.Tensor]) -> None:
    """The same, but in no particular channel."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((32, 8), (8, 64)))
    tensors["model.layers.1.self_attn.v_proj.weight"] = 0.1 * a @ b


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
@pytest.mark.parametrize("poorer", [dead_channels, low_rank])
def test_a_layer_that_needs_less_gets_less(tiny, tmp_path, poorer, target):
    model = edited_copy(tiny("llama"), tmp_path / "model", poorer)
    output = tmp_path / "out"
    # Rank 32 of 48.
    result = convert(model, output, method="transmla", freqfold="2", target=target)
    true = [32, 16 + 8, 32]  # K - d_r unrotated keys and 8 values
    manifest = json.loads((output / MANIFEST).read_text())
    assert result.ranks == manifest["ranks"] == true
    ours = engine(output)
    cache = ours.new_cache(2, 50)
    assert cache.allocated_bytes == 2 * 50 * sum(4 * (rank + 16) for rank in true)
    assert [store.planes["latents"].shape[-1] for store in cache.stores] == [r + 16 for r in true]
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks
    assert report.measured["bytes_per_token"] == 2 * sum(r + 16 for r in true)
    if target == "transformers":
        loaded = stock(output)
        assert loaded.config.kv_lora_rank == 32
        padded = loaded.model.layers[1].self_attn
        assert not padded.kv_a_proj_with_mqa.weight[24:32].any()
        assert not padded.kv_b_proj.weight[:, 24:].any()


def last_channel(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"][-1] = 0


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_exact_verifies_where_a_value_channel_is_dead(tiny, tmp_path, target):
    model = edited_copy(tiny("llama"), tmp_path / "model", last_channel)
    convert(model, tmp_path / "out", method="exact", target=target)
    report = verify(tmp_path / "out", Checkpoint.open(str(model)))
    assert report.passed, report.checks


@pytest.mark.parametrize("method", ["transmla", "aware"])
@pytest.mark.parametrize(
    "part",
    [("q_proj",), ("k_proj",), ("v_proj",), ("k_proj", "v_proj"), ("o_proj",)],
    ids="+".join,
)
def test_a_layer_with_a_projection_that_is_all_zero_converts(tiny, tmp_path, part, method):
    def silence(tensors):
        for name in part:
            tensors[f"model.layers.1.self_attn.{name}.weight"].zero_()

    model = edited_copy(tiny("llama"), tmp_path / "model", silence)
    convert(model, tmp_path / "out", method=method)
    report = verify(tmp_path / "out", Checkpoint.open(str(model)))
    assert report.passed, report.checks


def test_a_layer_without_unrotated_keys_converts(tiny, tmp_path):
    # Every rotation is kept: d_r = K, and the latent holds values alone.
    model, output = tiny("llama"), tmp_path / "out"
    convert(model, output, rope_dim=32, rank=28, method="aware")
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks
    assert report.measured["kl"] < 0.5


# -------------------------------------------------------------------------------- neutral norm


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("biased", [False, True])
def test_the_neutral_norm_changes_no_latent(eps, size, biased):
    generator = torch.Generator().manual_seed(0)
    rank, hidden = 24, 64
    weight = size * torch.randn(rank, hidden, dtype=torch.float64, generator=generator)
    norm = 1 + 0.5 * torch.randn(hidden, dtype=torch.float64, generator=generator)
    bias = None
    if biased:
        bias = 300 * size * torch.randn(rank, dtype=torch.float64, generator=generator)
    delta, gamma = deepseek_v3.neutral_norm(weight, bias, norm, eps)
    assert gamma == float(torch.tensor(gamma, dtype=torch.bfloat16))

    directions = torch.randn(hidden, 500, dtype=torch.float64, generator=generator)
    worst = torch.linalg.svd(weight * norm).Vh[0]
    directions = torch.cat((directions, directions.pow(5), worst[:, None], -worst[:, None]), 1)
    # The longest that the block's RMSNorm lets through.
    inputs = norm[:, None] * directions / directions.norm(dim=0) * hidden**0.5
    exact = (weight @ inputs).T + (0 if bias is None else bias)
    for dtype, rounding in ((torch.float64, 0.0), (torch.float32, 8 * 2.0**-24)):
        latent = (delta * exact).to(dtype)
        scale = torch.full((rank,), gamma, dtype=dtype)
        got = rms_norm(latent, (rank,), scale, eps).double()
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.max() <= 1e-6 * 1.01 + rounding
        if dtype == torch.float64 and not biased and size > 1e-3:
            # δ is not smaller than it must be: bf16 needs no more range than necessary.
            assert error.max() > 1e-6 / 5


def test_the_neutral_norm_of_nothing_is_finite():
    zero = torch.zeros(4, 8, dtype=torch.float64)
    assert deepseek_v3.neutral_norm(zero, None, torch.ones(8, dtype=torch.float64), 1e-6) == (
        1e-3,
        1.0,
    )


def test_a_layer_of_the_output_holds_the_weights_that_the_factors_give(converted):
    # Keys and values of each head lie side by side in kv_b, keys first; heads of a group are equal.
    _, output = converted("llama", {}, method="exact")
    up = load_file(output / "model.safetensors")["model.layers.0.self_attn.kv_b_proj.weight"]
    assert torch.equal(up, torch.eye(32).view(2, 16, 32).repeat_interleave(2, 0).flatten(0, 1))


# ------------------------------------------------------------------------------------ real model


def test_the_real_model_is_embedded_without_loss(smollm2, tmp_path):
    output = tmp_path / "out"
    result = conversion.convert(smollm2, output, planning.ConvertOptions(method="exact"))
    assert result.plan["bytes_per_token_after"] == 23_040
    report = verify(output, smollm2)
    assert report.passed, report.checks
    assert report.measured["kl"] < 1e-6
    assert report.measured["max_logit_difference"] <= 1e-3
    assert report.measured["tokens"] > 2048
    prompt = smollm2.tokenizer()("The old lighthouse keeper opened the door and").input_ids
    steps = engine(output).generate([prompt], max_new_tokens=64, ignore_eos=True)
    model = smollm2.load_transformers(torch.float32)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    assert [step[0] for step in steps] == expected[0, len(prompt) :].tolist()
