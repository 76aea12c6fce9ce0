"""Keys and values as a static fp8 cache keeps them: one byte each, and no scale per token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.errors import CalibrationError, CheckpointError, PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.checkpoint import Checkpoint

LIMIT = 448.0
"""Largest number of e4m3."""
_LEAST, _MOST = 2.0**-126, 2.0**128 / LIMIT
"""Between them, float32 has a scale as precisely as others, and what it is multiplied with."""
SCALES = ("k_scale", "v_scale")
"""Of a layer's keys and values, tensors beside its projections: `[1]`, or `[H, 1, 1]` by head."""

BESIDE = "hf_quant_config.json"
"""A file in which vLLM looks for `quantization_config`, if `config.json` has none."""


@dataclass(frozen=True)
class Scales:
    """What the keys and the values of each KV head are divided by, `[H]` each.

    Attributes:
        window: Tokens, the last ones, that are kept exactly as well; engines have none.

    Raises:
        PlanError: A number is out of range.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise PlanError(f"a window of {self.window} exact tokens is impossible")
        if len(self.keys) != len(self.values):
            raise PlanError(f"{len(self.keys)} scales of keys for {len(self.values)} of values")
        if not all(_LEAST <= x < _MOST for x in (*self.keys, *self.values)):
            raise PlanError("a scale of fp8 is above 0 and finite in float32, as is 448 times it")

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        """Of one head of a sequence; the room for exact tokens counts whole even if unfilled."""
        return 2 * head_dim * (tokens + itemsize * self.window)


def encode(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
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


def scale(peak: Tensor, scales: str, what: str) -> Tensor:
    """s = max |x| / 448, `[1]` or by head `[H, 1, 1]`, of `peak [H, D]`.

    Raises:
        CalibrationError: It is zero or not finite.
    """
    largest = peak.amax(dim=1)
    found = largest.view(-1, 1, 1) if scales == "head" else largest.amax(dim=0, keepdim=True)
    if not bool((found.isfinite() & (found > 0)).all()):
        values = "not finite" if not bool(found.isfinite().all()) else "all zero"
        raise CalibrationError(
            f"{what} are {values} on the calibration text, which leaves no scale for them",
            hint="the checkpoint is damaged, or try other --data",
        )
    return found / LIMIT


def stored_scales(checkpoint: Checkpoint, index: int) -> tuple[Tensor, Tensor]:
    """Of keys and of values of a layer, as they stand in a checkpoint.

    Raises:
        CheckpointError: They do not, whatever its config says.
    """
    names = [f"model.layers.{index}.self_attn.{name}" for name in SCALES]
    if missing := [name for name in names if name not in checkpoint.tensors]:
        raise CheckpointError(f"{checkpoint.path} does not hold {missing[0]} of its fp8 cache.")
    keys, values = (checkpoint.read(name) for name in names)
    return keys, values


def is_static(scheme: dict[str, Any] | None) -> bool:
    """Whether it is that of a static fp8 cache."""
    wanted = {"type": "float", "num_bits": 8, "dynamic": False}
    return scheme is not None and wanted.items() <= scheme.items()


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
