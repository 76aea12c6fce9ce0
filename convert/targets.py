"""What each engine accepts, checked from the config before any work starts.

Facts read in the engines' sources (transformers 5.17 to 5.23, vLLM 0.32):

* both build `kv_a_layernorm` always; transformers gives it its class default epsilon, vLLM
  `rms_norm_eps`. The norm is made linear by scaling (see `deepseek_v3.py`), which depends on it;
* transformers can put a bias on `q_a`, `kv_a` and `o`, never on `q`, `q_b`, `kv_b`; vLLM on none;
* RoPE frequencies are one list for all layers: transformers takes any (as `longrope`), vLLM only
  base^(-2i/d_r);
* neither has a place for per-head q/k norms, sliding windows or MLP biases.

Scales for an fp8 cache leave the model as it is, so they go with every class of vLLM 0.32: one
mapper of names for all (`QuantizationConfig.get_cache_scale_mapper`, which `AutoWeightsLoader`
applies) takes `self_attn.k_scale` to `self_attn.attn.k_scale`, also in models of several modalities
and where vLLM runs the modules of transformers. `benchmarks/interop/families.sh` has seen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtool.convert import granite
from kvtool.errors import KvtoolError, UnsupportedModelError, UsageError
from kvtool.fp8 import SCALES
from kvtool.layout import LATENT, PLAIN, AttentionLayout, describe
from kvtool.rope import rope_of, ropes_of
from kvtool.sizes import token_budget

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint

KINDS = ("mla", "gqa", "mamba", "fp8-kv")
TARGETS = ("transformers", "vllm", "kvtool")
METHODS = ("aware", "transmla", "exact")
CONVERSIONS = (
    *(("mla", method, target) for method in METHODS for target in TARGETS),
    ("gqa", "aware", "transformers"),
    ("mamba", "distilled", "transformers"),
    ("fp8-kv", "aware", "transformers"),
)
"""What there is of each kind, with its methods and targets."""

ASKED = {"gqa": "merge KV heads", "fp8-kv": "calibrate an fp8 cache"}
"""What a kind other than `mla` is asked to do."""

CACHES_A_LATENT = "the model already caches a latent (MLA)"
UNREAD = {
    **dict.fromkeys(("flint", "kolibri1"), "vLLM 0.32 does not know it"),
    "VoxtralForConditionalGeneration": "vLLM 0.32 reads Voxtral in Mistral's own format alone",
}
"""Why nothing would read the scales of some model types, and wrappers by their architecture."""

SCALED_BESIDE = ("compressed-tensors", "fp8", "modelopt")
"""How weights may be quantised beside which vLLM reads scales of a cache (its KVCacheMethods)."""

TRANSFORMERS_LATENT_EPS = 1e-6
FLOAT16 = (
    "float16 weights: the scaling that makes the latent norm linear underflows in float16; "
    "convert the checkpoint to bfloat16 first, or use --target kvtool"
)


def check(config: Any, method: str, target: str, to: str = "mla") -> list[str]:
    """Reasons why a model cannot be converted this way; empty if it can.

    Args:
        config: A transformers config.
        method: One of `METHODS`; the other kinds have one each.
        target: One of `TARGETS`.
        to: One of `KINDS`.
    """
    if to == "fp8-kv":
        return _check_fp8(config)
    if config.model_type not in PLAIN:
        if config.model_type in (*LATENT, "kvtool_mla"):
            return [CACHES_A_LATENT]
        known = ", ".join(PLAIN)
        return [f"model type '{config.model_type}' is not one of {known}"]
    try:
        layouts = describe(config)
        rope = rope_of(config)
    except KvtoolError as error:
        return [str(error)]
    reasons = []
    if len(set(layouts)) > 1:
        reasons.append("its layers have different attention layouts")
    layout = layouts[0]
    limit = config.max_position_embeddings
    window = min((x.sliding_window for x in layouts if x.sliding_window), default=limit)
    if window < limit:
        place = {"mla": "MLA", "mamba": "the stock hybrid class"}.get(
            to, "a conversion, which looks at the whole context"
        )
        reasons.append(f"sliding-window attention ({window} tokens) has no place in {place}")
    if to == "mamba":
        return reasons + granite.check(config, layout)
    if to == "gqa":
        if layout.qk_norm:
            reasons.append(
                "q/k norm (Qwen3) lies between the projections and RoPE: no combination of heads "
                "can be folded past it"
            )
        return reasons
    if target == "kvtool":
        return reasons
    if layout.qk_norm:
        reasons.append(
            "q/k norm (Qwen3) is not linear, a stock MLA cannot express it: use --target kvtool"
        )
    if getattr(config, "mlp_bias", False):
        reasons.append("the stock MLA architecture has no bias in its MLP")
    if str(config.dtype) in ("float16", "torch.float16"):
        reasons.append(FLOAT16)
    if target == "vllm":
        way = "kvtool" if reasons else "transformers"
        if layout.qkv_bias or layout.output_bias:
            way_out = "kvtool" if reasons else "transformers or kvtool"
            reasons.append(f"vLLM's MLA has no attention bias: use --target {way_out}")
        if method == "exact" and layout.kv_heads > 1:
            reasons.append(
                "the exact method repeats each RoPE frequency once per KV head, which vLLM's MLA "
                f"cannot express: use --target {way}"
            )
        default = default_inv_freq(_theta(config), layout.head_dim)
        if rope.scale != 1 or not torch.allclose(rope.inv_freq, default, rtol=1e-5):
            kind = config.rope_parameters.get("rope_type")
            reasons.append(f"vLLM's MLA has no '{kind}' RoPE scaling: use --target {way}")
    return reasons


def _check_fp8(config: Any) -> list[str]:
    """Reasons why a model gets no scales."""
    if config.model_type in (*LATENT, "kvtool_mla"):
        return [CACHES_A_LATENT]
    if config.model_type in UNREAD:
        return [UNREAD[config.model_type]]
    try:
        describe(config)
        ropes_of(config)
    except KvtoolError as error:
        return [str(error)]
    return []


def of_checkpoint(checkpoint: Checkpoint, to: str) -> list[str]:
    """Reasons that lie in what is around a text or in how its weights are stored."""
    if to != "fp8-kv":
        return []
    reasons = [UNREAD[checkpoint.wrapper]] if checkpoint.wrapper in UNREAD else []
    if checkpoint.quantised not in (None, *SCALED_BESIDE):
        reasons.append(
            f"vLLM 0.32 reads scales beside weights of {', '.join(SCALED_BESIDE)}, and not of "
            f"{checkpoint.quantised}"
        )
    return reasons


def require(config: Any, method: str, target: str, to: str) -> None:
    """Raises UnsupportedModelError with the first reason of :func:`check`."""
    if reasons := check(config, method, target, to):
        asked = f"convert to MLA ({method}, for {target})" if to == "mla" else ASKED[to]
        raise UnsupportedModelError(
            f"cannot {asked}: {reasons[0]}",
            hint="`kvtool inspect` lists what applies to this model",
        )


@dataclass(frozen=True)
class LatentSize:
    """Widths of a conversion to MLA, checked against the model.

    Attributes:
        rope_dim: d_r. rank: r. native: 2K, numbers per token and layer before.
    """

    rope_dim: int
    rank: int
    native: int

    @property
    def kept(self) -> int:
        """Numbers per token and layer after."""
        return self.rank + self.rope_dim

    @property
    def widths(self) -> dict[str, int]:
        """Under the names that a plan has for them."""
        return {"rope_dim": self.rope_dim, "rank": self.rank}


@dataclass(frozen=True)
class HeadsSize:
    """KV heads of a conversion to fewer of them.

    Attributes:
        kv_heads: N. head_dim: D. native: As above.
    """

    kv_heads: int
    head_dim: int
    native: int

    @property
    def kept(self) -> int:
        """Numbers per token and layer after."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def widths(self) -> dict[str, int]:
        """Under the names that a plan has for them."""
        return {"kv_heads": self.kv_heads}


