"""Scales for a static fp8 cache, in the checkpoint: what vLLM reads as `--kv-cache-dtype fp8`.

Such an engine stores clamp(x / s, ±448) in e4m3 of every key behind RoPE and every value, one byte
each, and nothing per token. A layer has one s for keys and one for values, of all heads or of each:

    s = max |x| / 448

over the calibration text, as a running maximum: the first token, whose keys and values are like no
other's, is never clipped. The names and shapes are those of compressed-tensors.

Two foldings change what is stored and nothing that is computed:

*SmoothAttention* (QServe, arXiv 2405.04532, with α = ½). Keys are divided and queries multiplied by

    λ_i = λ_{i+D/2} = max(max |K_i|, max |K_{i+D/2}|)^α,

equal for channels that RoPE turns together (here i and i + D/2, see `kvtool.rope`), so that it
commutes with RoPE, and for all queries that read a head. It goes into the rows of queries and keys,
or into the weights of `q_norm` and `k_norm` where those are: then all heads share it, unless the
norm is over all of them (OLMo 2). What scales a whole query or key commutes with it.

*Turned values.* v' = H v with the normalised Hadamard matrix, a head at a time, goes into the rows
of values; H again into the columns of `o_proj`, for Σ_j a_j H v_j = H Σ_j a_j v_j. H keeps lengths,
so a norm of values without weights (Gemma 4) commutes with it, and so does a gate per head; one
per channel does not, and keys that are the values, too, would be turned with them.

e4m3 is a float: an element's error is a share of itself, whatever multiplies its channel. So the
foldings do nothing for fp8. Smoothing helps caches of 4 bits that round keys as they come, and
harms where a Hadamard transform is in front (vLLM's `int4_per_token_head`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvtool._tensors import read_json
from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate.statistics_file import Statistics
from kvtool.calibrate.stream import BATCH, LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint, torch_dtype
from kvtool.convert.fitting import Conversion, ConvertedLayer, Fit
from kvtool.errors import CalibrationError, UnsupportedModelError
from kvtool.fp8 import BESIDE, SCALES, scale
from kvtool.kernels.hadamard import hadamard
from kvtool.layout import GATES, INTERLEAVED, AttentionLayout, with_heads
from kvtool.quantised_weights import said_of_weights, with_said_of_weights
from kvtool.rope import channel_order, rotate

if TYPE_CHECKING:
    from kvtool.convert.options import ConvertOptions

ALPHA = 0.5
FUSED = "qkv_proj"
"""One projection to queries, keys and values (Phi-3)."""
LARGE_BIAS = 10
"""A `k_proj.bias` so many times as long as the median layer's breaks 8 bits (seen in Qwen2.5)."""


@torch.inference_mode()
def peaks(
    stream: LayerStream, layer: StreamedLayer, states: Tensor, *, turn_values: bool
) -> tuple[Tensor, Tensor]:
    """Largest |keys| behind RoPE and |values|, `[H, D]` each.

    Args:
        states: Hidden states `[N, T, hidden]` before the layer; taken through it, in place.
        turn_values: Look at H v.
    """
    shape = (layer.attention.layout.kv_heads, layer.attention.layout.head_dim)
    found = {"keys": torch.zeros(shape), "values": torch.zeros(shape)}

    def see(_: Tensor, k: Tensor, v: Tensor) -> None:
        keys = rotate(k, *stream.tables(layer.index, k.shape[2]))
        for what, x in (("keys", keys), ("values", turned(v) if turn_values else v)):
            found[what] = torch.maximum(found[what], x.abs().amax(dim=(0, 2)))

    layer.run(states, stream.exact_attention(layer, see), BATCH)
    return found["keys"], found["values"]


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
    weights: Mapping[str, Tensor],
    attention: GroupedQueryAttention,
    smooth: Tensor | None,
    *,
    turn_values: bool,
) -> dict[str, Tensor]:
    """The weights that change, float32.

    Args:
        weights: Of the module, as they are stored, by name relative to `self_attn`.
        smooth: λ `[H, D]`, for channels as they are stored.
    """
    layout, changed = attention.layout, {n: x.float().clone() for n, x in weights.items()}
    names, group = set[str](), layout.heads // layout.kv_heads
    rows = _rows(changed, layout)
    if smooth is not None and attention.k_norm is not None:
        one = smooth if layout.norm_over_heads else smooth[:1]
        queries = one.repeat_interleave(group, dim=0) if layout.norm_over_heads else one
        for name, factor in (("q_norm.weight", queries), ("k_norm.weight", 1 / one)):
            zero = _neutral(attention.k_norm)
            changed[name] = (changed[name] - zero) * factor.flatten() + zero
            names.add(name)
    elif smooth is not None:
        queries = smooth.repeat_interleave(group, dim=0)
        for part, factor in (("q_proj", queries), ("k_proj", 1 / smooth)):
            for name, x in rows[part].items():
                x *= factor.view(-1, *(1,) * (x.dim() - 1))
                names.add(name)
    if turn_values:
        for name, x in rows["v_proj"].items():
            heads = x.unflatten(0, (-1, layout.head_dim)).movedim(1, -1)  # [H, ..., D]
            x.copy_(turned(heads).movedim(-1, 1).flatten(0, 1))
            names.add(name)
        outputs = changed["o_proj.weight"].unflatten(-1, (-1, layout.head_dim))
        changed["o_proj.weight"] = turned(outputs).flatten(-2)
        names.add("o_proj.weight")
    return {name: x for name, x in changed.items() if name in names}


