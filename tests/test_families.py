"""Every family runs, is measured and is planned for as transformers computes it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from _code_tools import KINDS, coded
from _family_cases import ALL as ALL_CASES
from _family_cases import ALL_LATENTS, CASES, LATENTS
from _family_tools import by_transformers, open_case, same, tokens
from conftest import make_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvtool.calibrate.bit_options import QuantizationOptions
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.layer_sums import Seen, watched
from kvtool.calibrate.quantization import calibrate_quantization, everything
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.cli.serve import caches
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.factors import finish_of
from kvtool.layer_plan import LayerPlan
from kvtool.layout import FAMILIES as ALL
from kvtool.layout import LATENT, experts_of
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.rope import ropes_of
from kvtool.runtime import Engine
from kvtool.wrappers import WRAPPERS

PHI_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0] * 8,
    "short_mscale": 1.2,
    "long_mscale": 1.3,
}


def extended(engine: Engine, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt, and of tokens that are decoded one by one behind it."""
    cache = engine.new_cache(1, len(ids))
    found = [engine.extend(cache, ids[:prompt], all_logits=True)]
    found += [engine.decode(cache, token[None]) for token in ids[prompt:]]
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "all keys and values"),
        ("deepseek_v3", "latents (MLA)"),
        ("granitemoehybrid", "all keys and values, but states in 2 layers"),
        ("qwen3_next", "all keys and values, but states in 2 layers"),
    ],
)
def test_a_server_says_what_it_keeps(tiny, name, said):
    engine = Engine.load(
        Checkpoint.open(str(tiny(name, **(CASES | LATENTS).get(name, ("", {}))[1])))
    )
    assert caches(engine, None) == said
    assert caches(engine, Path("a.plan")) == "plan a.plan"


def test_every_family_has_a_case():
    assert {family for family, _ in ALL_CASES.values()} == set(ALL)
    assert {family for family, _ in ALL_LATENTS.values()} == set(LATENT)


def test_the_documents_name_every_family():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert not {*ALL, *LATENT, *WRAPPERS} - set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("name", [*CASES, *LATENTS])
def test_the_runtime_computes_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(60)
    same(extended(Engine.load(checkpoint), ids, 40), by_transformers(checkpoint, ids))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_streamed_layers_compute_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(50)
    stream = LayerStream(checkpoint)
    hidden = stream.embed(ids[None])
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer))
    same(stream.logits(hidden)[0], by_transformers(checkpoint, ids))


@pytest.mark.parametrize("name", [*CASES, *LATENTS])
@torch.inference_mode()
def test_whole_models_compute_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(20)  # within every window
    wanted = by_transformers(checkpoint, ids)
    model = WholeModel(checkpoint)
    model._start()
    hidden = model._hidden(ids, 0)
    logits = model.model.lm_head(model.model.model.norm(hidden))[0]
    same(finish_of(model.config)(logits), wanted)
    if name in LATENTS:
        return  # layer by layer they are not looked at
    tail = TailModel(LayerStream(checkpoint))
    hidden = tail.embed(ids)
    for index in range(len(tail.layers)):
        hidden = tail.layer(index, hidden, None, tail.dense(index))
    same(tail.predictions(hidden)[0], wanted.log_softmax(-1))


@pytest.mark.parametrize("name", CASES)
def test_heads_in_another_order_compute_the_same(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(60)
    base = base_of(checkpoint)
    layer = LayerPlan((True, False), sink=4, window=100)
    layers = [layer if x.kept is None else x for x in whole_layers(checkpoint)]
    plan = Plan(base, tuple(layers))
    got = extended(Engine.load(checkpoint, plan=plan), ids, 40)
    same(got, by_transformers(checkpoint, ids))


@pytest.mark.parametrize("name", [*CASES, *LATENTS])
def test_experts_are_found(name):
    family, more = (CASES | LATENTS)[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(family, **more))
    layers = experts_of(model)
    assert bool(layers) == ("moe_intermediate_size" in more)
    assert all(x.num_experts == 4 for x in layers)


@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_few_bits_are_planned_for(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(200)
    options = QuantizationOptions(bits=(4, 4), group=32, window=8, tokens=1024)
    start = everything(checkpoint, base_of(checkpoint), options)
    plan = calibrate_quantization(checkpoint, options, start, None, 2)
    engine, plain = Engine.load(checkpoint, plan=plan), Engine.load(checkpoint)
    wanted = by_transformers(checkpoint, ids)[180:]
    error = float((extended(engine, ids, 180)[180:] - wanted).abs().mean() / wanted.std())
    assert 1e-4 < error < 0.2
    stored = [x.new_cache(1, len(ids)).allocated_bytes for x in (engine, plain)]
    assert stored[0] < stored[1] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_by_tempered_queries(tiny, kind):
    checkpoint, ids = open_case(tiny, "ministral3"), tokens(60)
    same(
        extended(Engine.load(checkpoint, plan=coded(checkpoint, kind)), ids, 40),
        by_transformers(checkpoint, ids),
    )


@torch.inference_mode()
def test_statistics_are_of_tempered_queries(tiny):
    stream = LayerStream(open_case(tiny, "ministral3"))
    layer, hidden, starts = stream.layer(1), torch.randn(2, 9, 64), torch.tensor([0, 20])
    seen: list[Seen] = []
    watched(stream, layer, starts, seen)(hidden)
    q = layer.attention.project(hidden)[0]
    positions = starts[:, None] + torch.arange(9)
    factor = 1 + 0.4 * torch.log1p((positions / 6).floor())
    torch.testing.assert_close(seen[0].q, q * factor[:, None, :, None])


def test_layers_that_transformers_passes_over_are_passed_over(tiny, tmp_path):
    path = open_case(tiny, "glm4_moe").path
    shutil.copytree(path, tmp_path / "model")
    more = {"model.layers.46.eh_proj.weight": torch.zeros(2, 2)}  # predicts the token after next
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | more, file, {"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    Engine.load(checkpoint)
    LayerStream(checkpoint)
    more["model.layers.45.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.45"):
        LayerStream(Checkpoint.open(str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("stablelm", {"qk_layernorm": True}, "q_layernorm"),
        ("hunyuan_v1_dense", {}, "'hunyuan_v1_dense' is not supported: it norms .* behind RoPE"),
        ("phimoe", {"rope_parameters": PHI_LONG}, "changes its frequencies"),
        ("gemma3n_text", {}, "its layers carry several streams of hidden states"),
        ("mimo_v2_flash", {}, "its values are narrower than its keys"),
    ],
)
def test_what_no_stage_computes_is_refused(family, more, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        ropes_of(make_config(family, **more))


def test_an_output_head_with_a_bias_is_not_streamed(tiny):
    more = {**CASES["ernie4_5_moe"][1], "use_bias": True}
    checkpoint, ids = Checkpoint.open(str(tiny("ernie4_5_moe", **more))), tokens(20)
    same(extended(Engine.load(checkpoint), ids, 10), by_transformers(checkpoint, ids))
    with pytest.raises(UnsupportedModelError, match="output head with a bias"):
        LayerStream(checkpoint)
