"""What a model multiplies its embeddings by, and what it makes of its logits."""

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
