"""Fewer KV heads: what merging them loses, what it must not lose, what is written and refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    plan,
    random_ids,
    stock,
    weights,
)
from torch import Tensor

from kvtool.attention import DenseAttention
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.convert import aware, gqa, targets
from kvtool.convert.fitting import ConvertedLayer, converted_stages
from kvtool.convert.gqa import Merge
from kvtool.convert.verify import verify
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.layout import AttentionLayout
from kvtool.recipe import load_recipe

Tiny = Callable[..., Path]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)
MHA = {"num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, MHA) for family in ("llama", "mistral", "qwen2")},
    "gqa": ("llama", {}),
    "yarn": ("llama", MHA | {"rope_parameters": YARN}),
    "llama3-rope": ("llama", MHA | {"rope_parameters": LLAMA3}),
    "tied": ("llama", MHA | {"tie_word_embeddings": True}),
    "head-24": ("qwen2", MHA | {"head_dim": 24}),
    "bias-everywhere": ("llama", MHA | {"attention_bias": True}),
    "bfloat16": ("llama", MHA | {"dtype": "bfloat16"}),
    "float16": ("llama", MHA | {"dtype": "float16"}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request, tiny) -> Path:
    """A checkpoint of every kind that can be merged."""
    family, overrides = request.param
    return tiny(family, **overrides)


def merged(model: Path, output: Path, kv_heads: int, **options: Any) -> Path:
    convert(model, output, to="gqa", kv_heads=kv_heads, **options)
    return output


def kv_heads_of(model: Path) -> int:
    return int(Checkpoint.open(str(model)).config["num_key_value_heads"])


def difference(model: Path, other: Path) -> float:
    """Largest difference of logits, as a share of the largest logit."""
    expected, got = (logits(stock(path), random_ids()) for path in (model, other))
    return float((got - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------- what must not be lost


@pytest.fixture
def any_size(monkeypatch) -> None:
    """As many KV heads as before, which a conversion refuses: there the algebra must be exact."""
    monkeypatch.setattr(
        targets, "heads_size", lambda x, n: targets.HeadsSize(n, x.head_dim, x.cached_values)
    )


@pytest.mark.usefixtures("any_size")
def test_as_many_kv_heads_as_before_lose_nothing(model, tmp_path):
    wide = tmp_path / "wide"
    convert_dtype = {"dtype": "float32"}
    output = merged(model, wide, kv_heads_of(model), **convert_dtype)
    assert difference(model, output) < 1e-4


def related(rows: Tensor, seed: int, *, values: bool) -> Tensor:
    """What another head could hold: for keys a complex multiple of each component, of `rows`."""
    size = len(rows)
    generator = torch.Generator().manual_seed(seed)
    if values:
        return torch.randn(size, size, generator=generator) @ rows / size**0.5
    real, imag = torch.randn(2, size // 2, *(1 for _ in rows.shape[1:]), generator=generator)
    a, b = rows.chunk(2)
    return torch.cat((real * a - imag * b, imag * a + real * b))


def as_images(of: list[int], size: int) -> Callable[[dict[str, Tensor]], None]:
    """Makes KV head h an image of head `of[h]`, in keys and values, weights and biases."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "k_proj" in name or "v_proj" in name:
                heads = tensor.unflatten(0, (-1, size))
                for h, source in enumerate(of):
                    if h != source:
                        values = "v_proj" in name
                        heads[h] = related(heads[source], h, values=values)

    return change


ALIKE = {
    "two": ("llama", {}, [0, 0], 1),
    "neighbours": ("llama", MHA, [0, 0, 2, 2], 2),
    "far-apart": ("llama", MHA, [0, 1, 0, 1], 2),
    "crossed": ("mistral", MHA, [0, 1, 1, 0], 2),
    "biases": ("qwen2", MHA, [0, 1, 0, 1], 2),
    "all-four": ("qwen2", MHA, [0, 0, 0, 0], 1),
    "yarn": ("llama", {"rope_parameters": YARN}, [0, 0], 1),
    "eight-query-heads": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        [0, 1, 1, 0],
        2,
    ),
}


