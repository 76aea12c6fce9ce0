"""Loads a checkpoint as a host model whose attention modules read and write our stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.attention import (
    AttentionLayout,
    GroupedQueryAttention,
    Rope,
    apply_latent_eps,
    decoder_layers,
    describe,
    is_mixer,
    recognise,
    rope_of,
)
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Code, Positions, load_code
from kvtool.errors import CheckpointError, PlanError, UnsupportedModelError
from kvtool.factored import MODEL_TYPE, base_config, is_factor, read_factors
from kvtool.latent import FactoredAttention, MultiheadLatentAttention
from kvtool.mamba import Mixer
from kvtool.plan import Plan
from kvtool.runtime.coded import CodedAttention
from kvtool.runtime.layers import (
    DecodeLinear,
    DenseAttention,
    FusedNorm,
    LatentRuntimeAttention,
    RuntimeAttention,
)
from kvtool.runtime.packed import PackedAttention
from kvtool.runtime.recurrent import RuntimeMixer
from kvtool.runtime.split import SplitAttention


def load_host(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str, plan: Plan | None = None
) -> tuple[nn.Module, list[RuntimeAttention]]:
    """The model with its attention modules swapped, and those modules in layer order.

    Raises:
        UnsupportedModelError: An attention module is not one that kvtool knows, or not one that
            the plan can be applied to.
        CheckpointError: Tensors are missing, left over, or have the wrong shape.
        PlanError: The plan belongs to another model.
    """
    factored = checkpoint.config.get("model_type") == MODEL_TYPE
    config = base_config(checkpoint.config) if factored else checkpoint.hf_config()
    target = checkpoint.config.get("kvtool", {}).get("target")
    if dtype == torch.float16 and target in ("transformers", "vllm"):
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot run in float16: the scaling that makes its norms linear "
            "underflows there",
            hint="use bfloat16 or float32",
        )
    layouts = describe(config)
    if plan is not None:
        _check_plan(plan, checkpoint, layouts, factored)
    rope = rope_of(config)
    if factored:
        model = _load_base(checkpoint, config, dtype).to(device)
    else:
        model = checkpoint.load_transformers(dtype, device)
        apply_latent_eps(model, checkpoint.config)
    return model, swap_attention(model, rope, plan, checkpoint if factored else None)


def swap_attention(
    model: Any, rope: Rope, plan: Plan | None = None, factors_in: Checkpoint | None = None
) -> list[RuntimeAttention]:
    """Puts our attention modules into a transformers model, and returns them.

    Args:
        factors_in: Where the factors of a `kvtool_mla` model are.
    """
    if model.device.type == "cuda":
        FusedNorm.replace_in(model)
    inv_freq = rope.inv_freq.to(model.device)
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    positions = Positions(Rope(inv_freq, rope.scale), like)
    codes = _codes(plan, positions)
    exact = Positions(positions.rope, like.float())  # few bits magnify what is rounded before
    swapped: list[RuntimeAttention] = []
    for i, layer in enumerate(decoder_layers(model)):
        if is_mixer(layer):
            layer.mamba = RuntimeMixer(Mixer.of(layer.mamba), i, inv_freq, rope.scale)
            swapped.append(layer.mamba)
            continue
        module, name = layer.self_attn, f"model.layers.{i}.self_attn"
        attention: RuntimeAttention
        if recognise(module, name).kind == "mla":
            latent = MultiheadLatentAttention(module, name, inv_freq)
            attention = LatentRuntimeAttention(latent, i, rope.scale)
        elif factors_in is not None:
            factors = read_factors(factors_in, i)
            stages = FactoredAttention(GroupedQueryAttention(module, name), factors)
            attention = LatentRuntimeAttention(stages, i, rope.scale)
        else:
            grouped = GroupedQueryAttention(module, name)
            if plan is not None and plan.codes:
                dense = plan.prefill == "dense"
                attention = CodedAttention(grouped, i, inv_freq, rope.scale, *codes[i], dense)
            elif plan is None or plan.layers[i].plain:
                attention = DenseAttention(grouped, i, inv_freq, rope.scale)
            elif plan.layers[i].bits is not None:
                attention = PackedAttention(grouped, i, plan, exact)
            else:
                attention = SplitAttention(grouped, i, inv_freq, rope.scale, plan)
        layer.self_attn = attention
        swapped.append(attention)
    DecodeLinear.replace_in(model)
    return swapped


def _codes(plan: Plan | None, positions: Positions) -> list[tuple[Code, int]]:
    """By layer of the model: its code, and which of the layers of the code it is."""
    found: list[tuple[Code, int]] = []
    for index, planned in enumerate(() if plan is None else plan.codes):
        assert plan is not None
        code = load_code(index, planned, plan.tensors, plan.base.kv_heads, positions)
        found += [(code, layer) for layer in range(planned.layers)]
    return found


def _check_plan(
    plan: Plan, checkpoint: Checkpoint, layouts: Sequence[AttentionLayout], factored: bool
) -> None:
    """Refuses a plan that the model's attention cannot obey, or that was made for another."""
    if any(layout.kind == "mamba" for layout in layouts):
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot run with a plan: some of its layers keep a state and no "
            "keys and values",
            hint="use the plan with the model that this one was converted from",
        )
    if factored or any(layout.kind == "mla" for layout in layouts):
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot run with a plan: its heads share one latent, so none of "
            "them can keep less than the others",
            hint="use the plan with the model that this one was converted from",
        )
    plan.check_base(checkpoint)
    positions = int(checkpoint.hf_config().max_position_embeddings)
    for i, (kept, ring, layout) in enumerate(zip(plan.layers, plan.rings, layouts, strict=True)):
        if ring.sink + ring.window > positions:
            raise PlanError(
                f"layer {i} keeps the first {ring.sink} and last {ring.window} tokens, more than "
                f"the {positions} positions of {checkpoint.source}"
            )
        if kept.bits is not None and kept.bits.sink + kept.bits.ring > positions:
            raise PlanError(
                f"layer {i} has exact room for {kept.bits.sink + kept.bits.ring} tokens, more than "
                f"the {positions} positions of {checkpoint.source}"
            )
        if layout.sliding_window is not None and (plan.codes or not kept.plain):
            raise UnsupportedModelError(
                f"layer {i} of {checkpoint.source} has a sliding window of {layout.sliding_window} "
                "tokens, so its heads cannot stream, have a token budget, few bits or a code",
                hint="plan all heads of such layers as full",
            )


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