def _rows(weights: Mapping[str, Tensor], layout: AttentionLayout) -> dict[str, dict[str, Tensor]]:
    """Rows of queries, keys and values in weights and biases: views, under the name that each has
    as it is stored, where the three may be one.
    """
    parts = ("q_proj", "k_proj", "v_proj")
    sizes = [n * layout.head_dim for n in (layout.heads, layout.kv_heads, layout.kv_heads)]
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, x in weights.items():
        module = name.split(".")[0]
        if module == FUSED:
            for part, view in zip(parts, x.split(sizes), strict=True):
                found[part][name] = view
        elif module in parts:
            found[module][name] = x
    return found


def _neutral(norm: Any) -> float:
    """The weight by which a norm multiplies with 0: -1 where its weight is a difference from 1."""
    probe = copy.deepcopy(norm)
    nn.init.zeros_(probe.weight)
    return -float(probe(torch.ones_like(probe.weight)).mean().round())


def _as_stored(smooth: Tensor, model_type: str, layout: AttentionLayout) -> Tensor:
    """λ `[H, D]` of channels that are in the order of RoPE, in that of the checkpoint."""
    order = channel_order(layout.head_dim, layout.rotary_dim, model_type in INTERLEAVED)
    return smooth if order is None else smooth[:, order.argsort()]


def folded_parts(options: ConvertOptions, stream: LayerStream) -> list[str]:
    """Parts of an attention module that `fold` changes."""
    fused, parts = any(f".{FUSED}." in name for name in stream.checkpoint.tensors), list[str]()
    if options.smooth:
        normed = with_heads(stream.layouts).qk_norm
        parts += ["q_norm", "k_norm"] if normed else [FUSED] if fused else ["q_proj", "k_proj"]
    if options.turn_values:
        parts += [FUSED if fused else "v_proj", "o_proj"]
    return list(dict.fromkeys(parts))


def scale_bytes(layouts: Iterable[AttentionLayout], options: ConvertOptions) -> int:
    """Of all scales."""
    heads = [layout.kv_heads for layout in layouts if layout.kind == "gqa"]
    return 2 * 4 * (sum(heads) if options.scales == "head" else len(heads))


def check_options(stream: LayerStream, options: ConvertOptions) -> None:
    """Whether scales and foldings asked for can be had of this model.

    Raises:
        UnsupportedModelError: They cannot.
    """
    checkpoint = stream.checkpoint
    heads = {x.kv_heads for x in stream.layouts if x.kind == "gqa"}
    if options.scales == "head" and len(heads) > 1:
        counts = " and ".join(map(str, sorted(heads)))
        raise UnsupportedModelError(
            f"cannot give every head a scale: layers have {counts} KV heads, and vLLM takes scales "
            "by head of one number of them",
            hint="use --scales tensor",
        )
    if checkpoint.quantised is not None and (options.smooth or options.turn_values):
        raise UnsupportedModelError(
            f"cannot fold anything into weights that are quantised ({checkpoint.quantised})",
            hint="leave --smooth and --turn-values out",
        )
    shared = any(layout.shares for layout in stream.layouts)
    if shared and (options.smooth or options.turn_values):
        raise UnsupportedModelError(
            "cannot fold anything where several layers read the same keys and values",
            hint="leave --smooth and --turn-values out",
        )
    if options.turn_values and (reason := _unturnable(stream)):
        raise UnsupportedModelError(f"cannot turn values: {reason}", hint="leave --turn-values out")


def _unturnable(stream: LayerStream) -> str | None:
    """Why values of a model cannot be turned; None if they can."""
    tensors = stream.checkpoint.tensors
    gate = GATES.get(stream.config.model_type)
    for index, layout in enumerate(stream.layouts):
        prefix = f"model.layers.{index}.self_attn."
        own = tensors.get(f"{prefix}{gate}.weight")
        if layout.gated and (own is None or own.shape[0] != layout.heads):
            return f"a gate of layer {index} multiplies every channel of what heads give"
        parts = (f"{prefix}{part}.weight" for part in ("v_proj", FUSED))
        if layout.kind == "gqa" and not any(part in tensors for part in parts):
            return f"the values of layer {index} are its keys before norm and RoPE"
    return None


def large_key_biases(checkpoint: Checkpoint) -> dict[int, float]:
    """Layers whose `k_proj.bias` is longer than `LARGE_BIAS` medians, and how many it has."""
    names = sorted(n for n in checkpoint.tensors if n.endswith(".self_attn.k_proj.bias"))
    if not names:
        return {}
    norms = {int(n.split(".")[2]): float(checkpoint.read(n).float().norm()) for n in names}
    median = float(torch.tensor(list(norms.values())).median())
    return {i: norm / median for i, norm in sorted(norms.items()) if norm > LARGE_BIAS * median > 0}