def heads_size(layout: AttentionLayout, kv_heads: int | None) -> HeadsSize:
    """Checks how many KV heads are asked for.

    Raises:
        UsageError: None are, or they cannot be made by merging groups of equal size, or are all.
    """
    there = layout.kv_heads
    possible = [str(n) for n in range(1, there) if there % n == 0]
    merged = f"which can be merged into {', '.join(possible)}" if possible else "the least"
    choose = f"the model has {there}, {merged}"
    if kv_heads is None:
        raise UsageError(f"--to gqa needs --kv-heads: {choose}")
    if kv_heads == there:
        raise UsageError(f"--kv-heads {kv_heads} does not shrink the cache: {choose}")
    if str(kv_heads) not in possible:
        raise UsageError(f"--kv-heads {kv_heads} is impossible: {choose}")
    return HeadsSize(kv_heads, layout.head_dim, layout.cached_values)


def parse_budget(text: str, layout: AttentionLayout, layers: int) -> int:
    """A budget as whole numbers per token and layer.

    Args:
        text: `50%` of the native cache, or bytes per token over all layers in bf16 (`11520`,
            `11.25KiB`, `12kB`).

    Raises:
        UsageError: See :func:`~kvtool.sizes.token_budget`; or it is so few bytes that a share was
            meant.
    """
    amount, is_share = token_budget(text)
    if is_share:
        return int(amount * layout.cached_values)
    native = 2 * layers * layout.cached_values
    if amount < 0.02 * native:
        share = float(amount if amount >= 1 else 100 * amount)
        raise UsageError(
            f"--kv-budget {text} is {float(amount):g} bytes per token, of {native} that the model "
            "keeps",
            hint=f"for a share, write --kv-budget {share:g}%" if share < 100 else None,
        )
    return int(amount / (2 * layers))


