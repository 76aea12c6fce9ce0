"""The norms, gated MLPs and decoder layers that take the place of a host model's on a GPU.

A decode step reads every weight once and does little else with it; what comes between the products
is bound by launches, so there are to be few of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels.rms_norm import add_rms_norm, rms_norm
from kvtool.kernels.swiglu import swiglu
from kvtool.layout import PLAIN, decoder_layers

_PLAIN = (*PLAIN, "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
"""Model types whose layers add what attention and the MLP make of a norm, and do no more."""
_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def fuse(model: Any) -> None:
    """Puts these into a model wherever they compute what was there; once is enough."""
    FusedNorm.replace_in(model)
    plain = model.config.model_type in _PLAIN
    for index, layer in enumerate(decoder_layers(model)):
        if isinstance(layer, FusedLayer):
            continue
        if FusedMLP.can_replace(getattr(layer, "mlp", None)):
            layer.mlp = FusedMLP(layer.mlp)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # the old weights leave holes too small for the next ones
            parts = {name for name, _ in layer.named_children()}
            if plain and _is_stock(layer) and parts == _PARTS:
                model.model.layers[index] = FusedLayer(layer)


def _is_stock(module: Any) -> bool:
    """Whether a module is of transformers itself: code beside a checkpoint may compute anything."""
    return type(module).__module__.startswith("transformers.models.")


class FusedNorm(nn.Module):
    """An RMSNorm in one launch instead of six.

    Its weight is multiplied before the result is rounded, not after.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    @classmethod
    def replace_in(cls, model: nn.Module) -> None:
        """Puts one in the place of every RMSNorm, sharing its weight."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                    setattr(parent, name, cls(child))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def of_sum(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of two tensors, and its norm, in the same launch."""
        return add_rms_norm(x, other, self.weight, self.variance_epsilon)


class FusedMLP(nn.Module):
    """A gated MLP, down(silu(gate x) · up x), that reads its two first weights in one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        parts = mlp.gate_proj, mlp.up_proj
        with torch.no_grad():
            weight = torch.cat([part.weight for part in parts])
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.gate_up = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.down_proj = mlp.down_proj

    @classmethod
    def can_replace(cls, mlp: Any) -> bool:
        """Whether a module is such an MLP."""
        parts: dict[str, Any] = dict(mlp.named_children()) if _is_stock(mlp) else {}
        if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return False
        activation = type(parts.pop("act_fn")).__name__
        linear = all(type(part) is nn.Linear for part in parts.values())
        biases = [getattr(parts[name], "bias", None) is None for name in ("gate_proj", "up_proj")]
        return activation in ("SiLU", "SiLUActivation") and linear and len(set(biases)) == 1

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self._inner(x))
        return down

    def add_to(self, sums: Tensor, x: Tensor) -> Tensor:
        """Adds what it makes of `x` to `sums [..., hidden]`, contiguous, and returns these."""
        inner, down = self._inner(x).flatten(0, -2), self.down_proj
        if down.bias is not None:
            sums += down.bias
        sums.view(-1, sums.shape[-1]).addmm_(inner, down.weight.T)
        return sums

    def _inner(self, x: Tensor) -> Tensor:
        return swiglu(F.linear(x, self.gate_up, self.bias))


class FusedLayer(nn.Module):
    """A decoder layer, a + mlp(norm(a)) with a = x + attention(norm(x)).

    One addition is a part of the norm behind it, the other of the product before it.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """As the layer in whose place it is."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **arguments)
        sums, normed = self.post_attention_layernorm.of_sum(hidden_states, attended)
        found: Tensor = self.mlp.add_to(sums, normed)
        return found
