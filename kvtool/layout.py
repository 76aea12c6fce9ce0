"""The one place that recognises how a transformers attention module is laid out.

Two layouts are recognised, by structure:

* **GQA** (`FAMILIES`): `q_proj k_proj v_proj o_proj`, or the first three as one `qkv_proj`,
  optional biases, optional `q_norm k_norm`, per head or over all heads.
  Its stages are those of `kvtool.attention`.
* **MLA** (`deepseek_v3`): `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, and `q_proj` or
  `q_a_proj q_a_layernorm q_b_proj`. Its stages are those of `kvtool.latent`.

Hybrid models (`granitemoehybrid`) have GQA in some layers and Mamba-2 in the others, whose stages
are those of `kvtool.mamba`.

Everything else is refused by name, with the reason.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kvtool._tensors import first_line
from kvtool.errors import UnsupportedModelError
from kvtool.mamba import MixerShape, shape_of
from kvtool.rope import Rope

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are attention and a gated MLP, each behind an RMSNorm, and no more."""
FAMILIES = (
    *PLAIN,
    *("apertus", "arcee", "cohere", "cohere2", "cohere2_moe", "cwm", "dots1", "ernie4_5"),
    *("ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3_text", "glm", "glm4"),
    *("glm4_moe", "granite", "granitemoe", "granitemoeshared", "helium", "hy_v3", "hyperclovax"),
    *("internlm3", "iquestcoder", "jais2", "kolibri1", "mellum", "minimax_m2", "ministral"),
    *("ministral3", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "phimoe"),
    *("qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2"),
)
"""Model types whose attention is the GQA layout; each is checked by a test."""
INTERLEAVED = (
    *("cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium"),
)
"""Those that turn neighbouring channels of a head together."""
_WINDOW_IN_CONFIG = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2")
"""Those whose attention reads its sliding window from the config; the config of others may have
one that nothing reads."""
HYBRID = "granitemoehybrid"
"""The model type that has attention in some layers and Mamba-2 in the others."""
_MUP = ("granite", "granitemoe", "granitemoeshared", HYBRID, "hyperclovax")
"""Those that multiply embeddings and logits by what their config says; others' may say it, too."""

_CHANGES = "RoPE of type '{}' changes its frequencies with the length of the text"


@dataclass(frozen=True)
class AttentionLayout:
    """What one attention layer computes, without its weights.

    Attributes:
        kind: `gqa` caches keys and values per KV head; `mla` one latent and one shared RoPE key;
            `mamba` a state of a fixed size.
        head_dim: Size of a query and key head (for `mla`: `nope_dim + rope_dim`).
        scaling: Factor on the scores before the softmax.
        qk_norm: Queries and keys are normed in front of RoPE, `norm_over_heads` all heads together.
        rotary_dim: Channels of a head that RoPE turns, of a `gqa` layer.
        sliding_window: Window in tokens, `None` if the layer sees everything.
        temper: β and L, if a query at position p is multiplied by 1 + β ln(1 + ⌊p / L⌋) (Llama 4).
        rank, rope_dim, nope_dim, value_dim: Of an `mla` layer; 0 otherwise.
        mixer: Sizes of a `mamba` layer.
    """

    kind: Literal["gqa", "mla", "mamba"]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_over_heads: bool = False
    rotary_dim: int = 0
    sliding_window: int | None = None
    temper: tuple[float, int] | None = None
    rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    mixer: MixerShape | None = None

    @property
    def cached_values(self) -> int:
        """Numbers kept per token by a runtime that stores what this layer really needs."""
        if self.kind == "mamba":
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
        optional = {"q_norm", "k_norm"}
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
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    over_heads = False
    if hasattr(module, "q_norm"):
        sizes = [tuple(getattr(module, x).weight.shape) for x in ("q_norm", "k_norm")]
        over_heads = sizes == [(heads * head_dim,), (kv_heads * head_dim,)] != [(head_dim,)] * 2
        if not over_heads and sizes != [(head_dim,)] * 2:
            raise UnsupportedModelError(
                f"{name} has a q/k norm with a weight of its own for each head, which kvtool does "
                "not know"
            )
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModelError(f"{name} clips queries, keys and values (clip_qkv)")
    first = module.qkv_proj if hasattr(module, "qkv_proj") else module.k_proj
    return AttentionLayout(
        kind="gqa",
        hidden_size=first.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=float(module.scaling),
        qkv_bias=first.bias is not None,
        output_bias=module.o_proj.bias is not None,
        qk_norm=hasattr(module, "k_norm"),
        norm_over_heads=over_heads,
        rotary_dim=_rotary_dim(module, head_dim),
        sliding_window=_sliding_window(module),
        temper=_temper(module.config),
    )


def _rotary_dim(module: Any, head_dim: int) -> int:
    """Channels of a head that the module's forward turns."""
    config = module.config
    window, sliding = (getattr(module, x, None) for x in ("sliding_window", "is_sliding"))
    turned = {  # of models with layers that have no positions (NoPE)
        "smollm3": bool(getattr(module, "use_rope", True)),
        "cohere2": window is not None,
        "cohere2_moe": window is not None or bool(getattr(module, "force_rope", False)),
        **dict.fromkeys(("exaone4", "exaone_moe", "kolibri1"), window is None or bool(sliding)),
    }
    if not turned.get(config.model_type, True):
        return 0
    parameters = next(iter(_rope_parameters(config).values()), {})
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


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
    query = module.q_proj if module.q_proj is not None else module.q_b_proj
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
    )


