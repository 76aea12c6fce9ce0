"""Rotary position embedding in the one form that everything here knows.

Frequency `l` turns channels `l` and `l + D/2` of a head of size D. Models that pair other channels
(neighbours, as Cohere and GLM do), or turn only some of them, get the channels of their queries and
keys into an order in which that is so (:func:`channel_order`), and frequency 0 for what is not
turned. A score is a sum over channels: it does not ask in which order they lie.

:func:`ropes_of` reads it from what transformers builds for a config.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool._transformers import empty_model
from kvtool.errors import UnsupportedModelError
from kvtool.layout import HYBRID, ROPE_BY_LAYER, AttentionLayout, describe, rope_by_layer_type

_CHANGES = "RoPE of type '{}' changes its frequencies with the length of the text"


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding with fixed frequencies.

    Attributes:
        inv_freq: `[N]` fp32, radians per position; frequency `l` turns dims `l` and `l + N`.
        scale: Factor that the model puts on cos and sin (1 but for yarn).
    """

    inv_freq: Tensor
    scale: float = 1.0

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of integer `positions [...]`, each `[..., 2N]` fp32."""
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale

    def to(self, device: torch.device) -> Rope:
        """The same on a device."""
        return Rope(self.inv_freq.to(device), self.scale)

    def equals(self, other: Rope) -> bool:
        """Whether both turn alike, on the same device."""
        return self.scale == other.scale and torch.equal(self.inv_freq, other.inv_freq)

    def over(self, head_dim: int) -> Rope:
        """The same for heads of that size: what lies beyond its channels is not turned."""
        return Rope(F.pad(self.inv_freq, (0, head_dim // 2 - len(self.inv_freq))), self.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x [..., 2N]` by tables of the same trailing shape; dims `l`, `l + N` are a pair."""
    real, imag = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-imag, real), dim=-1), sin)


def channel_order(head_dim: int, turned: int, interleaved: bool) -> Tensor | None:
    """Which channel of a head goes where, so that `l` and `l + D/2` are turned together.

    Args:
        head_dim: D. turned: The first so many channels are turned.
        interleaved: They are paired with their neighbours, and not over half of them.

    Returns:
        `[D]`; None if they lie so.
    """
    channels = torch.arange(head_dim)
    own, rest = channels[:turned], channels[turned:]
    pairs = own.view(-1, 2).T if interleaved else own.view(2, -1)
    order = torch.cat((pairs, rest.view(2, -1)), dim=1).flatten()
    return None if torch.equal(order, channels) else order


def ropes_of(config: Any) -> list[Rope]:
    """The rotary embedding of every layer, read from the module that transformers builds.

    LongRoPE has two sets of frequencies. Which of them transformers takes depends on the length of
    the text; here all texts have those of one as long as the model's context, as vLLM does it: a
    cache could not change them later.

    Raises:
        UnsupportedModelError: The frequencies depend on the length of the text in another way, and
            not only beyond the context of the model, where nothing here reads.
    """
    layouts = describe(config)
    if config.model_type == HYBRID and config.position_embedding_type != "rope":
        pairs = (config.hidden_size // config.num_attention_heads) // 2
        return [Rope(torch.zeros(pairs))] * len(layouts)  # no positions: nothing is turned
    rotary = type(empty_model(config).model.rotary_emb)
    if config.model_type in ROPE_BY_LAYER:
        found = {}
        for base in set(kinds := config.layer_rope_theta[: len(layouts)]):
            own = copy.deepcopy(config)
            # What a base of 0 turns is nothing; the layout says so.
            own.rope_parameters = {**config.rope_parameters, "rope_theta": base or 1.0}
            found[base] = _built(rotary, own)[""]
    else:
        found = _built(rotary, config)
        kinds = [""] * len(layouts) if "" in found else config.layer_types
    return [_own_rope(found[kind], layout) for kind, layout in zip(kinds, layouts, strict=True)]


def _built(rotary: Any, config: Any) -> dict[str, Rope]:
    """What transformers builds, by type of layer; under an empty name if there is one for all."""
    module, found = rotary(config=config), {}
    for kind, parameters in rope_by_layer_type(config).items():
        prefix = f"{kind}_" if kind else ""
        rope_type = parameters.get("rope_type", "default")
        if config.model_type == "phimoe" and rope_type != "default":  # its scale changes, too
            raise UnsupportedModelError(_CHANGES.format(rope_type))
        if rope_type == "longrope":
            last = torch.tensor([[config.max_position_embeddings - 1]])
            module(torch.zeros(1), last, *([kind] if kind else []))
        if not hasattr(module, f"{prefix}inv_freq"):
            raise UnsupportedModelError(f"{config.model_type} has no RoPE by type of layer")
        inv_freq, scale = (getattr(module, prefix + x) for x in ("inv_freq", "attention_scaling"))
        if not bool(inv_freq.isfinite().all()):
            raise UnsupportedModelError(
                f"RoPE with a base of {parameters.get('rope_theta')} (rope_theta) has frequencies "
                "that are no finite numbers"
            )
        found[kind] = Rope(inv_freq.float(), float(scale))
    return found


def rope_of(config: Any) -> Rope:
    """The rotary embedding of a model whose layers share one.

    Raises:
        UnsupportedModelError: They do not, or the frequencies depend on the length of the text.
    """
    for parameters in rope_by_layer_type(config).values():
        if (kind := parameters.get("rope_type")) == "dynamic":
            raise UnsupportedModelError(_CHANGES.format(kind))
    first, *others = ropes_of(config)
    if not all(rope.equals(first) for rope in others):
        raise UnsupportedModelError("its layers have different RoPE")
    return first


def _own_rope(rope: Rope, layout: AttentionLayout) -> Rope:
    """What one layer makes of the model's RoPE."""
    if layout.kind == "state":
        return rope
    turned = layout.rope_dim if layout.kind == "mla" else layout.rotary_dim
    if not turned:
        return Rope(torch.zeros(layout.head_dim // 2))
    if turned != 2 * len(rope.inv_freq):
        raise UnsupportedModelError(
            f"RoPE has {len(rope.inv_freq)} frequencies for {turned} channels of a head"
        )
    if layout.kind == "mla":
        return rope
    if layout.rotary_dim < layout.head_dim:
        return Rope(rope.inv_freq).over(layout.head_dim)  # its scale is the layout's
    return rope


def apply_long_factors(model: Any) -> None:
    """Gives all texts the long factors of a model with LongRoPE, as :func:`ropes_of` does."""
    rope, last = model.model.rotary_emb, model.config.max_position_embeddings - 1
    if getattr(rope, "rope_type", None) == "longrope":
        rope(torch.zeros(1), torch.tensor([[last]]))
        rope.original_inv_freq = rope.inv_freq.clone()