ROPE_SHARE = {"kvtool": 0.39, "transformers": 0.42}
"""d_r / (r + d_r) where the method `aware` may choose it, measured at 37.5, 50 and 75 %; a list of
frequencies that all layers share needs a little more."""


def latent_size(
    config: Any,
    method: str,
    target: str,
    kv_budget: str | None,
    rope_dim: int | None,
    rank: int | None,
) -> LatentSize:
    """Resolves budget, rope width and rank.

    Without `rank` and budget, 75 % of the native cache. Without `rope_dim`, `aware` gives the
    shared key `ROPE_SHARE`; one component per frequency (`transmla`, and every method for vLLM)
    makes it one head wide, or the widest divisor of a head that leaves the latent at least as much.

    Raises:
        UsageError: The widths are impossible, or the cache would not shrink.
    """
    layouts = describe(config)
    layout, native = layouts[0], layouts[0].cached_values
    head, width = layout.head_dim, layout.kv_heads * layout.head_dim
    free = method == "aware" and target in ROPE_SHARE
    if kv_budget is not None and rank is not None and rope_dim is not None:
        raise UsageError("--kv-budget, --rank and --rope-dim together: give at most two of them")
    total = None if kv_budget is None else parse_budget(kv_budget, layout, len(layouts))
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} is impossible: a latent has at least one dimension")
    if total is not None and rank is not None and rank >= total:
        raise UsageError(
            f"--rank {rank} does not fit --kv-budget {kv_budget}, which allows {total} numbers per "
            "token and layer, the shared RoPE key included"
        )
    if total is None and rank is None:
        total = parse_budget("75%", layout, len(layouts))
    if total is not None and total >= native:
        raise UsageError(
            f"--kv-budget {kv_budget} does not shrink the cache: it allows {total} numbers per "
            f"token and layer, the model keeps {native}"
        )
    if rope_dim is None:
        rope_dim = _rope_dim(head, total, rank, ROPE_SHARE[target] if free else None)
    if rope_dim < 2 or rope_dim % 2 or (head % rope_dim and not free):
        divide = "" if free else f" and divide the head size {head}"
        raise UsageError(f"--rope-dim {rope_dim} is impossible: it must be even{divide}")
    if rope_dim > width:
        raise UsageError(f"--rope-dim {rope_dim} is impossible: all keys together have {width}")
    limit = 2 * width - rope_dim
    if rank is None:
        assert total is not None
        rank = min(total - rope_dim, limit)
    if rank < 1:
        raise UsageError(
            f"nothing is left for the latent: the budget allows {total} numbers per token and "
            f"layer, the shared RoPE key takes {rope_dim}",
            hint="raise --kv-budget or lower --rope-dim",
        )
    if rank > limit:
        raise UsageError(
            f"--rank {rank} is impossible: keys and values without the RoPE part have {limit} "
            f"dimensions"
        )
    if rank + rope_dim >= native:
        raise UsageError(
            f"rank {rank} + rope dim {rope_dim} = {rank + rope_dim} does not shrink the cache: the "
            f"model keeps {native} numbers per token and layer",
            hint="use --method exact for a change of format without loss",
        )
    return LatentSize(rope_dim, rank, native)


