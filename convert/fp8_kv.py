"""Scales for a static fp8 cache, in the checkpoint: what vLLM reads as `--kv-cache-dtype fp8`.

Such an engine stores clamp(x / s, ±448) in e4m3 of every key behind RoPE and every value, one byte
each, and nothing per token. A layer has one s for keys and one for values, of all heads or of each:

    s = max |x| / 448

over the calibration text, as a running maximum: the first token, whose keys and values are like no
other's, is never clipped. The names and shapes are those of compressed-tensors.

Two foldings change what is stored and nothing that is computed:

*SmoothAttention* (QServe, arXiv 2405.04532, with α = ½). Keys are divided and queries multiplied by

    λ_i = λ_{i+D/2} = max(max |K_i|, max |K_{i+D/2}|)^α,

equal within a RoPE pair, so that it commutes with RoPE, and for all queries that read a head. It
goes into `q_proj` and `k_proj`, or into the weights of `q_norm` and `k_norm` where those are
(Qwen3), which all heads share.

*Turned values.* v' = H v with the normalised Hadamard matrix, a head at a time, goes into `v_proj`;
H again into the columns of `o_proj`, for Σ_j a_j H v_j = H Σ_j a_j v_j.

e4m3 is a float: an element's error is a share of itself, whatever multiplies its channel. So the
foldings do nothing for fp8. Smoothing helps caches of 4 bits that round keys as they come, and
harms where a Hadamard transform is in front (vLLM's `int4_per_token_head`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate.stream import BATCH, LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint, torch_dtype
from kvtool.convert.fitting import ConvertedLayer, Fit
from kvtool.errors import CalibrationError
from kvtool.fp8 import SCALES, scale
from kvtool.kernels.hadamard import hadamard
from kvtool.layout import AttentionLayout

if TYPE_CHECKING:
    from kvtool.convert.planning import ConvertOptions

ALPHA = 0.5
LARGE_BIAS = 10
"""A `k_proj.bias` so many times as long as the median layer's breaks 8 bits (seen in Qwen2.5)."""


@torch.inference_mode()
def peaks(
    stream: LayerStream, layer: StreamedLayer, original: Tensor, *, turn_values: bool
) -> tuple[Tensor, Tensor]:
    """Largest |keys| behind RoPE and |values|, `[H, D]` each.

    Args:
        original: Hidden states `[N, T, hidden]` before the layer.
        turn_values: Look at H v.
    """
    own = layer.attention
    shape = (own.layout.kv_heads, own.layout.head_dim)
    keys, values = torch.zeros(shape), torch.zeros(shape)
    for windows in original.split(BATCH):
        q, k, v = own.project(layer.normed(windows))
        _, k = own.rotate(*own.normalise(q, k), *stream.tables(layer.index, windows.shape[1]))
        keys = torch.maximum(keys, k.abs().amax(dim=(0, 2)))
        values = torch.maximum(values, (turned(v) if turn_values else v).abs().amax(dim=(0, 2)))
    return keys, values


def check_scales(scales: Iterable[Tensor]) -> str | None:
    """Why no calibration gives these scales; None if it may have."""
    every = torch.cat([s.flatten().float() for s in scales])
    if not bool(every.isfinite().all()):
        return "scales are not finite"
    if not bool((every > 0).all()):
        return "scales are zero or negative"
    if bool((every == every[0]).all()):
        return f"all {len(every)} scales are {float(every[0]):g}"
    return None


def smoothing(keys: Tensor, *, shared: bool) -> Tensor:
    """λ `[H, D]` from the peaks of the keys `[H, D]`.

    Args:
        shared: One λ for all heads.
    """
    pair = torch.maximum(*keys.chunk(2, dim=-1))
    if shared:
        pair = pair.amax(dim=0, keepdim=True).expand_as(pair)
    smallest = 1e-4 * float(pair.max())  # a channel may be dead
    return (pair.clamp(min=smallest) ** ALPHA).repeat(1, 2)


def turned(x: Tensor) -> Tensor:
    """`x [..., D]` times H, in blocks of the largest power of two that divides D."""
    return hadamard(x.unflatten(-1, (-1, x.shape[-1] & -x.shape[-1]))).flatten(-2)


