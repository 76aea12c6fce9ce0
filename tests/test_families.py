"""Every family runs, is measured and is planned for as transformers computes it."""

import pytest
import torch
from conftest import FAMILIES

from kvtool.attention import FAMILIES as ALL
from kvtool.attention import logits_factor
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""Under the names of all families."""
MUP = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
LAYERS = {"num_hidden_layers": 4}
PARTIAL = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }
}  # fmt: skip
TWO_ROPES = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
}
ALL_FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
MIXED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "num_hidden_layers": 4,
}
CASES = {family: (family, {}) for family in FAMILIES} | {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **MIXED}),
    "cwm": ("cwm", MIXED),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "moe_layer_start_index": 1}),
    "exaone4": ("exaone4", MIXED),
    "exaone4, no window": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "gemma": ("gemma", {}),
    "gemma3_text": ("gemma3_text", {**MIXED, "rope_parameters": TWO_ROPES}),
    "glm": ("glm", {"attention_bias": True, **PARTIAL}),
    "glm4": ("glm4", PARTIAL),
    "glm4_moe": ("glm4_moe", {**EXPERTS, **PARTIAL, "use_qk_norm": True}),
    "granite": ("granite", MUP),
    "granitemoe": ("granitemoe", {**MUP, **EXPERTS}),
    "granitemoeshared": ("granitemoeshared", {**MUP, **EXPERTS}),
    "helium": ("helium", {}),
    "hyperclovax": ("hyperclovax", MUP),
    "jais2": ("jais2", {}),
    "mixtral": ("mixtral", {**EXPERTS, "sliding_window": None}),
    "mixtral, window": ("mixtral", {**EXPERTS, "sliding_window": 24}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**MIXED, "rope_parameters": TWO_ROPES}),
    "olmoe": ("olmoe", EXPERTS),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, partial": ("phi3", {"sliding_window": None, **PARTIAL}),
    "phi3, window": ("phi3", {"sliding_window": 24}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {**LAYERS, "no_rope_layer_interval": 2}),
    "starcoder2": ("starcoder2", {"sliding_window": None, "use_bias": True}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 24}),
}
WHOLE = [name for name, (family, more) in CASES.items() if not more.get("sliding_window")]


def open_case(tiny, name) -> Checkpoint:
    family, more = CASES[name]
    return Checkpoint.open(str(tiny(family, **more)))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def expected(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers, `[T, V]`."""
    return checkpoint.load_transformers(torch.float32)(ids[None], use_cache=False).logits[0]


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """To a small part of how much logits differ from each other."""
    assert float(wanted.std()) > 1e-2, "the model says the same of everything"
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.std()))


def extended(engine: Engine, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt, and of tokens that are decoded one by one behind it."""
    cache = engine.new_cache(1, len(ids))
    found = [engine.extend(cache, ids[:prompt], all_logits=True)]
    found += [engine.decode(cache, token[None]) for token in ids[prompt:]]
    return torch.cat(found)


def test_every_family_has_a_case():
    assert {family for family, _ in CASES.values()} == set(ALL)


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_computes_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(60)
    same(extended(Engine.load(checkpoint), ids, 40), expected(checkpoint, ids))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_streamed_layers_compute_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(50)
    stream = LayerStream(checkpoint)
    hidden = stream.embed(ids[None])
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer))
    same(stream.logits(hidden)[0], expected(checkpoint, ids))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_whole_models_compute_what_transformers_computes(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(20)  # within every window
    wanted = expected(checkpoint, ids)
    model = WholeModel(checkpoint)
    model._start()
    hidden = model._hidden(ids, 0)
    logits = model.model.lm_head(model.model.model.norm(hidden))[0]
    same(logits * logits_factor(model.config), wanted)
    tail = TailModel(LayerStream(checkpoint))
    hidden = tail.embed(ids)
    for index in range(len(tail.layers)):
        hidden = tail.layer(index, hidden, None, tail.dense(index))
    same(tail.predictions(hidden)[0], wanted.log_softmax(-1))


@pytest.mark.parametrize("name", WHOLE)
def test_heads_in_another_order_compute_the_same(tiny, name):
    checkpoint, ids = open_case(tiny, name), tokens(60)
    base = base_of(checkpoint)
    layer = LayerPlan((True, False), sink=4, window=100)
    plan = Plan(base, (layer,) * base.layers)
    got = extended(Engine.load(checkpoint, plan=plan), ids, 40)
    same(got, expected(checkpoint, ids))