def _rope_dim(head: int, total: int | None, rank: int | None, share: float | None) -> int:
    """Width of the shared key where it is not asked for.

    Args:
        head: D. total: Numbers per token and layer, where a budget says them.
        share: Of them; None where the key has one component per frequency.
    """
    if total is None:
        return head
    if rank is not None:
        return total - rank
    if share is not None:
        step = 8 if total >= 32 else 2
        return max(2, step * round(share * total / step))
    widths = (x for x in range(head, 1, -1) if head % x == 0 and x % 2 == 0)
    return next((x for x in widths if x <= total - x), 2)


def freqfold_candidates(head_dim: int, rope_dim: int) -> list[int]:
    """Values of F to try: the collapse c, doubled up to 8 c while it divides the N frequencies."""
    collapse = head_dim // rope_dim
    fold, candidates = collapse, []
    while (head_dim // 2) % fold == 0 and fold <= 8 * collapse:
        candidates.append(fold)
        fold *= 2
    return candidates


def check_freqfold(fold: int, head_dim: int, rope_dim: int) -> None:
    """Raises UsageError unless F is a multiple of c and divides the number of frequencies."""
    collapse, pairs = head_dim // rope_dim, head_dim // 2
    if fold < 1 or fold % collapse or pairs % fold:
        raise UsageError(
            f"--freqfold {fold} is impossible: it must be a multiple of {collapse} that divides "
            f"{pairs}"
        )


def latent_eps(config: Any, target: str) -> float:
    """Epsilon that the target puts into `kv_a_layernorm` and `q_a_layernorm`."""
    return TRANSFORMERS_LATENT_EPS if target == "transformers" else float(config.rms_norm_eps)


def default_inv_freq(theta: float, dim: int) -> Tensor:
    """RoPE frequencies `[dim/2]` of a stock config: theta^(-2i/dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))


def rope_parameters(config: Any, inv_freq: Tensor, scale: float) -> dict[str, Any]:
    """`rope_parameters` under which a stock engine uses exactly `inv_freq [d_r/2]`.

    Frequencies that theta alone gives stay `default`. Any others go through `longrope`, whose
    factors divide the default frequencies one by one, here equal for short and long texts.
    """
    theta = _theta(config)
    default = default_inv_freq(theta, 2 * len(inv_freq))
    if scale == 1 and torch.allclose(inv_freq.float(), default, rtol=1e-6):
        return {"rope_type": "default", "rope_theta": theta}
    # transformers divides by (factor · theta^(2i/d)) in fp32; do the same to land on inv_freq.
    factors = (default.double() / inv_freq.double()).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])


def refuse_latent(to: str) -> None:
    """Raises UnsupportedModelError for a model that is MLA already."""
    asked = "convert to MLA" if to == "mla" else ASKED[to]
    raise UnsupportedModelError(f"cannot {asked}: {CACHES_A_LATENT}")


SCALED = "already holds scales for an fp8 cache"


def has_scales(checkpoint: Checkpoint) -> bool:
    """Whether it says so, or in words of its own, as ModelOpt does, but has the tensors."""
    tensors = any(name.rpartition(".")[2] in SCALES for name in checkpoint.tensors)
    return checkpoint.cache_scheme is not None or tensors


def refuse_fp8(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError for a model with scales that no other cache could use."""
    if has_scales(checkpoint):
        raise UnsupportedModelError(
            f"{checkpoint.source} {SCALED}",
            hint="convert the checkpoint that it was made from",
        )
