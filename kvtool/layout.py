"""The one place that recognises how a transformers attention module is laid out.

Two layouts are recognised, by structure:

* **GQA** (`FAMILIES`): `q_proj k_proj v_proj o_proj`, or the first three as one `qkv_proj`,
  optional biases, optional `q_norm k_norm`, per head or over all heads, optional `sinks`.
  Its stages are those of `kvtool.attention`.
* **MLA** (`LATENT`): `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, and `q_proj` or
  `q_a_proj q_a_layernorm q_b_proj`. Its stages are those of `kvtool.latent`.

Hybrid models have GQA in some layers, and in the others a state of fixed size: of Mamba-2
(`granitemoehybrid`), with the stages of `kvtool.mamba`, or of Gated DeltaNet (`kvtool.delta_net`).

Everything else is refused by name, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from kvtool._tensors import first_line
from kvtool._transformers import empty_model
from kvtool.delta_net import DeltaNet
from kvtool.errors import UnsupportedModelError
from kvtool.factors import finish_of
from kvtool.mamba import Mixer, MixerShape

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are attention and a gated MLP, each behind an RMSNorm, and no more."""
FAMILIES = (
    *PLAIN,
    *("afmoe", "apertus", "arcee", "cohere", "cohere2", "cohere2_moe", "cwm", "dots1", "ernie4_5"),
    *("ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma3_text"),
    *("gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite"),
    *("granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    *("helium", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna"),
    *("mellum", "minimax_m2", "ministral"),
    *("ministral3", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "phimoe"),
    *("qwen2_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss"),
    *("smollm3", "solar_open", "stablelm", "starcoder2"),
)
"""Model types whose attention is the GQA layout; each is checked by a test."""
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")
"""Those whose attention is the MLA layout."""
INTERLEAVED = (
    *("cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium"),
)
"""Those that turn neighbouring channels of a head together."""
_INTERLEAVES = {"deepseek_v2": True, "minicpm3": False}
"""Whether MLA turns neighbouring channels together, where no field of a config is asked."""
_WINDOW_IN_CONFIG = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2")
"""Those whose attention reads its sliding window from the config; the config of others may have
one that nothing reads."""
ROPE_BY_LAYER = ("granite_swa", "granitemoe_swa")
"""Those whose layers have a base of RoPE each, and 0 if they have no positions."""
HYBRID = "granitemoehybrid"
"""The model type of attention in some layers and Mamba-2 in the others."""
_MIXERS: dict[str, type[Mixer] | type[DeltaNet]] = {"mamba": Mixer, "linear_attn": DeltaNet}
"""By the name of the module in a decoder layer."""
GATES = {"afmoe": "gate_proj", "laguna": "g_proj"}
"""The projection to a gate on what heads give, of those that have one beside `q_proj`."""
_OTHERS = {
    **dict.fromkeys(("gemma2", "vaultgemma"), "its attention caps scores"),
    "gemma3n_text": "its layers carry several streams of hidden states",
    "mimo_v2_flash": "its values are narrower than its keys",
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe"), "it norms queries and keys behind RoPE"
    ),
}
"""Why some others are not."""


@dataclass(frozen=True)
class AttentionLayout:
    """What one attention layer computes, without its weights.

    Attributes:
        kind: `gqa` caches keys and values per KV head; `mla` one latent and one shared RoPE key;
            `state` a state of a fixed size.
        head_dim: Size of a query and key head (for `mla`: `nope_dim + rope_dim`).
        scaling: Factor on the scores before the softmax.
        qk_norm: Queries and keys are normed in front of RoPE, `norm_over_heads` all heads together.
        gated: What heads give is multiplied by a gate, per channel or head, in front of `o_proj`.
        sink_logits: Each query head has a learned logit that joins its softmax and has no value
            (`kernels/sink_logits`).
        rotary_dim: Channels of a head that RoPE turns, of a `gqa` layer.
        turned_scale: What RoPE multiplies those by, where they are a part of a head.
        sliding_window: Window in tokens, `None` if the layer sees everything.
        reads: The layer whose keys and values it reads, having none of its own (small Gemma 4);
            `kv_heads` are those of that layer.
        read: Later layers read its keys and values, too.
        temper: β and L, if a query at position p is multiplied by 1 + β ln(1 + ⌊p / L⌋) (Llama 4).
        rank, rope_dim, nope_dim, value_dim: Of an `mla` layer; 0 otherwise.
        interleaved: RoPE turns neighbouring channels together, of an `mla` layer.
        mixer: Sizes of a `state` layer.
    """

    kind: Literal["gqa", "mla", "state"]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_over_heads: bool = False
    gated: bool = False
    sink_logits: bool = False
    rotary_dim: int = 0
    turned_scale: float = 1.0
    sliding_window: int | None = None
    reads: int | None = None
    read: bool = False
    temper: tuple[float, int] | None = None
    rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    interleaved: bool = False
    mixer: MixerShape | None = None

    @property
    def sees_all(self) -> bool:
        """Whether its heads see the whole past, and nobody else reads it, so that they can be given
        less.
        """
        return self.stores_all and not self.read

    @property
    def stores_all(self) -> bool:
        """Whether it has keys and values of its own and sees the whole past of them."""
        return self.kind == "gqa" and self.sliding_window is None and self.reads is None

    @property
    def shares(self) -> bool:
        """Whether it reads the keys and values of another layer, or another reads its own."""
        return self.read or self.reads is not None

    @property
    def cached_values(self) -> int:
        """Numbers kept per token by a runtime that stores what this layer really needs."""
        if self.kind == "state" or self.reads is not None:
            return 0
        if self.kind == "mla":
            return self.rank + self.rope_dim
        return 2 * self.kv_heads * self.head_dim


