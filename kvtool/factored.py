"""The format that only kvtool's runtime loads: a base model, and latent factors beside it.

`config.json` has model type `kvtool_mla` and the base model's config under `base`. The base model's
tensors are all there, unchanged; next to each attention module are the :class:`LatentFactors` as
`model.layers.{i}.self_attn.latent.{rope,inv_freq,down,key_up,value_up}`. It expresses what stock
MLA cannot: per-head q/k norms, biases, frequencies and ranks that differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kvtool._transformers import empty_model
from kvtool.attention import GroupedQueryAttention
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError
from kvtool.latent import (
    FactoredAttention,
    LatentAttention,
    LatentFactors,
    MultiheadLatentAttention,
    used_rank,
)
from kvtool.layout import LATENT, apply_latent_eps, recognise

MODEL_TYPE = "kvtool_mla"
_PREFIX = "model.layers.{}.self_attn.latent."
_NAMES = tuple(field.name for field in fields(LatentFactors))


def is_factor(name: str) -> bool:
    """Whether a tensor name belongs to the factors, not to the base model."""
    return ".self_attn.latent." in name


def factored_config(base: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a factored checkpoint."""
    return {"architectures": ["KvtoolMlaForCausalLM"], "model_type": MODEL_TYPE, "base": base}


def base_config(config: dict[str, Any]) -> Any:
    """The transformers config of the base model inside `config.json`."""
    from transformers import AutoConfig

    values = dict(config["base"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def is_factored(checkpoint: Checkpoint) -> bool:
    """Whether it has this format."""
    return checkpoint.config.get("model_type") == MODEL_TYPE


def model_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of the model, or of the base model inside it."""
    return base_config(checkpoint.config) if is_factored(checkpoint) else checkpoint.hf_config()


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The transformers model, or the base model without its factors.

    Raises:
        CheckpointError: Tensors are missing, left over, or have the wrong shape.
    """
    if not is_factored(checkpoint):
        model = checkpoint.load_transformers(dtype, device)
        apply_latent_eps(model, checkpoint.config)
        return model
    return _load_base(checkpoint, dtype).to(device)


def latent_stages(
    module: Any, name: str, inv_freq: Tensor, factors_in: Checkpoint | None, layer: int
) -> LatentAttention | None:
    """The stages of an attention module that caches a latent; None of one that does not.

    Args:
        factors_in: Where the factors are, of a checkpoint of this format.
    """
    if recognise(module, name).kind == "mla":
        return MultiheadLatentAttention(module, name, inv_freq)
    if factors_in is None:
        return None
    return FactoredAttention(GroupedQueryAttention(module, name), read_factors(factors_in, layer))


def latent_sizes(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """r and d_r of every layer as the runtime stores them; nothing where layers have no latent."""
    config, found = model_config(checkpoint), []
    for index in range(config.num_hidden_layers if is_latent(checkpoint) else 0):
        if is_factored(checkpoint):
            prefix = _PREFIX.format(index)
            down, rope = (checkpoint.tensors[prefix + name].shape[0] for name in ("down", "rope"))
            found.append((down, rope))
            continue
        name = f"model.layers.{index}.self_attn.kv_a_proj_with_mqa."
        rank, tensors = config.kv_lora_rank, checkpoint.tensors
        bias = checkpoint.read(name + "bias")[:rank] if name + "bias" in tensors else None
        used = used_rank(checkpoint.read(name + "weight")[:rank], bias)
        found.append((used, config.qk_rope_head_dim))
    return found


def is_latent(checkpoint: Checkpoint) -> bool:
    """Whether its layers keep latents."""
    return checkpoint.config.get("model_type") in (MODEL_TYPE, *LATENT)


def factor_tensors(layer: int, factors: LatentFactors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write for one layer; frequencies stay fp32."""
    prefix = _PREFIX.format(layer)
    tensors = {prefix + name: getattr(factors, name).to(dtype).contiguous() for name in _NAMES}
    tensors[prefix + "inv_freq"] = factors.inv_freq.float()
    return tensors


def read_factors(checkpoint: Checkpoint, layer: int) -> LatentFactors:
    """The factors of one layer.

    Raises:
        CheckpointError: Some are missing.
    """
    stored = checkpoint.read_prefix(_PREFIX.format(layer))
    if missing := set(_NAMES) - set(stored):
        raise CheckpointError(
            f"{checkpoint.source}: layer {layer} lacks its latent factors {sorted(missing)}"
        )
    return LatentFactors(**{name: stored[name] for name in _NAMES})


def _load_base(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The base model inside a `kvtool_mla` checkpoint, without its factors."""
    config = base_config(checkpoint.config)
    model = empty_model(config)
    state: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        if not is_factor(name):
            state[name] = checkpoint.read(name).to(dtype)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a wrong shape
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint.source}: {reason}") from error
    if config.tie_word_embeddings:
        model.tie_weights()
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.source}: missing tensors {missing[:3]}, unexpected {unexpected[:3]}"
        )
    # Buffers are not in the file; the rotary one is computed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config = checkpoint.generation_config() or model.generation_config
    return model.eval()
