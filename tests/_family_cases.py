"""A small config of every family, with what is particular to it."""

from typing import Any

from conftest import FAMILIES
from transformers import CONFIG_MAPPING

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
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0}
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
TEMPERED = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 6,
        "llama_4_scaling_beta": 0.4,
    }
}
COMMAND_MOE = {
    **EXPERTS,
    **MIXED,
    "logit_scale": 0.25,
    "num_shared_experts": 2,
    "prefix_dense_intermediate_size": 80,
    "mlp_layer_types": ["sparse", "dense"] * 2,
}
ALL: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen3, with what only others read": ("qwen3", MUP | {"logit_scale": 0.25}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **MIXED}),
    "cohere2_moe": ("cohere2_moe", {**COMMAND_MOE, "expert_selection_fn": "sigmoid"}),
    "cohere2_moe, LayerNorm": (
        "cohere2_moe",
        {
            **COMMAND_MOE,
            "rms_norm_eps": None,
            "prefix_dense_sliding_window_pattern": 2,
            "shared_expert_combination_strategy": "sum",
        },
    ),
    "cwm": ("cwm", MIXED),
    "dots1": (
        "dots1",
        {**EXPERTS, **MIXED, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    ),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "moe_layer_start_index": 1}),
    "exaone4": ("exaone4", MIXED),
    "exaone4, no window": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "exaone_moe": ("exaone_moe", {**EXPERTS, **MIXED}),
    "flex_olmo": ("flex_olmo", {**EXPERTS, "attention_bias": True}),
    "gemma": ("gemma", {}),
    "gemma3_text": ("gemma3_text", {**MIXED, "rope_parameters": TWO_ROPES}),
    "glm": ("glm", {"attention_bias": True, **PARTIAL}),
    "glm4": ("glm4", PARTIAL),
    "glm4_moe": ("glm4_moe", {**EXPERTS, **PARTIAL, "use_qk_norm": True}),
    "granite": ("granite", MUP),
    "granitemoe": ("granitemoe", {**MUP, **EXPERTS}),
    "granitemoeshared": ("granitemoeshared", {**MUP, **EXPERTS}),
    "helium": ("helium", {}),
    "hy_v3": ("hy_v3", {**EXPERTS, "attention_bias": True, "mlp_bias": True}),
    "hyperclovax": ("hyperclovax", MUP),
    "internlm3": ("internlm3", {"qkv_bias": True, "bias": True, "rope_parameters": DYNAMIC}),
    "iquestcoder": ("iquestcoder", {"attention_bias": True}),
    "jais2": ("jais2", {}),
    "kolibri1": ("kolibri1", {**EXPERTS, **MIXED}),
    "mellum": (
        "mellum",
        {
            **EXPERTS,
            **MIXED,
            "rope_parameters": TWO_ROPES,
            "mlp_layer_types": ["dense", "sparse"] * 2,
        },
    ),
    "minimax_m2": ("minimax_m2", {**EXPERTS, **PARTIAL}),
    "ministral": ("ministral", MIXED),
    "ministral3": ("ministral3", TEMPERED),
    "ministral3, window": ("ministral3", {**TEMPERED, "sliding_window": 24}),
    "mixtral": ("mixtral", {**EXPERTS, "sliding_window": None}),
    "mixtral, window": ("mixtral", {**EXPERTS, "sliding_window": 24}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True, **PARTIAL}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**MIXED, "rope_parameters": TWO_ROPES}),
    "olmoe": ("olmoe", EXPERTS),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, partial": ("phi3", {"sliding_window": None, **PARTIAL}),
    "phi3, window": ("phi3", {"sliding_window": 24}),
    "phimoe": ("phimoe", {**EXPERTS, "attention_bias": True}),
    "phimoe, window": ("phimoe", {**EXPERTS, "sliding_window": 24}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {**LAYERS, "no_rope_layer_interval": 2}),
    "solar_open": ("solar_open", {**EXPERTS, "attention_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, **PARTIAL}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, **PARTIAL}),
    "starcoder2": ("starcoder2", {"sliding_window": None, "use_bias": True}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 24}),
}
CASES = {name: case for name, case in ALL.items() if case[0] in CONFIG_MAPPING}
"""Those that the installed transformers knows."""
