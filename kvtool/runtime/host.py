"""Loads a checkpoint as a host model whose attention modules read and write our stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvtool.attention import (
    FactoredAttention,
    GroupedQueryAttention,
    MultiheadLatentAttention,
    apply_latent_eps,
    decoder_layers,
    describe,
    recognise,
    rope_of,
)
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.factored import MODEL_TYPE, base_config, is_factor, read_factors
from kvtool.runtime.layers import (
    DecodeLinear,
    DenseAttention,
    LatentRuntimeAttention,
    RuntimeAttention,
)


def load_host(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str
) -> tuple[nn.Module, list[RuntimeAttention]]:
    """The model with its attention modules swapped, and those modules in layer order.

    Raises:
        UnsupportedModelError: An attention module is not one that kvtool knows.
        CheckpointError: Tensors are missing, left over, or have the wrong shape.
    """
    factored = checkpoint.config.get("model_type") == MODEL_TYPE
    config = base_config(checkpoint.config) if factored else checkpoint.hf_config()
    target = checkpoint.config.get("kvtool", {}).get("target")
    if dtype == torch.float16 and target in ("transformers", "vllm"):
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot run in float16: the scaling that makes its latent norm "
            "linear underflows there",
            hint="use bfloat16 or float32",
        )
    describe(config)
    rope = rope_of(config)
    if factored:
        model = _load_base(checkpoint, config, dtype).to(device)
    else:
        model = checkpoint.load_transformers(dtype, device)
        apply_latent_eps(model, checkpoint.config)
    inv_freq = rope.inv_freq.to(device)
    swapped: list[RuntimeAttention] = []
    for i, layer in enumerate(decoder_layers(model)):
        module, name = layer.self_attn, f"model.layers.{i}.self_attn"
        attention: RuntimeAttention
        if recognise(module, name).kind == "mla":
            latent = MultiheadLatentAttention(module, name, inv_freq)
            attention = LatentRuntimeAttention(latent, i, rope.scale)
        elif factored:
            factors = read_factors(checkpoint, i)
            stages = FactoredAttention(GroupedQueryAttention(module, name), factors)
            attention = LatentRuntimeAttention(stages, i, rope.scale)
        else:
            attention = DenseAttention(GroupedQueryAttention(module, name), i, inv_freq, rope.scale)
        layer.self_attn = attention
        swapped.append(attention)
    DecodeLinear.replace_in(model)
    return model, swapped


def _load_base(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> nn.Module:
    """The base model inside a `kvtool_mla` checkpoint, without its factors."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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
    host: nn.Module = model.eval()
    return host
