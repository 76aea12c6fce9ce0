"""Experts of a checkpoint as transformers' modules hold them.

On disk every expert of a layer has three matrices of its own; in memory transformers has all of
them in two tensors, gate and up `[E, 2 I, hidden]` and down `[E, hidden, I]`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch
from torch import Tensor

from kvtool.errors import CheckpointError

_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_RENAMED = [
    (re.compile(pattern), other)
    for pattern, other in (
        (r"block_sparse_moe\.(gate\.|experts\.\d|e_score)", r"mlp.\1"),  # Mixtral, MiniMax
        (r"mlp\.gate\.(weight)", r"mlp.router.\1"),  # Phi
        (r"(block_sparse_moe)\.input_linear\.weight", r"\1.experts.gate_up_proj"),  # Granite
        (r"(block_sparse_moe)\.output_linear\.weight", r"\1.experts.down_proj"),
        (r"(block_sparse_moe\.router)\.layer\.", r"\1."),
        (r"mlp\.(moe_statics\.)", r"mlp.gate.\1"),  # Ernie
        (r"mlp\.(?:experts\.)?(e_score_correction_bias)", r"mlp.gate.\1"),  # EXAONE, Laguna
        (r"mlp\.shared_expert\.", "mlp.shared_experts."),
        (r"mlp\.router\.gate\.", "mlp.gate."),  # Hunyuan 3
        (r"mlp\.expert_bias", "mlp.e_score_correction_bias"),
        (r"mlp\.shared_mlp\.", "mlp.shared_experts."),
        (r"moe\.router\.expert_bias", "mlp.gate.e_score_correction_bias"),  # Kolibri
        (r"self_attn\.softmax_offset", "self_attn.sinks"),  # Flint
        (r"post_attn_norm", "post_self_attn_layernorm"),
        (r"post_ffn_norm", "post_mlp_layernorm"),
    )
]


def stacked(tensors: Mapping[str, Tensor], known: Container[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, under the names and in the shapes of modules.

    Args:
        known: The names that the modules have. One that is there already is left as it is: what
            is another name in one family is a module in the next.

    Raises:
        CheckpointError: An expert is incomplete.
    """
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    for name, tensor in tensors.items():
        for pattern, other in _RENAMED:
            name = name if name in known else pattern.sub(other, name)
        if (match := _EXPERT.fullmatch(name)) is None:
            found[name] = tensor
            continue
        block, number, part = match.groups()
        parts = experts.setdefault(block, {"gate_proj": [], "up_proj": [], "down_proj": []})
        parts[_PARTS.get(part, part)].append((int(number), tensor))
    for block, parts in experts.items():
        gate, up, down = ([x for _, x in sorted(own, key=_number)] for own in parts.values())
        if len({len(gate), len(up), len(down)}) > 1:
            raise CheckpointError(f"{block} has experts that lack one of their three matrices")
        both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        found[f"{block}.gate_up_proj"] = torch.stack(both)
        found[f"{block}.down_proj"] = torch.stack(down)
    return found


def _number(expert: tuple[int, Tensor]) -> int:
    return expert[0]
