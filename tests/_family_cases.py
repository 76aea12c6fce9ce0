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
LAGUNA = {
    **EXPERTS,
    **MIXED,
    "num_attention_heads_per_layer": [4, 8, 2, 4],
    "rope_parameters": {
        **TWO_ROPES,
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "moe_routed_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 2.0,
}
COMMAND_MOE = {
    **EXPERTS,
    **MIXED,
    "logit_scale": 0.25,
    "num_shared_experts": 2,
    "prefix_dense_intermediate_size": 80,
    "mlp_layer_types": ["sparse", "dense"] * 2,
}
GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "top_k_experts": 2,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6,
        },
    },
}  # fmt: skip


SHARED = {
    **GEMMA4,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 300,
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 24,
    "use_double_wide_mlp": True,
}
"""As Gemma 4 E2B: of 8 layers the last 4 read layers 2 and 3."""


SINKS = {
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
GPT_OSS = ("gpt_oss", {**EXPERTS, **MIXED, **SINKS})


def long_rope(original: int, part: float) -> dict[str, Any]:
    """Of heads of size 16 in a context of 512, with another scale."""
    pairs = int(8 * part)
    return {
        "original_max_position_embeddings": original,  # Phi-3's own field, which counts
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": part,
            "original_max_position_embeddings": original,
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
        },
    }


DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    **PARTIAL,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "layer_types": ["mamba", "attention"] * 2,
    "position_embedding_type": "rope",
    "num_hidden_layers": 4,
}
ALL: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen3, with what only others read": (
        "qwen3",
        MUP | {"logit_scale": 0.25, "final_logit_softcapping": 3.0},
    ),
    "afmoe": ("afmoe", {**EXPERTS, **MIXED, "mup_enabled": True, "attention_bias": True}),
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
    "flint": ("flint", {**EXPERTS, **MIXED, "mlp_only_layers": [0]}),
    "gemma": ("gemma", {}),
    "gemma3_text": ("gemma3_text", {**MIXED, "rope_parameters": TWO_ROPES}),
    "gemma4_text": (
        "gemma4_text",
        {
            **{**MIXED, **GEMMA4, **EXPERTS, "enable_moe_block": True},
            "num_experts_per_tok": None,  # it goes by `top_k_experts`
        },
    ),
    "gemma4_text, keys are values": (
        "gemma4_text",
        {**MIXED, **GEMMA4, "attention_k_eq_v": True, "num_key_value_heads": 4},
    ),
    "gemma4_text, shared": ("gemma4_text", SHARED),
    "gemma4_text, shared by few": (
        "gemma4_text",
        {
            **{**SHARED, **EXPERTS, "enable_moe_block": True, "num_experts_per_tok": None},
            **{"num_kv_shared_layers": 1, "use_double_wide_mlp": False},
            **{"attention_k_eq_v": True, "num_key_value_heads": 4, "attention_bias": True},
        },
    ),
    "gemma4_unified_text": ("gemma4_unified_text", {**MIXED, **GEMMA4}),
    "gemma4_unified_text, shared": ("gemma4_unified_text", SHARED),
    "glm": ("glm", {"attention_bias": True, **PARTIAL}),
    "glm4": ("glm4", PARTIAL),
    "glm4_moe": ("glm4_moe", {**EXPERTS, **PARTIAL, "use_qk_norm": True}),
    "gpt_oss": GPT_OSS,
    "granite": ("granite", MUP),
    "granite_swa": ("granite_swa", {**MUP, **MIXED, "layer_rope_theta": [1e4, 1e6, 0, 1e4]}),
    "granite_swa, one RoPE": ("granite_swa", {**MUP, **MIXED}),
    "granitemoe_swa": (
        "granitemoe_swa",
        {**MUP, **EXPERTS, **MIXED, "layer_rope_theta": [1e4, 0, 1e5, 1e6]},
    ),
    "granitemoe": ("granitemoe", {**MUP, **EXPERTS}),
    "granitemoeshared": ("granitemoeshared", {**MUP, **EXPERTS}),
    "granitemoehybrid": ("granitemoehybrid", {**MUP, **EXPERTS, **MAMBA}),
    "granitemoehybrid, no positions": (
        "granitemoehybrid",
        {**MUP, **MAMBA, "num_local_experts": 0, "position_embedding_type": "nope"},
    ),
    "helium": ("helium", {}),
    "hy_v3": ("hy_v3", {**EXPERTS, "attention_bias": True, "mlp_bias": True}),
    "hyperclovax": ("hyperclovax", MUP),
    "internlm3": ("internlm3", {"qkv_bias": True, "bias": True, "rope_parameters": DYNAMIC}),
    "iquestcoder": ("iquestcoder", {"attention_bias": True}),
    "jais2": ("jais2", {}),
    "kolibri1": ("kolibri1", {**EXPERTS, **MIXED}),
    "laguna": ("laguna", LAGUNA),
    "laguna, gate per channel": ("laguna", {**LAGUNA, "gating": "per-channel"}),
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
    "phi3, longrope": ("phi3", {"sliding_window": None, **long_rope(16, 1.0)}),
    "phi3, longrope on a part": ("phi3", {"sliding_window": None, **long_rope(16, 0.5)}),
    "phi3, window": ("phi3", {"sliding_window": 24}),
    "phimoe": ("phimoe", {**EXPERTS, "attention_bias": True}),
    "phimoe, window": ("phimoe", {**EXPERTS, "sliding_window": 24}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**EXPERTS, **DELTA}),
    "qwen3_5_text": ("qwen3_5_text", {**DELTA, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_next, yarn": ("qwen3_next", {**EXPERTS, **DELTA, **YARN}),
    "qwen3_next": ("qwen3_next", {**EXPERTS, **DELTA, "mlp_only_layers": [1]}),
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

MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
GROUPED = {**EXPERTS, "n_shared_experts": 1, "n_group": 2, "routed_scaling_factor": 1.5}
YARN_IN_SCORES = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.0,
    }
}  # fmt: skip
ALL_LATENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "axk1": ("axk1", {**MLA, **GROUPED}),
    "deepseek_v2": (
        "deepseek_v2",
        {**MLA, **GROUPED, **YARN_IN_SCORES, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2, lite": (
        "deepseek_v2",
        {
            **{**MLA, **EXPERTS, "n_shared_experts": 1, "q_lora_rank": None},
            **{"topk_method": "greedy", "rope_interleave": False},  # which it does not read
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**MLA, **GROUPED, **YARN_IN_SCORES, "attention_bias": True}),
    "deepseek_v3, no experts": (
        "deepseek_v3",
        {**MLA, "first_k_dense_replace": 3, "q_lora_rank": None, "rope_interleave": False},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**MLA, **GROUPED}),
    "minicpm3": (
        "minicpm3",
        {
            **{**MLA, "scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 32},
            "rope_interleave": True,  # which it does not read
        },
    ),
    "youtu": ("youtu", MLA),
}
"""Those with MLA."""
LATENTS = {name: case for name, case in ALL_LATENTS.items() if case[0] in CONFIG_MAPPING}