def decoder_layers(model: nn.Module) -> list[Any]:
    """The list of decoder layers of a `*ForCausalLM` model."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(x, "self_attn") for x in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a stack of decoder layers with `self_attn`"
        )
    return list(layers)


def is_mixer(layer: Any) -> bool:
    """Whether a decoder layer of a hybrid model has a Mamba-2 mixer in the place of attention."""
    return layer.self_attn is None


def _mixer_layout(config: Any) -> AttentionLayout:
    shape = shape_of(config)
    return AttentionLayout(
        kind="mamba",
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=0,
        head_dim=shape.head_dim,
        scaling=1.0,
        qkv_bias=bool(config.mamba_proj_bias),
        output_bias=bool(config.mamba_proj_bias),
        mixer=shape,
    )


def describe(config: Any) -> list[AttentionLayout]:
    """Layout of every layer from a transformers config alone; no weights are made.

    Raises:
        UnsupportedModelError: The model type or one of its layers is outside what kvtool knows.
    """
    from transformers import AutoModelForCausalLM

    if config.model_type not in (*FAMILIES, "deepseek_v3", HYBRID):
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported",
            hint=f"supported: {', '.join(FAMILIES)}, and deepseek_v3 and {HYBRID} without experts",
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{config.model_type} with capped logits is not supported")
    if config.model_type == HYBRID and config.num_local_experts:
        raise UnsupportedModelError(f"{HYBRID} with mixture-of-experts layers is not supported")
    if config.model_type == "deepseek_v3" and config.first_k_dense_replace < (
        config.num_hidden_layers
    ):
        raise UnsupportedModelError("deepseek_v3 with mixture-of-experts layers is not supported")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a config of impossible values makes transformers raise
        raise UnsupportedModelError(
            f"transformers makes no model of this {config.model_type} config: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not decoder_layers(model):
        raise UnsupportedModelError(f"this {config.model_type} config has no layers")
    return [
        _mixer_layout(config)
        if is_mixer(layer)
        else recognise(layer.self_attn, f"model.layers.{i}.self_attn")
        for i, layer in enumerate(decoder_layers(model))
    ]


def embedding_factor(config: Any) -> float:
    """What a model multiplies its embeddings by, where the embedding does not do so itself."""
    return float(config.embedding_multiplier) if config.model_type in _MUP else 1.0


def logits_factor(config: Any) -> float:
    """What a model multiplies the logits of its output head by."""
    if config.model_type in ("cohere", "cohere2", "cohere2_moe"):
        return float(config.logit_scale)
    if config.model_type not in _MUP:
        return 1.0
    factor = float(config.logits_scaling)
    return factor if config.model_type == "hyperclovax" else 1 / factor  # Granite divides


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


def ropes_of(config: Any) -> list[Rope]:
    """The rotary embedding of every layer, read from the module that transformers builds.

    Raises:
        UnsupportedModelError: The frequencies depend on the length of the text, and not only beyond
            the context of the model, where nothing here reads.
    """
    from transformers import AutoModelForCausalLM

    layouts = describe(config)
    if config.model_type == HYBRID and config.position_embedding_type != "rope":
        pairs = (config.hidden_size // config.num_attention_heads) // 2
        return [Rope(torch.zeros(pairs))] * len(layouts)  # no positions: nothing is turned
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    module = type(model.model.rotary_emb)(config=config)
    found: dict[str, Rope] = {}
    for kind, parameters in _rope_parameters(config).items():
        prefix = f"{kind}_" if kind else ""
        _check_fixed(parameters)
        inv_freq, scale = (getattr(module, prefix + x) for x in ("inv_freq", "attention_scaling"))
        found[kind] = Rope(inv_freq.float(), float(scale))
    kinds = [""] * len(layouts) if "" in found else config.layer_types
    return [_own_rope(found[kind], layout) for kind, layout in zip(kinds, layouts, strict=True)]


def rope_of(config: Any) -> Rope:
    """The rotary embedding of a model whose layers share one.

    Raises:
        UnsupportedModelError: They do not, or the frequencies depend on the length of the text.
    """
    for parameters in _rope_parameters(config).values():
        if (kind := parameters.get("rope_type")) == "dynamic":
            raise UnsupportedModelError(_CHANGES.format(kind))
    first, *others = ropes_of(config)
    if not all(rope.equals(first) for rope in others):
        raise UnsupportedModelError("its layers have different RoPE")
    return first


def _rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """By type of layer; under an empty name if there is one for all."""
    parameters, kinds = config.rope_parameters, getattr(config, "layer_types", None) or ()
    return {kind: parameters[kind] for kind in parameters if kind in kinds} or {"": parameters}


def _check_fixed(parameters: dict[str, Any]) -> None:
    kind = parameters.get("rope_type")
    longer = kind == "longrope" and parameters["short_factor"] != parameters["long_factor"]
    if longer or "short_mscale" in parameters:  # Phi MoE's factor changes, too
        raise UnsupportedModelError(_CHANGES.format(kind))


def _own_rope(rope: Rope, layout: AttentionLayout) -> Rope:
    """What one layer makes of the model's RoPE."""
    if layout.kind != "gqa":
        return rope
    if not layout.rotary_dim:
        return Rope(torch.zeros(layout.head_dim // 2))
    if layout.rotary_dim != 2 * len(rope.inv_freq):
        raise UnsupportedModelError(
            f"RoPE has {len(rope.inv_freq)} frequencies for {layout.rotary_dim} channels of a head"
        )
    if layout.rotary_dim < layout.head_dim and rope.scale != 1:
        raise UnsupportedModelError("RoPE covers a part of each head, and scales it (yarn)")
    return rope.over(layout.head_dim)
