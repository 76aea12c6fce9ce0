"""Loads a checkpoint as a host model whose attention modules read and write our stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.attention import BorrowingAttention, GroupedQueryAttention, grouped_attention
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Code, Positions, load_code
from kvtool.errors import PlanError, UnsupportedModelError
from kvtool.factored import is_factored, latent_stages, load_model, model_config
from kvtool.latent import LatentAttention
from kvtool.latent_bits import LatentPlan
from kvtool.layout import AttentionLayout, decoder_layers, describe, mixer_of, put_in
from kvtool.plan import Plan
from kvtool.rope import Rope, ropes_of
from kvtool.runtime.coded import CodedAttention
from kvtool.runtime.floats import FloatAttention
from kvtool.runtime.fused import fuse
from kvtool.runtime.layers import (
    DecodeLinear,
    DenseAttention,
    LatentRuntimeAttention,
    RuntimeAttention,
)
from kvtool.runtime.packed_attention import PackedAttention
from kvtool.runtime.packed_latents import PackedLatentAttention
from kvtool.runtime.recurrent import RuntimeMixer
from kvtool.runtime.shared import SharedAttention
from kvtool.runtime.sparse import SparseAttention
from kvtool.runtime.split_attention import SplitAttention
from kvtool.runtime.windowed import WindowedAttention
from kvtool.sharing import SharedPlan
from kvtool.states import StatePlan
from kvtool.windows import WindowPlan

_KEPT = {
    "gqa": "KV heads",
    "mla": "latents",
    "state": "states",
    "window": "the window that it sees",
    "shared": "a past that several layers read",
}
_PLANNED = {StatePlan: "state", LatentPlan: "mla", WindowPlan: "window", SharedPlan: "shared"}


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
    factored, config = is_factored(checkpoint), model_config(checkpoint)
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
    ropes = ropes_of(config)
    model = load_model(checkpoint, dtype, device)
    return model, swap_attention(model, ropes, plan, checkpoint if factored else None)


def swap_attention(
    model: Any,
    ropes: Sequence[Rope],
    plan: Plan | None = None,
    factors_in: Checkpoint | None = None,
) -> list[RuntimeAttention]:
    """Puts our attention modules into a transformers model, and returns them.

    Args:
        ropes: Of every layer.
        factors_in: Where the factors of a `kvtool_mla` model are.
    """
    if model.device.type == "cuda":
        fuse(model)
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    ropes = [rope.to(model.device) for rope in ropes]
    codes = _codes(plan, _positions(ropes, like))
    exact = _positions(ropes, like.float())  # few bits magnify what is rounded before
    swapped: list[RuntimeAttention] = []
    for i, (layer, rope) in enumerate(zip(decoder_layers(model), ropes, strict=True)):
        attention: RuntimeAttention
        if (mixer := mixer_of(layer)) is not None:
            kept = None if plan is None else plan.layers[i].kept
            attention = RuntimeMixer(mixer, i, rope, kept if isinstance(kept, StatePlan) else None)
        else:
            module, name = layer.self_attn, f"model.layers.{i}.self_attn"
            stages = latent_stages(module, name, rope.inv_freq, factors_in, i)
            if stages is not None:
                attention = _latent_attention(stages, i, rope.scale, plan)
            else:
                grouped = grouped_attention(module, name)
                attention = _grouped_attention(grouped, i, rope, plan, codes, exact[i])
        put_in(layer, attention)
        swapped.append(attention)
    DecodeLinear.replace_in(model)
    return swapped


def _grouped_attention(
    stages: GroupedQueryAttention, index: int, rope: Rope, plan: Plan | None,
    codes: Mapping[int, tuple[Code, int]], exact: Positions,
) -> RuntimeAttention:  # fmt: skip
    """Over the store that a layer has by its nature, or else by the plan."""
    if isinstance(stages, BorrowingAttention):
        return SharedAttention(stages, index, rope)
    if stages.layout.sliding_window is not None:
        return WindowedAttention(stages, index, rope)
    if plan is None:
        return DenseAttention(stages, index, rope)
    own = plan.layers[index]
    if isinstance(own.kept, SharedPlan) and not own.packed:
        return DenseAttention(stages, index, rope)
    if plan.codes and own.kept is None:
        return CodedAttention(stages, index, rope, *codes[index], plan.prefill == "dense")
    if own.plain and plan.policy is None:
        return DenseAttention(stages, index, rope)
    if own.bits is not None:
        return PackedAttention(stages, index, plan, exact)
    if own.scales is not None:
        return FloatAttention(stages, index, rope, plan)
    if own.sparse is not None:
        return SparseAttention(stages, index, rope, plan)
    return SplitAttention(stages, index, rope, plan)


def _latent_attention(
    stages: LatentAttention, index: int, scale: float, plan: Plan | None
) -> LatentRuntimeAttention:
    kept = None if plan is None else plan.layers[index].kept
    if plan is None or not isinstance(kept, LatentPlan):
        return LatentRuntimeAttention(stages, index, scale)
    if (kept.rank, kept.rope_dim) != (stages.rank, stages.rope_dim):
        raise PlanError(f"layer {index} has a latent of other sizes than are planned")
    return PackedLatentAttention(stages, index, scale, kept, plan.prefill == "dense")


def _positions(ropes: Sequence[Rope], like: Tensor) -> list[Positions]:
    """By layer: the tables of its RoPE, the same where layers turn alike."""
    found: list[Positions] = []
    for rope in ropes:
        alike = (one for one in found if one.rope.equals(rope))
        found.append(next(alike, None) or Positions(rope, like))
    return found


def _codes(plan: Plan | None, positions: Sequence[Positions]) -> dict[int, tuple[Code, int]]:
    """By layer that has one: its code, and which of the layers of the code it is."""
    found: dict[int, tuple[Code, int]] = {}
    if plan is None:
        return found
    for index, (planned, layers) in enumerate(zip(plan.codes, plan.coded_layers, strict=True)):
        own = [positions[layer] for layer in layers]
        code = load_code(index, planned, plan.tensors, plan.base.kv_heads, own)
        found |= {layer: (code, place) for place, layer in enumerate(layers)}
    return found


def _check_plan(
    plan: Plan, checkpoint: Checkpoint, layouts: Sequence[AttentionLayout], factored: bool
) -> None:
    """Refuses a plan that the model's attention cannot obey, or that was made for another."""
    latent = factored or any(layout.kind == "mla" for layout in layouts)
    if latent and all(layer.kept is None for layer in plan.layers):
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot run with a plan of heads alone: its heads share one "
            "latent, so none of them can keep less than the others",
            hint="use the plan with the model that this one was converted from",
        )
    plan.check_base(checkpoint)
    plan.check_context(checkpoint)
    for i, (layer, layout) in enumerate(zip(plan.layers, layouts, strict=True)):
        kept, of_layer = layer.kept, f"layer {i} of {checkpoint.source}"
        own = WindowPlan.of(layout) or SharedPlan.of(layout)  # by its nature
        kind: str = _PLANNED[type(own)] if own else "mla" if factored else layout.kind
        planned = _PLANNED.get(type(kept), "gqa")
        if planned != kind:
            raise PlanError(f"{of_layer} keeps {_KEPT[kind]}, and the plan is for {_KEPT[planned]}")
        if own and kept != own:
            has = "has a sliding window of" if isinstance(own, WindowPlan) else "shares"
            raise PlanError(f"{of_layer} {has} {own}, and {kept} is planned")
        if isinstance(kept, StatePlan) and layout.mixer and not kept.fits(layout.mixer):
            raise PlanError(f"{of_layer} has a state of another kind or size")