class ToFp8Kv(Conversion):
    """A conversion that leaves the model as it is, but for the scales and what is folded."""

    by_statistics = False

    def __init__(self, stream: LayerStream, options: ConvertOptions) -> None:
        super().__init__(stream, options, folded_parts(options, stream))
        self.source = stream.checkpoint.whole()

    def method(self, measured: Statistics | None, text: Tensor | None) -> Fit:
        """One with a state has no scales, and one that reads another's keys and values the same as
        that.
        """
        options, stream = self.options, self.stream

        def fit(layer: StreamedLayer, states: Tensor) -> ConvertedLayer:
            if layer.mixer is not None:
                layer.run(states, layer.mixer, BATCH)
                return ConvertedLayer(None)
            own, turn, smooth = layer.attention, options.turn_values, None
            keys, values = peaks(stream, layer, states, turn_values=turn)
            if options.smooth:
                shared = own.layout.qk_norm and not own.layout.norm_over_heads
                smooth = smoothing(keys, shared=shared)
                keys = keys / smooth
                smooth = _as_stored(smooth, stream.config.model_type, own.layout)
            folded = {}
            if options.smooth or turn:
                stored = stream.checkpoint.read_prefix(f"model.layers.{layer.index}.self_attn.")
                folded = fold(stored, own, smooth, turn_values=turn)
            found = [
                scale(peak, options.scales, f"the {what} of layer {layer.index}")
                for peak, what in ((keys, "keys"), (values, "values"))
            ]
            return ConvertedLayer(None, {**folded, **dict(zip(SCALES, found, strict=True))})

        return fit

    def run(self, index: int, converted: ConvertedLayer, states: Tensor) -> None:
        changed = {f"self_attn.{name}": x for name, x in converted.weights.items()}
        layer = self.stream.layer(index, changed)
        layer.run(states, self.stream.exact_attention(layer))

    def stays(self, name: str) -> bool:
        return True  # what is folded has the names that it had

    def check(self, layers: Iterable[ConvertedLayer]) -> None:
        """Refuses scales that no calibration gives.

        Raises:
            CalibrationError: They are.
        """
        with_heads = [layer.weights for layer in layers if layer.weights]
        if reason := check_scales(weights[name] for weights in with_heads for name in SCALES):
            raise CalibrationError(
                f"{reason}: nothing was measured", hint="the checkpoint is damaged, or try --data"
            )

    def tensors(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        """The scales in float32, and what is folded in the dtype it had, under the names that they
        have in the folder.
        """
        stored, prefix = self.stream.checkpoint.tensors, f"model.layers.{index}.self_attn."
        found = {}
        for name, x in converted.weights.items():
            beside = stored[prefix + ("o_proj.weight" if name in SCALES else name)]
            dtype = torch.float32 if name in SCALES else torch_dtype(beside.dtype)
            part = "o_proj." if name in SCALES else name
            found[beside.name[: beside.name.rindex(part)] + name] = x.to(dtype)
        return found

    def config(self, last: ConvertedLayer) -> dict[str, Any]:
        """The model's own, with what compressed-tensors calls it, unless that lies in a file of its
        own.
        """
        own = self.source.config
        if weights := said_of_weights(own):  # which goes before what a file beside it says
            return with_said_of_weights(own, self._quantization(weights))
        return own if self.beside else with_said_of_weights(own, self._quantization())

    def write_beside(self, folder: Path) -> None:
        """Writes the file that says how the cache is quantised, where `config.json` does not."""
        if self.beside:
            stored = self.stream.checkpoint.path / BESIDE
            weights = read_json(stored) if stored.is_file() else None
            text = json.dumps(self._quantization(weights), indent=2) + "\n"
            (folder / BESIDE).write_text(text, encoding="utf-8")

    @property
    def beside(self) -> bool:
        """Whether transformers must not see it: for experts, layers of several shapes, or several
        modalities it takes a quantised cache for an error (5.23, compressed-tensors 0.17). Where
        weights are quantised, it goes where that is said.
        """
        checkpoint, layouts = self.stream.checkpoint, self.stream.layouts
        if checkpoint.quantised is not None:
            return (checkpoint.path / BESIDE).is_file()
        shapes = {(x.kv_heads, x.head_dim) for x in layouts if x.kind == "gqa"}
        experts = any(".experts." in name for name in checkpoint.tensors)
        return experts or len(shapes) > 1 or checkpoint.wrapper is not None

    def _quantization(self, weights: dict[str, Any] | None = None) -> dict[str, Any]:
        """For an engine that reads compressed-tensors: the cache alone is quantised.

        Args:
            weights: What is said of quantised weights, to which it is added.
        """
        alone = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "quantization_status": "compressed",
            "config_groups": {},
            "ignore": [],
        }
        scheme = {
            "num_bits": 8,
            "type": "float",
            "strategy": "attn_head" if self.options.scales == "head" else "tensor",
            "dynamic": False,
            "symmetric": True,
        }
        return {**(alone if weights is None else weights), "kv_cache_scheme": scheme}