def fold(
    attention: GroupedQueryAttention, smooth: Tensor | None, *, turn_values: bool
) -> dict[str, Tensor]:
    """The weights that change, by name relative to `self_attn`, float32.

    Args:
        smooth: λ `[H, D]`.
    """
    layout, rows, folded = attention.layout, dict[str, Tensor](), dict[str, Tensor]()
    weight = attention.qkv.weight.detach().float()
    if layout.qkv_bias:  # one more column, for an input that is always 1
        weight = torch.cat((weight, attention.qkv.bias.detach().float()[:, None]), dim=1)
    q, k, v = weight.split(attention.sizes)
    if smooth is not None and attention.q_norm is not None and attention.k_norm is not None:
        folded["q_norm.weight"] = attention.q_norm.weight.detach().float() * smooth[0]
        folded["k_norm.weight"] = attention.k_norm.weight.detach().float() / smooth[0]
    elif smooth is not None:
        queries = smooth.repeat_interleave(layout.heads // layout.kv_heads, dim=0)
        rows |= {"q_proj": q * queries.view(-1, 1), "k_proj": k / smooth.view(-1, 1)}
    if turn_values:
        heads = v.T.unflatten(-1, (-1, layout.head_dim))  # [hidden, H, D]
        rows["v_proj"] = turned(heads).flatten(-2).T
        outputs = attention.o_proj.weight.detach().float().unflatten(-1, (-1, layout.head_dim))
        folded["o_proj.weight"] = turned(outputs).flatten(-2)
    for name, x in rows.items():
        folded[f"{name}.weight"] = x[:, : layout.hidden_size]
        if layout.qkv_bias:
            folded[f"{name}.bias"] = x[:, layout.hidden_size]
    return folded


def folded_parts(options: ConvertOptions, layout: AttentionLayout) -> list[str]:
    """Parts of an attention module that `fold` changes."""
    parts = []
    if options.smooth:
        parts += ["q_norm", "k_norm"] if layout.qk_norm else ["q_proj", "k_proj"]
    if options.turn_values:
        parts += ["v_proj", "o_proj"]
    return parts


def large_key_biases(checkpoint: Checkpoint) -> dict[int, float]:
    """Layers whose `k_proj.bias` is longer than `LARGE_BIAS` medians, and how many it has."""
    names = sorted(n for n in checkpoint.tensors if n.endswith(".self_attn.k_proj.bias"))
    if not names:
        return {}
    norms = {int(n.split(".")[2]): float(checkpoint.read(n).float().norm()) for n in names}
    median = float(torch.tensor(list(norms.values())).median())
    return {i: norm / median for i, norm in sorted(norms.items()) if norm > LARGE_BIAS * median > 0}


class ToFp8Kv:
    """A conversion that leaves the model as it is, but for the scales and what is folded."""

    freqfold = None

    def __init__(self, stream: LayerStream, options: ConvertOptions) -> None:
        self.stream, self.options = stream, options

    def method(self) -> Fit:
        """How a layer is fitted, given the hidden states of the calibration text."""
        options = self.options

        def fit(layer: StreamedLayer, original: Tensor) -> ConvertedLayer:
            own, turn = layer.attention, options.turn_values
            keys, values = peaks(self.stream, layer, original, turn_values=turn)
            smooth = smoothing(keys, shared=own.layout.qk_norm) if options.smooth else None
            folded = fold(own, smooth, turn_values=turn)
            if smooth is not None:
                keys = keys / smooth
            found = [
                scale(peak, options.scales, f"the {what} of layer {layer.index}")
                for peak, what in ((keys, "keys"), (values, "values"))
            ]
            return ConvertedLayer(None, {**folded, **dict(zip(SCALES, found, strict=True))})

        return fit

    def check(self, layers: Iterable[ConvertedLayer]) -> None:
        """Refuses scales that no calibration gives.

        Raises:
            CalibrationError: They are.
        """
        if reason := check_scales(layer.weights[name] for layer in layers for name in SCALES):
            raise CalibrationError(
                f"{reason}: nothing was measured", hint="the checkpoint is damaged, or try --data"
            )

    def tensors(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        """The scales in float32, and what is folded in the dtype it had."""
        stored, prefix = self.stream.checkpoint.tensors, f"model.layers.{index}.self_attn."

        def dtype(name: str) -> torch.dtype:
            return torch.float32 if name in SCALES else torch_dtype(stored[prefix + name].dtype)

        return {prefix + name: x.to(dtype(name)) for name, x in converted.weights.items()}

    def config(self, last: ConvertedLayer) -> dict[str, Any]:
        """`config.json` of the output: the model's own, with what compressed-tensors calls it."""
        return {
            **self.stream.checkpoint.config,
            "quantization_config": quantization_config(self.options.scales),
        }


def quantization_config(scales: str) -> Mapping[str, Any]:
    """For an engine that reads compressed-tensors: the cache alone is quantised."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "attn_head" if scales == "head" else "tensor",
            "dynamic": False,
            "symmetric": True,
        },
    }
