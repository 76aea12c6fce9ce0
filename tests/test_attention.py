"""The stages of every family compute what transformers' own module computes."""

import pytest
import torch
from _family_cases import MIXED, TWO_ROPES
from conftest import FAMILIES, make_config
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from kvtool.attention import GroupedQueryAttention, causal_attention
from kvtool.checkpoint import Checkpoint
from kvtool.errors import UnsupportedModelError
from kvtool.layout import describe, recognise
from kvtool.rope import rope_of, ropes_of, rotate

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_stages_equal_the_module_of_transformers(tiny, family, rope):
    checkpoint = Checkpoint.open(str(tiny(family, rope_parameters=ROPES[rope])))
    model = checkpoint.load_transformers(torch.float32)
    hidden = torch.randn(2, 40, 64)
    positions = torch.arange(40)[None]
    module = model.model.layers[1].self_attn
    tables = model.model.rotary_emb(hidden, positions)
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    expected = module(hidden, position_embeddings=tables, attention_mask=mask)[0]

    stages = GroupedQueryAttention(module, "attention")
    cos, sin = rope_of(checkpoint.hf_config()).tables(torch.arange(40))
    q, k, v = stages.project(hidden)
    q, k = stages.rotate(*stages.normalise(q, k), cos, sin)
    got = stages.output(stages.attend(q, k, v), hidden)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_fused_projection_shares_memory_with_the_module(tiny):
    model = Checkpoint.open(str(tiny("llama"))).load_transformers(torch.float32)
    module = model.model.layers[0].self_attn
    stages = GroupedQueryAttention(module, "attention")
    fused = stages.qkv.weight.untyped_storage().data_ptr()
    assert module.k_proj.weight.untyped_storage().data_ptr() == fused


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_read_from_the_structure(family):
    layout = describe(make_config(family))[0]
    assert (layout.heads, layout.kv_heads, layout.head_dim) == (4, 2, 16)
    assert layout.qkv_bias is (family == "qwen2")
    assert layout.qk_norm is (family == "qwen3")
    assert layout.cached_values == 2 * 2 * 16


def test_an_unknown_part_is_refused_by_name():
    config = make_config("llama")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    module = model.model.layers[0].self_attn
    module.gate_proj = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn.*gate_proj"):
        recognise(module, "model.layers.0.self_attn")


def test_a_missing_part_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="o_proj"):
        recognise(nn.ModuleDict({x: nn.Linear(4, 4) for x in ("q_proj", "k_proj", "v_proj")}), "a")


def test_rope_that_depends_on_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        rope_of(make_config("llama", rope_parameters=rope))


@pytest.mark.parametrize("theta", [0.0, float("nan")])
def test_rope_without_finite_frequencies_is_refused(theta: float) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    with pytest.raises(UnsupportedModelError, match=f"a base of {theta}"):
        rope_of(make_config("llama", rope_parameters=rope))


def test_rope_of_another_size_than_the_shared_key_of_mla_is_refused() -> None:
    config = DeepseekV3Config(head_dim=6, qk_rope_head_dim=8, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="3 frequencies for 8 channels"):
        rope_of(config)


def test_a_model_that_looks_at_later_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match="later tokens"):
        describe(make_config("qwen2", is_causal=False))


def test_of_rope_by_type_of_layer_the_rest_is_not_read():
    both = {"rope_type": "linear", "factor": 2.0, **TWO_ROPES}
    config = make_config("gemma3_text", rope_parameters=both, layer_types=MIXED["layer_types"][:3])
    first, second, third = ropes_of(config)
    assert first.equals(third)
    assert float(first.inv_freq[1]) == pytest.approx(1e4 ** (-1 / 8))
    assert float(second.inv_freq[1]) == pytest.approx(1e6 ** (-1 / 8))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9)])
def test_causal_attention_equals_the_definition(t, s, window):
    q, k, v = torch.randn(2, 4, t, 8), torch.randn(2, 2, s, 8), torch.randn(2, 2, s, 6)
    got = causal_attention(q, k, v, 0.3, window)
    for head in range(4):
        for i in range(t):
            last = s - t + i
            first = 0 if window is None else max(0, last - window + 1)
            seen = slice(first, last + 1)
            weights = torch.softmax(0.3 * k[:, head // 2, seen] @ q[:, head, i, :, None], dim=1)
            expected = (weights * v[:, head // 2, seen]).sum(1)
            torch.testing.assert_close(got[:, head, i], expected, atol=1e-5, rtol=1e-5)


def test_rotation_depends_on_the_distance_only():
    x, y = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    positions = torch.tensor([3, 10, 103, 110], dtype=torch.float64)
    angles = torch.outer(positions, torch.rand(8, dtype=torch.float64))
    angles = torch.cat((angles, angles), dim=-1)
    turned_x, turned_y = (
        rotate(x, angles.cos(), angles.sin()),
        rotate(y, angles.cos(), angles.sin()),
    )
    torch.testing.assert_close(turned_x[0] @ turned_y[1], turned_x[2] @ turned_y[3])