@pytest.mark.parametrize(("family", "overrides", "of", "kv_heads"), ALIKE.values(), ids=ALIKE)
def test_heads_that_are_images_of_one_merge_without_loss(
    tiny, tmp_path, family, overrides, of, kv_heads
):
    source = edited_copy(tiny(family, **overrides), tmp_path / "model", as_images(of, 16))
    output = merged(source, tmp_path / "out", kv_heads)
    assert difference(source, output) < 1e-3
    # And it is no wonder of the refit on top of any merge.
    assert difference(tiny(family, **overrides), source) > 0.05


# ------------------------------------------------------------------------------- what least means


class Case:
    """A layer's statistics, its weights, and what the merge is made of."""

    def __init__(self, model: Path) -> None:
        checkpoint = Checkpoint.open(str(model))
        self.stream = LayerStream(checkpoint)
        options = StatisticsOptions(tokens=1024, window=256, context=256)
        self.statistics: LayerStatistics = collect(checkpoint, options).layer(1)
        self.layout: AttentionLayout = self.stream.layouts[1]
        self.layer = self.stream.layer(1)
        self.attention = self.layer.attention
        heads, size = self.layout.kv_heads, self.layout.head_dim
        width = heads * size
        attended, joint = self.statistics.attended, self.statistics.joint
        self.power = gqa.query_power(self.statistics, heads)
        self.keys = gqa.key_moments(joint.second[:width, :width], heads)
        self.values = attended[width:, width:]
        self.gram = aware.value_weight(self.attention.o_proj.weight, heads, size)

    def merge(self, kv_heads: int) -> Merge:
        output = self.attention.o_proj.weight
        return gqa.merge(self.statistics, self.layout, output, kv_heads)

    def refit(self, merge: Merge, text: Tensor) -> Merge:
        """With queries refitted on what the layer reads of `text [n, T]`."""
        hidden = self.stream.embed(text)
        return gqa.refit_queries(self.stream, self.layer, merge, hidden)

    def mean(self, groups: Tensor) -> Merge:
        """Mean pooling, where GQA (arXiv 2305.13245) starts."""
        count, t = groups.shape
        size = self.layout.head_dim
        ones = torch.ones(count, t, size // 2, dtype=torch.complex128)
        identity = torch.eye(size, dtype=torch.float64).expand(count, t, size, size)
        queries = self.layout.heads // self.layout.kv_heads
        decode = ones[:, :, None].expand(-1, -1, queries, -1)
        return Merge(groups, ones / t, decode, identity / t, identity)

    def lost(self, merge: Merge) -> tuple[float, float]:
        """Σ w |κ - d uᴴ κ|² and Σ ‖G^{1/2}(v - F Eᵀ v)‖², straight from their definitions."""
        size = self.layout.head_dim
        channel = torch.arange(len(self.values)).view(-1, size)
        keys = values = 0.0
        for n, group in enumerate(merge.heads):
            u, d = merge.key_encode[n].T, merge.key_decode[n, :, 0].T  # [D/2, t]
            identity = torch.eye(len(group), dtype=torch.complex128)
            left = identity - d[:, :, None] * u[:, None].conj()
            error = left @ self.keys[:, group][:, :, group] @ left.mH
            keys += float((error.diagonal(dim1=1, dim2=2).real * self.power[:, group]).sum())
            own = channel[group].flatten()
            encode, decode = (x[n].flatten(0, 1) for x in (merge.value_encode, merge.value_decode))
            rest = torch.eye(len(own), dtype=torch.float64) - decode @ encode.T
            moment = rest @ self.values[own][:, own] @ rest.T
            values += float((self.gram[own][:, own] * moment).sum())
        return keys, values


@pytest.fixture
def case(model) -> Case:
    return Case(model)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_it_never_loses_more_than_mean_pooling(case, kv_heads):
    found = case.merge(kv_heads)
    ours, mean = case.lost(found), case.lost(case.mean(found.heads))
    neighbours = torch.arange(case.layout.kv_heads).view(kv_heads, -1)
    consecutive = case.lost(case.mean(neighbours))
    if kv_heads == case.layout.kv_heads:
        assert max(ours) < 1e-9 * max(case.lost(case.merge(1)))
        return
    for lost, pooled, published in zip(ours, mean, consecutive, strict=True):
        assert lost < pooled
        assert lost < published


def test_no_merge_nearby_loses_less(case):
    found = case.merge(1)
    least = case.lost(found)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = []
        for part in list(vars(found).values())[1:]:
            noise = torch.randn(part.shape, generator=generator).to(part)
            moved.append(part + 1e-3 * part.abs().mean() * noise)
        for lost, best in zip(case.lost(Merge(found.heads, *moved)), least, strict=True):
            assert lost >= best * (1 - 1e-9)


def test_complex_combinations_lose_less_than_real_ones(case):
    heads = torch.arange(case.layout.kv_heads)[None]
    best = case.lost(case.merge(1))[0]
    real = gqa.merge_heads(
        case.keys.real.to(torch.complex128), case.power, case.values, case.gram, 1
    )
    assert torch.equal(real.heads, heads)
    assert real.key_encode.imag.abs().max() < 1e-9
    assert best < case.lost(real)[0]


def test_groups_are_never_worse_than_neighbours(tiny):
    case = Case(tiny("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8))
    root = case.power.sqrt()
    keys = root[:, :, None] * case.keys * root[:, None]
    value_root, _ = aware.square_root(case.gram)
    values = value_root @ case.values @ value_root
    cost = gqa.pair_costs(keys, values)
    assert torch.equal(cost, cost.T)
    for kv_heads in (2, 4):
        groups = gqa.groups_of(keys, values, kv_heads)
        assert sorted(groups.flatten().tolist()) == list(range(8))
        within = [
            float(cost[g[:, :, None], g[:, None]].sum())
            for g in (groups, torch.arange(8).view(kv_heads, -1))
        ]
        assert within[0] < within[1]


def test_the_folded_layer_attends_to_what_the_merge_rebuilds(case):
    # Keys and values rebuilt for every head from the merged ones, in the original's layout.
    found = case.merge(1)
    hidden = torch.randn(2, 40, case.layout.hidden_size, generator=torch.Generator().manual_seed(0))
    own = case.attention
    q, k, v = (x.double() for x in own.project(hidden))
    kappa = torch.complex(*k.chunk(2, dim=-1))  # [B, H, T, D/2]
    u, d = found.key_encode[0], found.key_decode[0, :, 0]  # [H, D/2]
    rebuilt = d[:, None] * (u.conj()[:, None] * kappa).sum(dim=1, keepdim=True)
    k = torch.cat((rebuilt.real, rebuilt.imag), dim=-1)
    latent = torch.einsum("hde,bhtd->bte", found.value_encode[0], v)
    v = torch.einsum("hde,bte->bhtd", found.value_decode[0], latent)
    tables = [table.double() for table in case.stream.tables(0, hidden.shape[1])]
    q, k = own.rotate(q, k, *tables)
    expected = own.output(own.attend(q, k, v).float(), hidden)
    stages = gqa_stages(case, found)
    got = stages.output(stages.context(hidden, case.stream.rope.scale))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def gqa_stages(case: Case, merge: Merge) -> DenseAttention:
    layer = ConvertedLayer(None, gqa.fold(case.attention, merge))
    stages = converted_stages(case.attention, layer, case.stream.rope)
    assert isinstance(stages, DenseAttention)
    return stages


def attention(case: Case, merge: Merge, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[n, Q, T, T]` of the original and of the merged keys, and where a query sees."""
    hidden = case.layer.normed(case.stream.embed(text))
    tables = case.stream.tables(0, text.shape[1])
    scores = []
    for own in (case.attention, gqa_stages(case, merge).gqa):
        q, k, _ = own.project(hidden)
        q, k = own.rotate(q, k, *tables)
        q = q.unflatten(1, (own.layout.kv_heads, -1))
        scores.append((own.layout.scaling * q @ k[:, :, None].mT).double().flatten(1, 2))
    original = scores[0].unflatten(1, (case.layout.kv_heads, -1))[:, merge.heads.flatten()]
    seen = torch.ones(text.shape[1], text.shape[1]).tril().bool()
    return original.flatten(1, 2), scores[1], seen


def variance(case: Case, merge: Merge, text: Tensor) -> Tensor:
    """`[Q]`: Σ Var_{j~w}(e_j) of each query head, straight from its definition."""
    original, merged, seen = attention(case, merge, text)
    mass = original.masked_fill(~seen, -torch.inf).softmax(-1)
    weight = (1 - gqa.EVENLY) * mass + gqa.EVENLY * seen / seen.sum(1, keepdim=True)
    wrong = (original - merged) - (weight * (original - merged)).sum(-1, keepdim=True)
    looked_at = (weight * wrong.square()).sum(-1)[:, :, gqa.SINKS :: gqa.EVERY]
    return looked_at.sum(dim=(0, 2))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_refitted_queries_are_least_squares_of_weighted_scores(case, kv_heads, monkeypatch):
    monkeypatch.setattr(gqa, "EVERY", 2)
    text = random_ids(256, seed=3).view(2, 128)
    if kv_heads == case.layout.kv_heads:
        kv_heads = 1
    before = case.merge(kv_heads)
    after = case.refit(before, text)
    assert (variance(case, after, text) < variance(case, before, text)).all()
    monkeypatch.setattr(gqa, "RIDGE", 1e-9)
    free = case.refit(before, text)
    least = variance(case, free, text)
    assert (least <= variance(case, after, text) * (1 + 1e-6)).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noise = torch.randn(free.key_decode.shape, generator=generator, dtype=torch.complex128)
        moved = free.key_decode + 0.02 * free.key_decode.abs().mean() * noise
        nearby = variance(case, replace(free, key_decode=moved), text)
        assert (least <= nearby * (1 + 1e-6)).all()


def test_refitted_queries_stay_where_nothing_is_wrong(case):
    before = case.merge(case.layout.kv_heads)
    after = case.refit(before, random_ids(128, seed=3)[None])
    assert (after.key_decode - before.key_decode).abs().max() < 1e-4


@pytest.mark.parametrize(
    "part",
    [("q_proj",), ("k_proj",), ("v_proj",), ("k_proj", "v_proj"), ("o_proj",)],
    ids="+".join,
)
def test_a_layer_with_a_projection_that_is_all_zero_converts(tiny, tmp_path, part):
    def silence(tensors):
        for name in part:
            tensors[f"model.layers.1.self_attn.{name}.weight"].zero_()

    source = edited_copy(tiny("llama", **MHA), tmp_path / "model", silence)
    report = verify(merged(source, tmp_path / "out", 2), Checkpoint.open(str(source)))
    assert report.passed, report.checks


# ---------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """``written(name)``: a model and its conversion to one KV head, not to be changed."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            family, overrides = MODELS[name]
            source = tiny(family, **overrides)
            made[name] = source, merged(source, tmp_path_factory.mktemp(name) / "out", 1)
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_verifies_and_is_a_stock_model_of_the_same_class(written, name):
    source, output = written(name)
    report = verify(output, Checkpoint.open(str(source)))
    assert report.passed, report.checks
    before, after = stock(source), stock(output)
    assert type(after) is type(before)
    own, ours = (json.loads((p / "config.json").read_text()) for p in (source, output))
    assert ours.pop("kvtool")["to"] == "gqa"
    assert ours == own | {"num_key_value_heads": 1}
    ratio = kv_heads_of(source)
    caches = [engine(p).new_cache(1, 10).bytes_per_token() for p in (source, output)]
    assert caches[0] == ratio * caches[1]
    manifest = json.loads((output / MANIFEST).read_text())
    assert report.measured["bytes_per_token"] == manifest["plan"]["bytes_per_token_after"]


def test_our_runtime_equals_the_stock_model(written):
    _, output = written("qwen2")
    ids, prompt, loaded = random_ids(), random_ids(12, seed=1), stock(output)
    assert (engine_logits(engine(output), ids) - logits(loaded, ids)).abs().max() <= 1e-3
    assert engine_greedy(engine(output), prompt) == greedy(loaded, prompt)


@pytest.mark.parametrize("name", MODELS)
def test_only_attention_tensors_change(written, name):
    source, output = written(name)
    before, after = weights(source), weights(output)
    assert before.keys() == after.keys()
    parts = json.loads((output / MANIFEST).read_text())["replaced"]
    assert parts == [*PROJECTIONS, "rotary_emb", "o_proj"]
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if "self_attn" not in name:
            same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
            assert same, name
    name = "model.layers.0.self_attn.k_proj.weight"
    assert after[name].shape[0] * kv_heads_of(source) == before[name].shape[0]


def test_the_plan_predicts_what_is_written(written):
    for name in ("qwen2", "bias-everywhere", "bfloat16"):
        source, output = written(name)
        manifest = json.loads((output / MANIFEST).read_text())
        actual = sum(tensor.nbytes for tensor in weights(output).values())
        assert manifest["plan"]["output_bytes"] == actual
        assert plan(source, to="gqa", kv_heads=1, tokens=1024) == manifest["plan"]


def test_attention_may_be_saved_in_another_dtype(tiny, tmp_path):
    source = tiny("qwen2", **MHA)
    output = merged(source, tmp_path / "out", 2, dtype="bfloat16")
    for name, tensor in weights(output).items():
        assert tensor.dtype == (torch.bfloat16 if "self_attn" in name else torch.float32), name
    report = verify(output, Checkpoint.open(str(source)))
    assert report.passed, report.checks


@pytest.mark.usefixtures("any_size")
def test_more_kv_heads_are_closer_to_the_original(tiny, tmp_path):
    source, ids, kl = tiny("llama", **MHA), random_ids(), []
    for kv_heads in (1, 2, 4):
        output = merged(source, tmp_path / str(kv_heads), kv_heads)
        kl.append(mean_kl(logits(stock(source), ids), logits(stock(output), ids)))
    assert kl[0] > kl[1] > kl[2]


def test_a_killed_conversion_ends_with_the_same_bytes(written, tmp_path):
    source, whole = written("llama")

    def die(stage: str, done: int, total: int) -> None:
        if (stage, done) == point:
            raise KeyboardInterrupt

    for point in (("fitting", 2), ("converting", 1), ("writing", 0)):
        output = tmp_path / point[0]
        with pytest.raises(KeyboardInterrupt):
            merged(source, output, 1, report=die)
        assert not output.exists()
        assert digests(merged(source, output, 1)) == digests(whole)


def test_a_changed_tensor_fails_verification(written, tmp_path):
    def turn(tensors):  # a RoPE component of the wrong hand
        tensors["model.layers.1.self_attn.k_proj.weight"][8:] *= -1

    source, output = written("llama")
    report = verify(edited_copy(output, tmp_path / "bad", turn), Checkpoint.open(str(source)))
    assert "as converted" in {check.name for check in report.checks if not check.passed}


def test_a_layer_of_the_real_model_merges_better_than_by_its_mean(smollm2):
    case, tokenizer = Case(smollm2.path), smollm2.tokenizer()
    text = calibration_text().windows(tokenizer, 512, 2)
    held_out = evaluation_text().windows(tokenizer, 256, 2)
    hidden = case.layer.normed(case.stream.embed(held_out))
    expected = case.stream.exact_attention(case.layer)(hidden)
    found = case.merge(1)
    merges = (case.mean(found.heads), found, case.refit(found, text))
    errors, divergences = [], []
    for merge in merges:
        stages = gqa_stages(case, merge)
        errors.append(float((stages.output(stages.context(hidden)) - expected).norm()))
        original, merged, seen = attention(case, merge, held_out)
        p, q = (x.masked_fill(~seen, -1e9).log_softmax(-1) for x in (original, merged))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert divergences[0] > divergences[1] > divergences[2]


# --------------------------------------------------------------------------- command and recipe


def test_the_command_converts_and_its_recipe_replays(tiny, tmp_path, capfd):
    source, first = str(tiny("llama")), tmp_path / "first"
    command = ["convert", source, "--to", "gqa", "--kv-heads", "1", "--tokens", "1024"]
    assert run_command([*command, "--dry-run", "--json", "-o", str(first)]) == 0
    assert json.loads(capfd.readouterr().out)["bytes_per_token_after"] == 192
    assert not first.exists()
    assert run_command([*command, "--quiet", "-o", str(first)]) == 0
    shown = capfd.readouterr().out
    assert "KV heads per layer" in shown
    assert "verify: as converted" in shown
    assert load_recipe(first / "recipe.yaml").steps[0].kv_heads == 1
    card = (first / "README.md").read_text()
    assert "| KV heads per layer | 1 |" in card
    assert "same class" in card
    again = tmp_path / "again"
    assert run_command(["run", str(first / "recipe.yaml"), "-o", str(again), "--quiet"]) == 0
    assert digests(again) == digests(first)
    assert run_command([*command, "--quiet", "-o", str(first)]) == 2
    assert run_command([*command, "--quiet", "--overwrite", "-o", str(first)]) == 0


# ------------------------------------------------------------------------------------- refused


BAD = {
    "none": ({}, "--to gqa needs --kv-heads: the model has 4, which can be merged into 1, 2$"),
    "not-dividing": ({"kv_heads": 3}, "--kv-heads 3 is impossible: the model has 4"),
    "unchanged": (
        {"kv_heads": 4},
        "--kv-heads 4 does not shrink the cache: the model has 4, which can be merged into 1, 2$",
    ),
    "more": ({"kv_heads": 8}, "--kv-heads 8 is impossible: the model has 4"),
    "zero": ({"kv_heads": 0}, "--kv-heads 0 is impossible"),
    "negative": ({"kv_heads": -2}, "--kv-heads -2 is impossible"),
    "budget": ({"kv_heads": 2, "kv_budget": "50%"}, "--kv-budget is for --to mla"),
    "rank": ({"kv_heads": 2, "rank": 8}, "--rank is for --to mla"),
    "rope-dim": ({"kv_heads": 2, "rope_dim": 8}, "--rope-dim is for --to mla"),
    "method": ({"kv_heads": 2, "method": "exact"}, "--method is for --to mla"),
    "target": ({"kv_heads": 2, "target": "kvtool"}, "--target is for --to mla"),
    "freqfold": ({"kv_heads": 2, "freqfold": "2"}, "--freqfold is for --to mla"),
    "tokens": ({"kv_heads": 2, "tokens": 100}, "--tokens 100 is less than one window"),
    "of-mla": ({"to": "mla", "kv_heads": 2}, "--kv-heads is for --to gqa"),
    "unknown": ({"to": "mqa"}, "--to mqa is unknown: choose mla, gqa"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_an_impossible_option_is_refused_in_one_sentence(tiny, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        convert(tiny("llama", **MHA), tmp_path / "out", **{"to": "gqa"} | options)
    assert not list(tmp_path.iterdir())


REFUSED = {
    "qk-norm": ("qwen3", {}, "q/k norm .Qwen3. lies between the projections and RoPE"),
    "sliding": ("mistral", {"sliding_window": 64}, "sliding-window attention .64 tokens"),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 512,
            }
        },
        "'dynamic' changes its frequencies",
    ),
}


@pytest.mark.parametrize(("family", "overrides", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_before_any_work(
    tiny, tmp_path, family, overrides, reason
):
    with pytest.raises(UnsupportedModelError, match=f"cannot merge KV heads: .*{reason}"):
        merged(tiny(family, **overrides), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_a_latent_has_no_heads_to_merge(converted, tmp_path, target):
    _, latent = converted("llama", {}, method="exact", target=target)
    with pytest.raises(UnsupportedModelError, match=r"merge KV heads: .*already caches a latent"):
        merged(latent, tmp_path / "out", 1)
