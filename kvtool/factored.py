"""The format that only kvtool's runtime loads: a base model, and latent factors beside it.

`config.json` has model type `kvtool_mla` and the base model's config under `base`. The base model's
tensors are all there, unchanged; next to each attention module are the :class:`LatentFactors` as
`model.layers.{i}.self_attn.latent.{rope,inv_freq,down,key_up,value_up}`. It expresses what stock
MLA cannot: per-head q/k norms, biases, frequencies and ranks that differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError
from kvtool.latent import LatentFactors

MODEL_TYPE = "kvtool_mla"
_PREFIX = "model.layers.{}.self_attn.latent."
_NAMES = tuple(field.name for field in fields(LatentFactors))


def is_factor(name: str) -> bool:
    """Whether a tensor name belongs to the factors, not to the base model."""
    return ".self_attn.latent." in name


def factored_config(base: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a factored checkpoint."""
    return {"architectures": ["KvtoolMlaForCausalLM"], "model_type": MODEL_TYPE, "base": base}


def base_config(config: dict[str, Any]) -> Any:
    """The transformers config of the base model inside `config.json`."""
    from transformers import AutoConfig

    values = dict(config["base"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def factor_tensors(layer: int, factors: LatentFactors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write for one layer; frequencies stay fp32."""
    prefix = _PREFIX.format(layer)
    tensors = {prefix + name: getattr(factors, name).to(dtype).contiguous() for name in _NAMES}
    tensors[prefix + "inv_freq"] = factors.inv_freq.float()
    return tensors


def read_factors(checkpoint: Checkpoint, layer: int) -> LatentFactors:
    """The factors of one layer.

    Raises:
        CheckpointError: Some are missing.
    """
    stored = checkpoint.read_prefix(_PREFIX.format(layer))
    if missing := set(_NAMES) - set(stored):
        raise CheckpointError(
            f"{checkpoint.source}: layer {layer} lacks its latent factors {sorted(missing)}"
        )
    return LatentFactors(**{name: stored[name] for name in _NAMES})
