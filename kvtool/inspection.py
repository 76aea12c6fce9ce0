"""What a checkpoint is and what can be done with it, from its config and headers alone."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from kvtool.checkpoint import Checkpoint
from kvtool.convert import targets
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.factored import MODEL_TYPE, model_config
from kvtool.layout import AttentionLayout, describe
from kvtool.plan import check_can_drop
from kvtool.replacements import mixer_shape
from kvtool.sizes import BF16

CONTEXTS = (4096, 32768, 131072)
"""Lengths, in tokens, that cache sizes are stated for."""
_PLANS: dict[str, dict[str, bool]] = {  # and what is no hindrance to them
    "retrieval-heads": {},
    "budgets": {},
    "projections": {},
    "quantization": {"other": True},
    "double-sparsity": {},
}


@dataclass(frozen=True)
class LayerRun:
    """Neighbouring layers with the same attention; indices `first` and `last` both included."""

    first: int
    last: int
    layout: AttentionLayout

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.last - self.first + 1

    @property
    def bytes_per_token(self) -> int:
        """Cache of one of the layers, in bf16."""
        return BF16 * self.layout.cached_values

    @property
    def summary(self) -> str:
        """In words, such as `30 x GQA 9/3 heads x 64`."""
        layout = self.layout
        if layout.kind == "mla":
            text = f"MLA {layout.heads} heads, latent {layout.rank} + RoPE key {layout.rope_dim}"
        elif layout.mixer is not None:
            name = "Mamba-2" if layout.mixer.rule == "mamba2" else "Gated DeltaNet"
            text = f"{name} {layout.heads} heads x {layout.head_dim}"
        elif layout.kv_heads == layout.heads:
            text = f"MHA {layout.heads} heads x {layout.head_dim}"
        else:
            kind = "MQA" if layout.kv_heads == 1 else "GQA"
            text = f"{kind} {layout.heads}/{layout.kv_heads} heads x {layout.head_dim}"
        if layout.qk_norm:
            text += ", q/k norm" + (" over all heads" if layout.norm_over_heads else "")
        if layout.kind == "gqa" and layout.rotary_dim < layout.head_dim:
            part = f"RoPE on {layout.rotary_dim} of {layout.head_dim} channels"
            text += f", {part}" if layout.rotary_dim else ", no RoPE"
        text += ", gated" if layout.gated else ""
        text += ", sink logits" if layout.sink_logits else ""
        text += ", bias" if layout.qkv_bias or layout.output_bias else ""
        text += f", window of {layout.sliding_window} tokens" if layout.sliding_window else ""
        text += f", reads layer {layout.reads}" if layout.reads is not None else ""
        text += ", read by later layers" if layout.read else ""
        return f"{self.layers} x {text}"


@dataclass(frozen=True)
class Application:
    """Whether one conversion or plan applies to the checkpoint, and if not, why; plans have neither
    method nor target.
    """

    command: str
    method: str
    target: str
    reasons: list[str]


@dataclass(frozen=True)
class HybridForecast:
    """What the cache would be if half of the layers became Mamba-2 (`convert --to mamba`).

    Attributes:
        layers: How many would.
        constant_bytes: Of one of them at any length, in bf16 with an fp32 state.
        even_at: Tokens from which on a layer saves.
        cache_bytes: Of all layers, by length of :data:`CONTEXTS`.
    """

    layers: int
    constant_bytes: int
    even_at: int
    cache_bytes: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """Everything `kvtool inspect` says.

    Attributes:
        runs: Attention of all layers; empty where it is not known, see `unsupported`.
        text_of: The wrapper of several modalities whose text alone this is about, if any.
        rope: Type, theta and scaling of the rotary embedding.
        quantised: How weights are quantised on disk, where they are; they are read as `dtypes`.
        stored_bytes: Size of the weights on disk.
        dtypes: Bytes of weights by safetensors type name.
        cache_scales: In words, what it holds for the cache of other engines.
    """

    model: str
    path: str
    family: str
    architecture: str
    text_of: str | None
    quantised: str | None
    stored_bytes: int
    unsupported: str | None
    runs: list[LayerRun]
    rope: dict[str, Any]
    max_positions: int | None
    tied_embeddings: bool
    parameters: int
    dtypes: dict[str, int]
    applications: list[Application]
    plans: list[Application]
    cache_scales: str | None

    @property
    def weight_bytes(self) -> int:
        """Size of all weights."""
        return sum(self.dtypes.values())

    @property
    def bytes_per_token(self) -> int | None:
        """Cache of all layers per token in bf16, while no window is full."""
        return sum(r.layers * r.bytes_per_token for r in self.runs) if self.runs else None

    @property
    def bytes_behind_windows(self) -> int:
        """The same of the layers without a window."""
        whole = (run for run in self.runs if not run.layout.sliding_window)
        return sum(run.layers * run.bytes_per_token for run in whole)

    def cache_bytes(self, tokens: int) -> int:
        """Cache of one sequence in bf16."""
        return sum(
            run.layers * run.bytes_per_token * min(tokens, run.layout.sliding_window or tokens)
            + run.layers * (run.layout.mixer.constant_bytes(BF16) if run.layout.mixer else 0)
            for run in self.runs
        )

    @property
    def hybrid(self) -> HybridForecast | None:
        """None where that conversion does not apply."""
        command = "convert --to mamba"
        applies = any(x.command == command and not x.reasons for x in self.applications)
        layers = sum(run.layers for run in self.runs) // 2
        if not applies or not layers:
            return None
        run = self.runs[0]  # there is one kind of layer
        constant = mixer_shape(run.layout).constant_bytes(BF16)
        return HybridForecast(
            layers,
            constant,
            -(-constant // run.bytes_per_token),
            {
                str(n): self.cache_bytes(n) - layers * (n * run.bytes_per_token - constant)
                for n in CONTEXTS
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        result = asdict(self)
        del result["runs"]
        for application in result["applications"] + result["plans"]:
            application["applies"] = not application["reasons"]
        cache = {str(tokens): self.cache_bytes(tokens) for tokens in CONTEXTS}
        return result | {
            "attention": [
                {
                    "summary": run.summary,
                    "first_layer": run.first,
                    "last_layer": run.last,
                    "bytes_per_token": run.bytes_per_token,
                    **asdict(run.layout),
                }
                for run in self.runs
            ],
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.bytes_per_token,
            "cache_bytes": cache if self.runs else None,
            "hybrid": None if (hybrid := self.hybrid) is None else asdict(hybrid),
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Looks at a checkpoint without reading its weights."""
    family = str(checkpoint.config.get("model_type"))
    factored = family == MODEL_TYPE
    config = model_config(checkpoint)
    unsupported, runs = None, []
    try:
        layouts = describe(config)
        if factored:
            layouts = _with_factors(layouts, checkpoint)
        runs = _runs(_with_true_ranks(layouts, checkpoint.config))
    except UnsupportedModelError as error:
        unsupported = str(error)
    judged = SimpleNamespace(model_type=MODEL_TYPE) if factored else config
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    return Inspection(
        model=checkpoint.source,
        path=str(checkpoint.path),
        family=family,
        architecture=str(checkpoint.config["architectures"][0]),
        text_of=checkpoint.wrapper,
        quantised=checkpoint.quantised,
        stored_bytes=checkpoint.total_bytes,
        unsupported=unsupported,
        runs=runs,
        rope=_rope(config),
        max_positions=getattr(config, "max_position_embeddings", None),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        parameters=checkpoint.parameters,
        dtypes=dtypes,
        applications=[
            Application(
                f"convert --to {to}",
                method,
                target,
                [f"the model {targets.SCALED}"]
                if targets.has_scales(checkpoint)
                else targets.of_checkpoint(checkpoint, to)
                or targets.check(judged, method, target, to),
            )
            for to, method, target in targets.CONVERSIONS
        ],
        plans=[
            Application(f"calibrate {what}", "", "", _plan_reasons(checkpoint, **hindered))
            for what, hindered in _PLANS.items()
        ],
        cache_scales=_cache_scales(checkpoint.cache_scheme),
    )


