"""Models of several modalities, taken as the decoder of their text.

A wrapper (`...ForConditionalGeneration`) holds a decoder, and beside it what turns images or sound
into embeddings for it. Given text alone, it computes what its decoder computes. So it is read as a
checkpoint of that decoder: the config is the section of the decoder, and its tensors have the names
that the decoder's own `...ForCausalLM` gives them. Nothing else of the wrapper is looked at.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from kvtool._tensors import DerivedTensor, TensorInfo, first_line
from kvtool._transformers import quiet_transformers
from kvtool.errors import CheckpointError, UnsupportedModelError

WRAPPERS = (
    *("aya_vision", "cohere2_vision", "gemma3", "gemma4", "gemma4_unified", "glm4v", "glm4v_moe"),
    *("idefics2", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
    *("qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl"),
    *("qwen3_vl_moe", "smolvlm", "vipllava", "voxtral"),
)
"""Model types of wrappers; each is checked by a test. The decoder inside has a type of its own."""
_OTHERS = {
    "mllama": "its text attends to images in layers of their own",
    "paligemma": "it reads a prompt in both directions",
}
"""Why text is not all that the decoder of some others needs."""
SECTIONED: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4v_moe_text": ("glm4_moe", {}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", {}),
}
"""Decoders that differ from others by RoPE in sections, for time, height and width: of text, all
three are the position of the token, which makes it ordinary RoPE. Beside the type of the other one,
what its config does not say by itself."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_INHERITED = ("bos_token_id", "eos_token_id", "quantization_config")
"""Fields of the wrapper that count for the decoder, too, before its own."""
_DTYPE = ("dtype", "torch_dtype")
"""Those that count where the decoder has none of its own."""

# Names have changed with the versions of transformers, some of which even wrote `model.` twice.
_HEAD = re.compile(r"(?:model\.)?(?:language_model\.|text_model\.)?(lm_head\..+)")
_BODY = re.compile(
    r"(?:(?:model\.)?(?:language_model|text_model)\.(?:model\.)*|model\.(?=embed_tokens|layers|norm))"
    r"(.+)"
)
_PASSED_OVER = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|visual|audio_tower|embed_vision|embed_audio"
    r"|vision_embedder|multi_modal_projector|connector|image_newline|mtp)(?:\..+)?"
)
"""Towers, what projects their output, and heads that predict more than the next token."""


def wrapper_of(config: dict[str, Any]) -> str | None:
    """The architecture of a wrapper; None of any other `config.json`."""
    names = config.get("architectures") or [None]
    is_one = str(names[0]).endswith("ForConditionalGeneration")
    return names[0] if is_one and not config.get("is_encoder_decoder") else None


def text_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` of the decoder alone would say.

    It keeps to what the file says, so that it is the same with every version of transformers; only
    where the wrapper's class means more than that, its values are put in.

    Args:
        config: The content of the wrapper's `config.json`.

    Raises:
        UnsupportedModelError: The wrapper or its decoder is not known.
        CheckpointError: Transformers does not take its config.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type"))
    if kind not in WRAPPERS:
        reason = f": {_OTHERS[kind]}" if kind in _OTHERS else ""
        raise UnsupportedModelError(
            f"{path} is a model of several modalities, {wrapper_of(config)} ({kind}), whose text "
            f"kvtool cannot take alone{reason}.",
            hint=f"supported: the text of {', '.join(WRAPPERS)}",
        )
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"{path} has model type {kind}, which transformers lacks.")
    inside = config.get("text_config", {})
    if not isinstance(inside, dict):
        raise CheckpointError(f"{path / 'config.json'}: text_config is not an object.")
    if (decoder := inside.get("model_type", kind)) not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path} has a decoder of type {decoder}, which transformers lacks."
        )
    try:
        with quiet_transformers():
            whole = AutoConfig.from_pretrained(path, local_files_only=True)
            own = whole.get_text_config(decoder=True).to_dict()
            # Those of Qwen2-VL have the decoder's fields among their own.
            said = config.get("text_config") or {key: config[key] for key in own if key in config}
            more: dict[str, Any] = {}
            if (decoder := own["model_type"]) in SECTIONED:
                decoder, more = SECTIONED[decoder]
                said = {key: value for key, value in said.items() if key not in _ROPE}
                own["rope_parameters"] = _without_sections(own["rope_parameters"])
            said = {key: value for key, value in said.items() if key != "model_type"}
            plain = AutoConfig.for_model(decoder, **copy.deepcopy(said)).to_dict()
    except Exception as error:  # whatever impossible values make transformers raise
        raise CheckpointError(
            f"transformers cannot load the config of {path}: {first_line(error)}"
        ) from error
    if decoder not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{path} has a decoder of type {decoder}, which transformers does not run alone."
        )
    return {
        **{key: config[key] for key in _DTYPE if key in config},
        **said,
        **{key: own[key] for key, value in plain.items() if own.get(key, value) != value},
        **more,
        **{key: config[key] for key in _INHERITED if config.get(key) is not None},
        "model_type": decoder,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[decoder]],
        # Where both say something, transformers ties the head by what the wrapper says.
        "tie_word_embeddings": bool(getattr(whole, "tie_word_embeddings", False)),
    }


def text_tensors(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the decoder, under the names of its `...ForCausalLM`.

    Raises:
        CheckpointError: A name is not known, or two mean the same tensor.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if match := _HEAD.fullmatch(name):
            own = match[1]
        elif match := _BODY.fullmatch(name):
            own = f"model.{match[1]}"
        elif _PASSED_OVER.fullmatch(name):
            continue
        else:
            raise CheckpointError(
                f"{path} has a tensor {name}, which is neither of its text nor of a part beside it "
                "that kvtool knows."
            )
        if own in found:
            raise CheckpointError(f"{path} has both {found[own].name} and {name}, the same tensor.")
        found[own] = info
    return found


def upright(
    wrapper: str, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Tensors as the modules of the decoder have them: Qwen3-VL-MoE stores experts transposed.

    As in transformers, those that have the shape of the module already are left as they are.
    """
    if wrapper != "Qwen3VLMoeForConditionalGeneration":
        return tensors
    place = {"gate_up_proj": -1, "down_proj": -2}  # of the hidden size, in a module
    return {
        name: _transposed(info)
        if (at := place.get(name.rpartition(".experts.")[2]))
        and info.shape[at] != config["hidden_size"]
        else info
        for name, info in tensors.items()
    }


def _transposed(info: TensorInfo) -> DerivedTensor:
    *front, rows, columns = info.shape
    return DerivedTensor(
        *(info.name, (*front, columns, rows), info.dtype, info.file, info.stored),
        lambda stored: info.value(stored).mT.contiguous(),
    )


def _without_sections(rope: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    rest.pop("type", None)  # an older name of rope_type, which knew `mrope`
    return rest
