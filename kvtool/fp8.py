"""Keys and values as a static fp8 cache keeps them: one byte each, and no scale per token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 448.0
"""Largest number of e4m3."""
SCALES = ("k_scale", "v_scale")
"""Of a layer's keys and values, tensors beside its projections: `[1]`, or `[H, 1, 1]` by head."""


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """`clamp(x / s, ±448)` in `float8_e4m3fn`.

    Args:
        x: `[..., H, T, D]`, any float dtype.
        scale: `[1]` or `[H, 1, 1]`.
    """
    import torch

    return (x / scale).clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """What `encode` kept, in the dtype of the scale."""
    return codes.to(scale.dtype) * scale


def cache_scheme(config: dict[str, Any]) -> dict[str, Any] | None:
    """How a checkpoint says that engines shall quantise the cache, if that is all it says.

    Args:
        config: Content of `config.json`.

    Returns:
        `kv_cache_scheme` of compressed-tensors; None where weights are quantised, or nothing is.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("config_groups"):
        return None
    scheme = quantization.get("kv_cache_scheme")
    known = quantization.get("quant_method") == "compressed-tensors" and isinstance(scheme, dict)
    return scheme if known else None


def skip_flag(layers: Iterable[int | str]) -> str:
    """What tells vLLM to keep the cache of these layers in the model's dtype."""
    return f"--kv-cache-dtype-skip-layers {' '.join(map(str, layers))}"