def recognise(module: nn.Module, name: str) -> AttentionLayout:
    """Reads the layout of a transformers attention module from its structure.

    Raises:
        UnsupportedModelError: The module has parts that neither layout has; they are named.
    """
    present = {child for child, _ in module.named_children()}
    present |= {parameter for parameter, _ in module.named_parameters(recurse=False)}
    mla = "kv_a_proj_with_mqa" in present
    if mla:
        needed = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
        needed |= {"q_proj"} if "q_proj" in present else {"q_a_proj", "q_a_layernorm", "q_b_proj"}
        optional: set[str] = set()
    else:
        needed = {"o_proj"} | ({"qkv_proj"} & present or {"q_proj", "k_proj", "v_proj"})
        if getattr(module, "use_alternative_attention", False):  # keys are the values, too
            needed -= {"v_proj"}
        if borrows(module):
            needed -= {"k_proj", "v_proj"}
        optional = {"q_norm", "k_norm", "v_norm", "sinks"}
        family = getattr(getattr(module, "config", None), "model_type", "")
        needed |= {GATES[family]} if family in GATES else set()
    kind = type(module).__name__
    if missing := needed - present:
        raise UnsupportedModelError(
            f"{name} ({kind}) has no {', '.join(sorted(missing))}: its attention is not known here"
        )
    if unknown := present - needed - optional:
        raise UnsupportedModelError(
            f"{name} ({kind}) has {', '.join(sorted(unknown))}, which kvtool does not know"
        )
    if getattr(module, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{name} ({kind}) caps its scores (softcap), not supported")
    if not all(getattr(x, "is_causal", True) for x in (module, module.config)):
        raise UnsupportedModelError(f"{name} ({kind}) looks at later tokens, too: it is no decoder")
    return _mla_layout(module) if mla else _gqa_layout(module, name)


def _gqa_layout(module: Any, name: str) -> AttentionLayout:
    config, head_dim = module.config, int(module.head_dim)
    fused, over_heads = hasattr(module, "qkv_proj"), False
    # Both may differ by layer (Laguna, Gemma 4).
    heads = getattr(config, "num_attention_heads_per_layer", None) or config.num_attention_heads
    heads = heads if isinstance(heads, int) else heads[module.layer_idx]
    reads, read = _sharing(module)
    if reads is not None:
        kv_heads = heads // module.num_key_value_groups
    else:
        kv_heads = config.num_key_value_heads if fused else module.k_proj.out_features // head_dim
    if hasattr(module, "q_norm") and reads is None:
        sizes = [tuple(getattr(module, x).weight.shape) for x in ("q_norm", "k_norm")]
        over_heads = sizes == [(heads * head_dim,), (kv_heads * head_dim,)] != [(head_dim,)] * 2
        if not over_heads and sizes != [(head_dim,)] * 2:
            raise UnsupportedModelError(
                f"{name} has a q/k norm with a weight of its own for each head, which kvtool does "
                "not know"
            )
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModelError(f"{name} clips queries, keys and values (clip_qkv)")
    rotary_dim = _rotary_dim(module, head_dim)
    scale = _rope_scale(module) if 0 < rotary_dim < head_dim else 1.0
    first = module.qkv_proj if fused else module.q_proj if borrows(module) else module.k_proj
    queries = heads * head_dim if fused else module.q_proj.out_features
    return AttentionLayout(
        kind="gqa",
        hidden_size=first.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=float(module.scaling),
        qkv_bias=first.bias is not None,
        output_bias=module.o_proj.bias is not None,
        qk_norm=hasattr(module, "q_norm"),
        norm_over_heads=over_heads,
        gated=queries == 2 * heads * head_dim or config.model_type in GATES,
        sink_logits=getattr(module, "sinks", None) is not None,
        rotary_dim=rotary_dim,
        turned_scale=scale,
        sliding_window=_sliding_window(module),
        reads=reads,
        read=read,
        temper=_temper(module.config),
    )


def borrows(module: Any) -> bool:
    """Whether an attention module reads the keys and values of an earlier layer."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def _sharing(module: Any) -> tuple[int | None, bool]:
    """The layer whose keys and values it reads, and whether later layers read its own: the last
    layers read those of the last one before them of their type.
    """
    if not hasattr(module, "is_kv_shared_layer"):
        return None, False
    config, at = module.config, module.layer_idx
    kinds = config.layer_types[: config.num_hidden_layers]
    own = len(kinds) - config.num_kv_shared_layers
    lender = max(i for i in range(own) if kinds[i] == kinds[at])
    return (lender, False) if borrows(module) else (None, at == lender and kinds[at] in kinds[own:])


def _rotary_dim(module: Any, head_dim: int) -> int:
    """Channels of a head that the module's forward turns."""
    config = module.config
    window, sliding = (getattr(module, x, None) for x in ("sliding_window", "is_sliding"))
    turned = {  # of models with layers that have no positions (NoPE)
        "smollm3": bool(getattr(module, "use_rope", True)),
        "cohere2": window is not None,
        "cohere2_moe": window is not None or bool(getattr(module, "force_rope", False)),
        **dict.fromkeys(("afmoe", "flint"), window is not None),
        **dict.fromkeys(("exaone4", "exaone_moe", "kolibri1"), window is None or bool(sliding)),
    }
    if not turned.get(config.model_type, True):
        return 0
    if config.model_type in ROPE_BY_LAYER and not config.layer_rope_theta[module.layer_idx]:
        return 0
    by_kind = rope_by_layer_type(config)
    first: dict[str, Any] = next(iter(by_kind.values()), {})
    kinds = getattr(config, "layer_types", None)
    parameters = by_kind.get(kinds[module.layer_idx], first) if kinds else first
    if parameters.get("rope_type") == "proportional":  # what it does not turn has frequency 0
        return head_dim
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rope_scale(module: Any) -> float:
    """What yarn and LongRoPE multiply cos and sin by in a layer."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, by_kind = module.config, rope_by_layer_type(module.config)
    own = {} if "" in by_kind else {"layer_type": config.layer_types[module.layer_idx]}
    rope_type = by_kind[own.get("layer_type", "")].get("rope_type", "default")
    if rope_type == "default":
        return 1.0
    return float(ROPE_INIT_FUNCTIONS[rope_type](config, **own)[1])


def rope_by_layer_type(config: Any) -> dict[str, dict[str, Any]]:
    """By type of layer; under an empty name if there is one for all."""
    parameters, kinds = config.rope_parameters, getattr(config, "layer_types", None) or ()
    return {kind: parameters[kind] for kind in parameters if kind in kinds} or {"": parameters}


def _sliding_window(module: Any) -> int | None:
    """The window that the module's forward really applies; a config may hold one unused, and one
    that is as long as the context is none.
    """
    if module.config.model_type in _WINDOW_IN_CONFIG:
        own = module.config
    else:
        own = module if getattr(module, "is_sliding", True) else None
    window: int | None = getattr(own, "sliding_window", None)
    return window if (window or sys.maxsize) < module.config.max_position_embeddings else None


def _temper(config: Any) -> tuple[float, int] | None:
    """Of Ministral 3 alone: the parameters of others' RoPE may say it, too."""
    parameters = config.rope_parameters if config.model_type == "ministral3" else {}
    if not (beta := parameters.get("llama_4_scaling_beta")):
        return None
    return float(beta), int(parameters["original_max_position_embeddings"])


def _mla_layout(module: Any) -> AttentionLayout:
    query, config = getattr(module, "q_proj", None) or module.q_b_proj, module.config
    head_dim = int(module.qk_nope_head_dim + module.qk_rope_head_dim)
    return AttentionLayout(
        kind="mla",
        hidden_size=module.kv_a_proj_with_mqa.in_features,
        heads=query.out_features // head_dim,
        kv_heads=1,
        head_dim=head_dim,
        scaling=float(module.scaling),
        qkv_bias=module.kv_a_proj_with_mqa.bias is not None,
        output_bias=module.o_proj.bias is not None,
        rank=int(module.kv_lora_rank),
        rope_dim=int(module.qk_rope_head_dim),
        nope_dim=int(module.qk_nope_head_dim),
        value_dim=int(module.v_head_dim),
        interleaved=_INTERLEAVES.get(config.model_type, getattr(config, "rope_interleave", False)),
    )


def decoder_layers(model: nn.Module) -> list[Any]:
    """The list of decoder layers of a `*ForCausalLM` model."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(
        hasattr(layer, "self_attn") or mixer_in(layer) for layer in layers
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a stack of decoder layers with `self_attn`"
        )
    return list(layers)


def experts_of(model: nn.Module) -> list[Any]:
    """The modules of a transformers model that hold the experts of a layer, all in one tensor."""
    return [x for x in model.modules() if type(x).__name__.endswith("Experts")]


def with_heads(layouts: Sequence[AttentionLayout]) -> AttentionLayout:
    """The first layer that sees the whole past, or else that has keys and values."""
    first = [layout for layout in layouts if layout.sees_all]
    first += [layout for layout in layouts if layout.stores_all]
    return next(layout for layout in (*first, *layouts) if layout.kind != "state")


def mixer_in(layer: Any) -> str | None:
    """Under which name a decoder layer of a hybrid model has a mixer in the place of attention."""
    names = (name for name in _MIXERS if getattr(layer, name, None) is not None)
    return next(names, None)


def put_in(layer: Any, module: nn.Module) -> None:
    """Puts a module in the place of the attention, or of the mixer, of a decoder layer."""
    setattr(layer, mixer_in(layer) or "self_attn", module)


def mixer_of(layer: Any) -> Mixer | DeltaNet | None:
    """The stages of that mixer."""
    name = mixer_in(layer)
    return None if name is None else _MIXERS[name].of(getattr(layer, name))


def _mixer_layout(layer: Any, name: str) -> AttentionLayout:
    module = getattr(layer, name)
    if (activation := module.activation) not in ("silu", "swish"):
        raise UnsupportedModelError(f"{type(module).__name__} with {activation} is not supported")
    shape = _MIXERS[name].shape_of(module)
    biased = any(x.bias is not None for x in module.children() if isinstance(x, nn.Linear))
    return AttentionLayout(
        kind="state",
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=0,
        head_dim=shape.head_dim,
        scaling=1.0,
        qkv_bias=biased,
        output_bias=biased,
        mixer=shape,
    )


def describe(config: Any) -> list[AttentionLayout]:
    """Layout of every layer from a transformers config alone; no weights are made.

    Raises:
        UnsupportedModelError: The model type or one of its layers is outside what kvtool knows.
    """
    if config.model_type not in (*FAMILIES, *LATENT):
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported"
            + (f": {_OTHERS[config.model_type]}" if config.model_type in _OTHERS else ""),
            hint=f"supported: {', '.join((*FAMILIES, *LATENT))}",
        )
    try:
        layouts = _layouts(empty_model(config))
        finish_of(config)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a config of impossible values makes transformers raise
        raise UnsupportedModelError(
            f"no model can be made of this {config.model_type} config: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not layouts:
        raise UnsupportedModelError(f"this {config.model_type} config has no layers")
    if (positions := config.max_position_embeddings) < 1:
        raise UnsupportedModelError(
            f"this {config.model_type} config has a context of {positions} tokens "
            "(max_position_embeddings)"
        )
    if all(layout.kind == "state" for layout in layouts):
        raise UnsupportedModelError(f"this {config.model_type} has no layer with keys and values")
    return layouts


def _layouts(model: nn.Module) -> list[AttentionLayout]:
    return [
        _mixer_layout(layer, name)
        if (name := mixer_in(layer))
        else recognise(layer.self_attn, f"model.layers.{i}.self_attn")
        for i, layer in enumerate(decoder_layers(model))
    ]


def apply_latent_eps(model: nn.Module, config: dict[str, Any]) -> None:
    """Gives the latent norms of a checkpoint written for vLLM the epsilon that vLLM gives them.

    transformers builds them with its class default, vLLM with `rms_norm_eps`, and neither reads a
    config field for it; `config["kvtool"]["target"]` says whose convention the weights follow.
    """
    if config.get("kvtool", {}).get("target") != "vllm":
        return
    for layer in decoder_layers(model):
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if (norm := getattr(layer.self_attn, name, None)) is not None:
                norm.variance_epsilon = config["rms_norm_eps"]
