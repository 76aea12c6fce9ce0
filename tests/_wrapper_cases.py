"""A small config of every wrapper, and its folder under the names of two ages."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from _family_cases import EXPERTS, GEMMA4, MIXED, MUP, SHARED, TWO_ROPES
from conftest import make_config, make_tokenizer, randomise
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING

_IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN = {
    "depth": 1, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
    "patch_size": 14, "out_hidden_size": 64, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}  # fmt: skip
_SOUND = {
    "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "encoder_layers": 1,
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
}  # fmt: skip
_PERCEIVER = {
    "hidden_size": 64, "resampler_n_heads": 2, "resampler_depth": 1, "num_key_value_heads": 1,
    "resampler_head_dim": 16,
}  # fmt: skip
_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 2, 2]}
}
_TEMPERED = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1,
    }
}  # fmt: skip
_GLM = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
}  # fmt: skip
_COHERE = {"logit_scale": 0.25, **MIXED}
_DELTA = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}

# Type of the wrapper, architecture without its ending, type of the decoder and its fields, and the
# wrapper's own.
CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ("aya_vision", "AyaVision", "cohere2", _COHERE, {}),
    "cohere2_vision": (
        *("cohere2_vision", "Cohere2Vision", "cohere2", _COHERE),
        {"alignment_intermediate_size": 32},
    ),
    "gemma3": ("gemma3", "Gemma3", "gemma3_text", {**MIXED, "rope_parameters": TWO_ROPES}, {}),
    "gemma4": ("gemma4", "Gemma4", "gemma4_text", {**MIXED, **GEMMA4}, {}),
    "gemma4, shared": ("gemma4", "Gemma4", "gemma4_text", SHARED, {}),
    "gemma4_unified": (
        "gemma4_unified",
        "Gemma4Unified",
        "gemma4_unified_text",
        {**MIXED, **GEMMA4},
        {},
    ),
    "glm4v": ("glm4v", "Glm4v", "glm4v_text", _GLM, {}),
    "glm4v_moe": ("glm4v_moe", "Glm4vMoe", "glm4v_moe_text", {**_GLM, **EXPERTS}, {}),
    "idefics2": ("idefics2", "Idefics2", "mistral", {}, {"perceiver_config": _PERCEIVER}),
    "idefics3": ("idefics3", "Idefics3", "llama", {}, {}),
    "internvl, qwen2": ("internvl", "InternVL", "qwen2", {}, UNTIED),
    "internvl, qwen3, tied": ("internvl", "InternVL", "qwen3", {}, TIED),
    "llava": ("llava", "Llava", "llama", {}, {}),
    "llava, tied inside": ("llava", "Llava", "llama", TIED, {}),
    "llava_next": ("llava_next", "LlavaNext", "granite", MUP, {}),
    "llava_onevision": ("llava_onevision", "LlavaOnevision", "qwen2", {}, {}),
    "mistral3": ("mistral3", "Mistral3", "mistral", {}, UNTIED),
    "mistral3, ministral3": ("mistral3", "Mistral3", "ministral3", _TEMPERED, UNTIED),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL", "qwen2_5_vl_text", _SECTIONS, {}),
    "qwen2_audio": ("qwen2_audio", "Qwen2Audio", "qwen2", {}, {}),
    "qwen2_vl": ("qwen2_vl", "Qwen2VL", "qwen2_vl_text", _SECTIONS, TIED),
    "qwen3_5": ("qwen3_5", "Qwen3_5", "qwen3_5_text", _DELTA, {}),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5Moe", "qwen3_5_moe_text", {**_DELTA, **EXPERTS}, {}),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL", "qwen3_vl_text", _SECTIONS, TIED),
    "qwen3_vl_moe": (
        *("qwen3_vl_moe", "Qwen3VLMoe", "qwen3_vl_moe_text"),
        {**_SECTIONS, **EXPERTS, "moe_intermediate_size": 24},
        {},
    ),
    "smolvlm": ("smolvlm", "SmolVLM", "llama", {}, {}),
    "vipllava": ("vipllava", "VipLlava", "llama", {}, {}),
    "voxtral": ("voxtral", "Voxtral", "llama", {}, {}),
}
_QWENS = (
    *("glm4v", "glm4v_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl"),
    "qwen3_vl_moe",
)
_TOWERS = {
    "qwen2_audio": _SOUND,
    "voxtral": _SOUND,
    "vipllava": {**_IMAGES, "num_hidden_layers": 12},
}
_TOWERS |= {"internvl": {**_IMAGES, "image_size": [28, 28], "patch_size": [14, 14]}}
_TOWERS |= dict.fromkeys(_QWENS, _QWEN)
KNOWN = [
    name
    for name, (kind, _, decoder, *_) in CASES.items()
    if kind in CONFIG_MAPPING and decoder in CONFIG_MAPPING
]
"""Those that the installed transformers has."""


def make_wrapper(name: str, folder: Path, seed: int = 0) -> tuple[nn.Module, dict[str, Path]]:
    """A random model with its tokenizer: in memory, as transformers saves it and its names are."""
    kind, architecture, decoder, text, own = CASES[name]
    tower = _TOWERS.get(kind, _IMAGES)
    config = CONFIG_MAPPING[kind](
        text_config=make_config(decoder, **text).to_dict(),
        **{"audio_config" if tower is _SOUND else "vision_config": tower},
        **own,
    )
    model = getattr(transformers, f"{architecture}ForConditionalGeneration")(config)
    randomise(model, decoder, seed)
    saved, named = folder / "saved", folder / "named"
    model.eval().save_pretrained(saved)
    make_tokenizer().save_pretrained(saved)
    shutil.copytree(saved, named)
    tied = getattr(config, "tie_word_embeddings", False)
    weights = {k: w for k, w in model.state_dict().items() if not tied or k != "lm_head.weight"}
    save_file(weights, named / "model.safetensors", {"format": "pt"})
    return model, {"saved": saved, "named": named}