def _plan_reasons(checkpoint: Checkpoint, **no_hindrance: bool) -> list[str]:
    try:
        check_can_drop(checkpoint, **no_hindrance)
    except UnsupportedModelError as error:
        return [str(error).removeprefix(f"{checkpoint.source} has ")]
    return []


def _cache_scales(scheme: dict[str, Any] | None) -> str | None:
    if scheme is None:
        return None
    each = "KV head" if scheme.get("strategy") == "attn_head" else "layer"
    kind, bits = scheme.get("type"), scheme.get("num_bits")
    return f"for {kind} of {bits} bits, one per {each} for keys and one for values"


def _runs(layouts: list[AttentionLayout]) -> list[LayerRun]:
    runs: list[LayerRun] = []
    for layout, group in itertools.groupby(layouts):
        first = runs[-1].last + 1 if runs else 0
        runs.append(LayerRun(first, first + len(list(group)) - 1, layout))
    return runs


def _with_factors(layouts: list[AttentionLayout], checkpoint: Checkpoint) -> list[AttentionLayout]:
    """Layouts of kvtool's own latent format, whose widths are the shapes of the stored factors."""
    latent = []
    for i, layout in enumerate(layouts):
        widths = {}
        for part in ("down", "rope"):
            name = f"model.layers.{i}.self_attn.latent.{part}"
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{checkpoint.path} lacks {name}.")
            widths[part] = checkpoint.tensors[name].shape[0]
        latent.append(replace(layout, kind="mla", rank=widths["down"], rope_dim=widths["rope"]))
    return latent


def _with_true_ranks(
    layouts: list[AttentionLayout], config: dict[str, Any]
) -> list[AttentionLayout]:
    """Puts in the ranks that a conversion noted, where a layer needs less than the stock width.

    A stock config has one rank for all layers, padded with zeros that kvtool's runtime leaves out.
    """
    noted = config.get("kvtool")
    ranks = noted.get("ranks") if isinstance(noted, dict) else None
    if not isinstance(ranks, list) or len(ranks) != len(layouts):
        return layouts
    if not all(type(rank) is int and rank >= 0 for rank in ranks):
        return layouts
    return [
        replace(layout, rank=rank) if layout.kind == "mla" else layout
        for layout, rank in zip(layouts, ranks, strict=True)
    ]


def _rope(config: Any) -> dict[str, Any]:
    """Type, theta and the scalars of the scaling; lists of factors are told by their length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if bases := getattr(config, "layer_rope_theta", None):  # Granite SWA
        parameters = {**parameters, "rope_theta": list(bases)}
    return {
        key: f"{len(value)} values" if isinstance(value, list) else value
        for key, value in parameters.items()
    }
