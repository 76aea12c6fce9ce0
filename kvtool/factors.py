"""What a model makes of tokens in front of its layers, and of its logits behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MUP = (
    *("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"),
    *("granitemoehybrid", "hyperclovax"),
)
"""Those that multiply embeddings and logits by what their config says; others' may say it, too."""

_CAPPED = ("gemma3_text", "gemma4_text", "gemma4_unified_text")
"""Those that cap their logits, if their config says so."""


def embedding_factor(config: Any) -> float:
    """What a model multiplies its embeddings by, where the embedding does not do so itself."""
    if config.model_type == "afmoe":
        return float(config.hidden_size**0.5) if config.mup_enabled else 1.0
    return float(config.embedding_multiplier) if config.model_type in _MUP else 1.0


def layer_inputs(model: Any, ids: Tensor, embedded: Tensor) -> Tensor | None:
    """What each of L layers is given of tokens beside the hidden states, `[B, T, L, P]`; None in
    all models but small ones of Gemma 4.

    Args:
        ids: `[B, T]`.
        embedded: `[B, T, hidden]`, what the first layer is given.
    """
    inner = model.model
    if not getattr(inner, "hidden_size_per_layer_input", 0):
        return None
    own = inner.get_per_layer_inputs(ids, embedded)
    inputs: Tensor = inner.project_per_layer_inputs(embedded, own)
    return inputs


def input_of(inputs: Tensor | None, layer: Any) -> dict[str, Tensor]:
    """The part of these for one decoder layer, as that is called with it."""
    return {} if inputs is None else {"per_layer_input": inputs[:, :, layer.layer_idx]}


@dataclass(frozen=True)
class Finish:
    """What a model makes of the logits of its output head: `cap tanh(factor x / cap)`."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Of any shape."""
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def finish_of(config: Any) -> Finish:
    """That of a model."""
    cap = config.final_logit_softcapping if config.model_type in _CAPPED else None
    if config.model_type in ("cohere", "cohere2", "cohere2_moe"):
        return Finish(float(config.logit_scale), cap)
    if config.model_type not in (*_MUP, "minicpm3"):
        return Finish(cap=cap)
    factor = float(config.logits_scaling)
    return Finish(factor if config.model_type == "hyperclovax" else 1 / factor, cap)
