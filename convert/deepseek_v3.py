"""Writes :class:`LatentFactors` as a stock `deepseek_v3` layer: rows, biases, scale, latent norm.

The stock layer puts an RMSNorm on the latent, which no factor can absorb. It is made linear instead
(the *epsilon trick*): RMSNorm(δc)·γ = γδc / sqrt(δ² mean(c²) + ε) tends to c for γ = √ε/δ as
δ² mean(c²) falls below ε. δ comes from a bound on |c| over all possible inputs (the block's own
RMSNorm bounds those), so no token can break it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool.convert.targets import rope_parameters
from kvtool.latent import LatentFactors
from kvtool.layout import AttentionLayout
from kvtool.rope import Rope

NORM_ERROR = 1e-6
"""Largest relative change of a latent that the neutralised norm may cause."""


@dataclass(frozen=True)
class SourceLayer:
    """Tensors of a GQA layer that the conversion reads, float64.

    Attributes:
        query, key, value: `[Q·D, hidden]`, `[K, hidden]`, `[K, hidden]`.
        query_bias, key_bias, value_bias: The same without the last axis, or `None`.
        input_norm: `[hidden]`, weight of the RMSNorm in front of the attention.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    input_norm: Tensor


def stock_layer(
    source: SourceLayer,
    layout: AttentionLayout,
    factors: LatentFactors,
    rank: int,
    eps: float,
) -> dict[str, Tensor]:
    """Attention tensors of one layer, float64, names relative to `self_attn`.

    Args:
        rank: `kv_lora_rank` of the checkpoint; a narrower latent is padded with zeros.
        eps: Epsilon that the engine puts into the latent norms.
    """
    heads, groups, dim = layout.heads, layout.kv_heads, layout.head_dim
    rope_dim, nope_dim = factors.rope.shape[0], factors.key_up.shape[1]
    interleaved = torch.arange(rope_dim).view(2, -1).T.flatten()
    rope = factors.rope[interleaved]

    joint = torch.cat((source.key, source.value))
    latent = _pad_rows(factors.down @ joint, rank)
    joint_bias = None
    if source.key_bias is not None and source.value_bias is not None:
        joint_bias = torch.cat((source.key_bias, source.value_bias))
    latent_bias = None if joint_bias is None else _pad_rows(factors.down @ joint_bias, rank)
    delta, gamma = neutral_norm(latent, latent_bias, source.input_norm, eps)
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat((latent * delta, rope @ source.key)),
        "kv_a_layernorm.weight": torch.full((rank,), gamma, dtype=torch.float64),
    }
    if latent_bias is not None:
        assert source.key_bias is not None
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat(
            (latent_bias * delta, rope @ source.key_bias)
        )

    up = torch.cat((factors.key_up, factors.value_up), dim=1)  # [H, d_n + D, r]
    up = torch.nn.functional.pad(up, (0, rank - factors.rank))
    per_head = up.repeat_interleave(heads // groups, dim=0)
    tensors["kv_b_proj.weight"] = per_head.flatten(0, 1)

    # Per head: the original query, then its reading of the shared RoPE key; and the stock softmax
    # scale (d_n + d_r)^-1/2 undone.
    blocks = factors.rope_query[..., interleaved].mT  # [H, d_r, D]
    blocks = blocks.repeat_interleave(heads // groups, dim=0)
    select = torch.eye(dim, dtype=torch.float64)[:nope_dim].expand(heads, -1, -1)
    scale = layout.scaling * math.sqrt(nope_dim + rope_dim)
    reading = torch.cat((select, blocks), dim=1) * scale  # [Q, d_n + d_r, D]
    if source.query_bias is None:
        query = source.query.view(heads, dim, -1)
        tensors["q_proj.weight"] = torch.matmul(reading, query).flatten(0, 1)
        return tensors
    # Only q_a_proj may have a bias in the stock layer: there goes the original query, normed
    # neutrally, and q_b_proj reads it head by head.
    delta, gamma = neutral_norm(source.query, source.query_bias, source.input_norm, eps)
    tensors["q_a_proj.weight"] = source.query * delta
    tensors["q_a_proj.bias"] = source.query_bias * delta
    tensors["q_a_layernorm.weight"] = torch.full((heads * dim,), gamma, dtype=torch.float64)
    tensors["q_b_proj.weight"] = torch.block_diag(*reading)
    return tensors


def neutral_norm(
    weight: Tensor, bias: Tensor | None, input_norm: Tensor, eps: float
) -> tuple[float, float]:
    """δ and γ that make RMSNorm(δc)·γ = c for c = weight · x + bias, for every input x.

    x is the output of an RMSNorm with weight `input_norm`, so ‖x / input_norm‖ <= sqrt(hidden) and
    mean(c²) is bounded. δ = √ε·2^-m with the smallest m that keeps the relative error
    δ² mean(c²) / (2ε) below `NORM_ERROR`; γ = 2^m is exact in every float format.
    """
    longest = float(torch.linalg.matrix_norm(weight * input_norm, ord=2))
    longest *= math.sqrt(len(input_norm))
    if bias is not None:
        longest += float(bias.norm())
    mean_square = longest**2 / len(weight)
    m = max(0, math.ceil(math.log2(max(mean_square, 1e-300) / (2 * NORM_ERROR)) / 2))
    return math.sqrt(eps) * 2.0**-m, 2.0**m


def stock_config(
    config: Any,
    layout: AttentionLayout,
    inv_freq: Tensor,
    rope: Rope,
    rank: int,
    nope_dim: int,
    target: str,
    dtype: str,
) -> dict[str, Any]:
    """`config.json` of the output: every field that the stock class would default wrongly."""
    bias = layout.qkv_bias or layout.output_bias
    carried = (
        "attention_dropout bos_token_id eos_token_id pad_token_id hidden_act hidden_size "
        "initializer_range intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers rms_norm_eps use_cache vocab_size"
    )
    values = config.to_dict()
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: values[name] for name in carried.split() if name in values},
        "dtype": dtype,
        "num_key_value_heads": layout.heads,
        "kv_lora_rank": rank,
        "q_lora_rank": layout.heads * layout.head_dim if layout.qkv_bias else None,
        "qk_rope_head_dim": 2 * len(inv_freq),
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": layout.head_dim,
        "attention_bias": bias,
        "rope_interleave": True,
        "rope_parameters": rope_parameters(config, inv_freq, rope.scale),
        # vLLM's class keeps a separate output head.
        "tie_word_embeddings": bool(config.tie_word_embeddings) and target != "vllm",
        # All layers dense; the expert fields only have to be valid.
        "first_k_dense_replace": config.num_hidden_layers,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 1,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    }


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])))
