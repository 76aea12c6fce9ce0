"""What a model's norms, MLPs and layers are replaced by on a GPU computes what they did."""

import copy
import weakref

import pytest
import torch
from _code_tools import coded
from _family_cases import LATENTS
from _hybrid_tools import write_hybrid
from _kernel_tools import DEVICE
from conftest import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GraniteConfig, LlamaConfig

from kvtool.checkpoint import Checkpoint
from kvtool.kernels.dispatch import VARIABLE
from kvtool.layout import decoder_layers
from kvtool.runtime import Engine, fused, host
from kvtool.runtime.fused import FusedLayer, FusedMLP, FusedNorm, fuse

pytest.importorskip("triton")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
LATENT = SIZES | {
    "num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": None, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 300, (1, count), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def check(model: nn.Module, whole_layers: bool = True) -> nn.Module:
    """That the model computes what it did; returns it as it is then."""
    with torch.inference_mode():
        expected = model(tokens(9)).logits
        fuse(model)
        found = model(tokens(9)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(isinstance(x, FusedLayer) == whole_layers for x in decoder_layers(model))
    return model


def random_model(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_the_model(tiny, family):
    model = check(Checkpoint.open(str(tiny(family))).load_transformers(torch.float32).to(DEVICE))
    modules = list(model.modules())
    assert sum(isinstance(x, FusedNorm) for x in modules) == (13 if family == "qwen3" else 7)
    assert sum(isinstance(x, FusedMLP) for x in modules) == 3
    before = list(model.state_dict())
    fuse(model)  # of what is fused nothing is left to fuse
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", LATENTS)
def test_a_fused_model_with_latents_is_the_model(tiny, name):
    family, more = LATENTS[name]
    model = Checkpoint.open(str(tiny(family, **more))).load_transformers(torch.float32).to(DEVICE)
    with torch.inference_mode():
        expected = model(tokens(9)).logits
        fuse(model)
        torch.testing.assert_close(model(tokens(9)).logits, expected, atol=1e-4, rtol=1e-4)
    plain = family not in ("axk1", "minicpm3")  # which do more around attention and MLP
    assert isinstance(decoder_layers(model)[0], FusedLayer) == plain


def test_transformers_generates_with_fused_layers(tiny):
    model = Checkpoint.open(str(tiny("llama"))).load_transformers(torch.float32).to(DEVICE)
    asked = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens(9))}
    expected = model.generate(tokens(9), **asked)
    fuse(model)
    assert torch.equal(model.generate(tokens(9), **asked), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_mlps_may_have_biases(bias):
    model = check(random_model(LlamaConfig(mlp_bias=bias, **SIZES)))
    assert (model.model.layers[0].mlp.bias is not None) == bias


def test_layers_with_latents_are_fused_too():
    check(random_model(DeepseekV3Config(**LATENT)))


def test_layers_that_do_more_keep_what_they_do():
    """Granite scales what it adds."""
    model = random_model(GraniteConfig(residual_multiplier=0.3, **SIZES))
    assert isinstance(check(model, whole_layers=False).model.layers[0].mlp, FusedMLP)


def test_other_mlps_are_left_alone(tiny, tmp_path):
    mlp = random_model(LlamaConfig(mlp_bias=True, **SIZES)).model.layers[0].mlp
    assert FusedMLP.can_replace(mlp)
    others = {name: copy.deepcopy(mlp) for name in ("gelu", "more", "fewer", "bias", "packed")}
    others["gelu"].act_fn = nn.GELU()
    others["more"].norm = nn.LayerNorm(96)
    del others["fewer"].up_proj
    others["bias"].up_proj.bias = None
    others["packed"].down_proj = nn.Identity()
    for name, other in others.items():
        assert not FusedMLP.can_replace(other), name
    assert not FusedMLP.can_replace(None)
    check(random_model(LlamaConfig(hidden_act="gelu", **SIZES)), whole_layers=False)
    write_hybrid(tiny("llama"), tmp_path / "hybrid", [1])
    hybrid = Checkpoint.open(str(tmp_path / "hybrid")).load_transformers(torch.float32)
    check(hybrid.to(DEVICE), whole_layers=False)


def test_a_layer_changes_nothing_that_others_may_hold():
    model = random_model(LlamaConfig(**SIZES))
    fuse(model)
    layer, seen = model.model.layers[0], []
    layer.self_attn = nn.Identity()
    layer.self_attn.forward = lambda hidden_states: (hidden_states * 2, None)
    layer.self_attn.register_forward_hook(
        lambda _, arguments, out: seen.append((out[0], out[0].clone()))
    )
    hidden = torch.randn(2, 3, 64, device=DEVICE)
    before = hidden.clone()
    with torch.inference_mode():
        layer(hidden)
    assert torch.equal(hidden, before)
    assert torch.equal(*seen[0])


def test_no_more_than_one_layer_is_held_twice(monkeypatch):
    model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 4}))
    mlps = [layer.mlp for layer in decoder_layers(model)]
    held = [weakref.ref(x.weight) for mlp in mlps for x in (mlp.gate_proj, mlp.up_proj)]
    del mlps
    alive = []

    class Counting(FusedMLP):
        def __init__(self, mlp):
            alive.append(sum(x() is not None for x in held))
            super().__init__(mlp)

    monkeypatch.setattr(fused, "FusedMLP", Counting)
    fuse(model)
    assert alive == [8, 6, 4, 2]
    assert all(x() is None for x in held)


@pytest.mark.parametrize("kind", ["dense", "codes"])
def test_the_runtime_decodes_with_fused_layers(tiny, monkeypatch, kind):
    checkpoint = Checkpoint.open(str(tiny("qwen3")))
    plan = coded(checkpoint, share=0.5) if kind == "codes" else None

    def logits(engine: Engine) -> torch.Tensor:
        cache = engine.new_cache(2, 40)
        for row, count in enumerate((33, 5)):
            engine.extend(cache, tokens(40)[0, :count], row)
        return torch.stack([engine.decode(cache, tokens(2)[0] - step) for step in range(2)])

    expected = logits(Engine.load(checkpoint, plan=plan, device=DEVICE))
    load = host.load_model

    def fused_model(*arguments):
        model = load(*arguments)
        fuse(model)
        return model

    monkeypatch.setattr(host, "load_model", fused_model)
    engine = Engine.load(checkpoint, plan=plan, device=DEVICE)
    assert all(isinstance(layer, FusedLayer) for layer in decoder_layers(engine.model))
    torch.testing.assert_close(logits(engine), expected, atol=1e-3, rtol=1e-3)
