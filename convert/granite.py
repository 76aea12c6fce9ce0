"""Writes a hybrid model in the layout of `GraniteMoeHybridForCausalLM`, dense, multipliers at 1.

Layers that keep their attention are the source's, to the bit: names change, and the two halves of
the MLP's input lie in one matrix. A *linear* mixer (see `kvtool.mamba`) is written into the stock
one, which puts SiLU on x and an RMSNorm on the output, by making x tiny: with taps 2εw and norm
weights γ √ε_norm / ε,

    SiLU(2εx) = εx (1 + εx + ...),   γ √ε_norm / ε · RMSNorm(εg) = γg / √(1 + ε² mean(g²) / ε_norm),

and both are linear to `float32` at ε = 2^-40 for all x and g that occur. It then does not matter
over which channels the norm takes its mean, on which engines differ: transformers 5.17 takes all of
them, transformers 5.23 and vLLM those of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from kvtool.layout import HYBRID, AttentionLayout
from kvtool.mamba import Mixer
from kvtool.replacements import mixer_shape

EPSILON = 2.0**-40
"""A power of two, so that weights are scaled exactly. Too small for float16."""

_MLP = {"mlp.down_proj.weight": "shared_mlp.output_linear.weight"}
_GATE, _UP, _INPUT = "mlp.gate_proj.weight", "mlp.up_proj.weight", "shared_mlp.input_linear.weight"


def other_tensors(names: Collection[str], layers: Collection[int]) -> dict[str, tuple[str, ...]]:
    """Tensors of the output by name, with those of the source that they are, joined by rows.

    Args:
        names: Tensors of the source.
        layers: Those whose attention is replaced, of which nothing is taken.
    """
    taken: dict[str, tuple[str, ...]] = {}
    for name in names:
        prefix, own = _split(name)
        if own.startswith("self_attn.") and (
            int(prefix.split(".")[2]) in layers or "rotary_emb" in own
        ):
            continue
        if own == _GATE:
            taken[prefix + _INPUT] = (name, prefix + _UP)
        elif own != _UP:
            taken[prefix + _MLP.get(own, own)] = (name,)
    return taken


def _split(name: str) -> tuple[str, str]:
    """`model.layers.3.` and what follows; an empty prefix outside the layers."""
    if not name.startswith("model.layers."):
        return "", name
    parts = name.split(".", 3)
    return ".".join(parts[:3]) + ".", parts[3]


def zero_bias(layout: AttentionLayout) -> bool:
    """Whether kept layers need an output bias of zeros: the class has all four or none."""
    return layout.qkv_bias and not layout.output_bias


def stock_mixer(mixer: Mixer, norm_eps: float) -> dict[str, Tensor]:
    """The tensors of a linear mixer in the stock form, fp32, names relative to `mamba`."""
    assert mixer.linear
    shape, own = mixer.shape, {n: p.detach().float() for n, p in mixer.named_parameters()}
    scale = torch.ones(shape.convolved, device=own["D"].device)
    scale[: shape.inner] = 2 * EPSILON
    return {
        "in_proj.weight": own["in_proj.weight"],
        "in_proj.bias": own["in_proj.bias"],
        "conv1d.weight": (scale[:, None] * own["conv_weight"])[:, None],
        "conv1d.bias": scale * own["conv_bias"],
        "dt_bias": own["dt_bias"],
        "A_log": own["A_log"],
        "D": own["D"],
        "norm.weight": own["norm_weight"] * (norm_eps**0.5 / EPSILON),
        "out_proj.weight": own["out_proj.weight"],
        "out_proj.bias": own["out_proj.bias"],
    }


KEPT_FLOAT32 = ("dt_bias", "A_log", "D")
"""Of a mixer: a decay per token of 1 - 1/1000 is lost in bfloat16."""


def stock_config(
    config: Any, layout: AttentionLayout, layers: Collection[int], dtype: str
) -> dict[str, Any]:
    """`config.json` of the output: every field that the class would default wrongly.

    Args:
        config: The source's.
        layers: Those with a mixer.
    """
    carried = (
        "attention_dropout bos_token_id eos_token_id pad_token_id hidden_act hidden_size "
        "initializer_range intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters tie_word_embeddings "
        "use_cache vocab_size"
    )
    values = config.to_dict()
    shape = mixer_shape(layout)
    count = config.num_hidden_layers
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": HYBRID,
        **{name: values[name] for name in carried.split() if name in values},
        "dtype": dtype,
        "attention_bias": layout.qkv_bias or layout.output_bias,
        "attention_multiplier": layout.scaling,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "position_embedding_type": "rope",
        # Under the names that both transformers and vLLM read.
        "layer_types": ["mamba" if i in layers else "attention" for i in range(count)],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config.intermediate_size,
        "mamba_expand": shape.inner // shape.hidden_size,
        "mamba_n_heads": shape.heads,
        "mamba_d_head": shape.head_dim,
        "mamba_d_state": shape.state,
        "mamba_n_groups": shape.groups,
        "mamba_d_conv": shape.taps,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": True,
    }


def check(config: Any, layout: AttentionLayout) -> list[str]:
    """Reasons why a model has no place in the class; empty if it has one."""
    reasons = []
    if layout.qk_norm:
        reasons.append("q/k norm (Qwen3) has no place in the stock hybrid class")
    if getattr(config, "mlp_bias", False):
        reasons.append("the stock hybrid class has no bias in its MLP")
    if config.hidden_act != "silu":
        reasons.append(f"the stock hybrid class applies '{config.hidden_act}' in its mixers, too")
    if layout.heads * layout.head_dim != layout.hidden_size:
        reasons.append(
            f"{layout.heads} heads of {layout.head_dim} are not as wide as the hidden states "
            f"({layout.hidden_size}), which the stock hybrid class takes for granted"
        )
    return reasons


def reader(read: Callable[[str], Tensor], parts: tuple[str, ...]) -> Callable[[], Tensor]:
    """Reads a tensor of :func:`other_tensors` when it is called."""
    return lambda: read(parts[0]) if len(parts) == 1 else torch.cat([read(p) for p in parts])


def joined_shape(shapes: Mapping[str, tuple[int, ...]], parts: tuple[str, ...]) -> tuple[int, ...]:
    """Its shape, from those of the source's tensors."""
    first = shapes[parts[0]]
    return (sum(shapes[part][0] for part in parts), *first[1:])
