"""Streams hidden states through a checkpoint, one decoder layer in memory at a time.

A layer's weights are read from the shards, used for every token at hand, and dropped, so the memory
of a pass is bounded by the largest layer and the hidden states, not by the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate.experts import stacked
from kvtool.checkpoint import Checkpoint
from kvtool.delta_net import DeltaNet
from kvtool.errors import CalibrationError, CheckpointError, UnsupportedModelError
from kvtool.factors import embedding_factor, finish_of
from kvtool.fp8 import SCALES
from kvtool.layout import decoder_layers, describe, mixer_of, put_in, ropes_of
from kvtool.mamba import Mixer
from kvtool.rope import Rope

BATCH = 8
"""Windows that go through a layer together."""
IGNORED = ("rotary_emb.inv_freq", *SCALES)
"""Endings of tensors that nothing here reads: of old checkpoints, and for the cache of engines."""

Attention = Callable[[Tensor], Tensor]
"""Normed hidden states `[B, T, hidden]` to the attention's output, same shape."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Sees queries `[B, Q, T, D]`, keys and values `[B, H, T, D]`: normed, before RoPE."""


class _Slot(nn.Module):
    """Stands where a decoder layer expects its attention module, or its mixer."""

    attention: Attention

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor | tuple[Tensor, None]:
        result = self.attention(hidden_states)
        return result if self.alone else (result, None)


class StreamedLayer:
    """One decoder layer with its weights, fp32.

    Attributes:
        mixer: The stages of its mixer, where it has one in the place of attention.
    """

    def __init__(self, index: int, module: Any) -> None:
        self.index = index
        self.mixer = mixer_of(module)
        self._stages: GroupedQueryAttention | Mixer | DeltaNet = (
            GroupedQueryAttention(module.self_attn, f"model.layers.{index}.self_attn")
            if self.mixer is None
            else self.mixer
        )
        self._slot = _Slot(alone=self.mixer is not None)
        put_in(module, self._slot)
        self._module = module

    @property
    def attention(self) -> GroupedQueryAttention:
        """The stages of its attention module."""
        assert isinstance(self._stages, GroupedQueryAttention)
        return self._stages

    def to(self, device: torch.device) -> StreamedLayer:
        """Moves the weights."""
        self._module.to(device)
        self._stages.to(device)
        return self

    def __call__(self, hidden: Tensor, attention: Attention) -> Tensor:
        """The layer with `attention` in it, `[B, T, hidden]` to the same; differentiable."""
        self._slot.attention = attention
        try:
            result: Tensor = self._module(hidden, position_embeddings=None)
        finally:
            # It may hold the layer, and a cycle would keep the weights until Python looks for one.
            del self._slot.attention
        return result

    def normed(self, hidden: Tensor) -> Tensor:
        """What the attention is given of `hidden [B, T, hidden]`."""
        result: Tensor = self._module.input_layernorm(hidden)
        return result

    @torch.inference_mode()
    def run(self, hidden: Tensor, attention: Attention, batch: int = BATCH) -> None:
        """Takes `hidden [N, T, hidden]` through the layer, in place, `batch` windows at a time.

        Raises:
            CalibrationError: The layer produces numbers that are not finite.
        """
        for piece in hidden.split(batch):
            piece.copy_(self(piece, attention))
        if not bool(torch.isfinite(hidden).all()):
            raise CalibrationError(
                f"layer {self.index} produces values that are not finite (NaN or infinity)",
                hint="the checkpoint is damaged, or its activations overflow; try other --data",
            )


class LayerStream:
    """A checkpoint as a sequence of layers that have KV heads, or a state.

    Attributes:
        layouts: The attention of every layer.
        ropes: The rotary embedding of every layer.
        embedding_factor: What embeddings are multiplied by.
        finish: What is made of the logits of the output head.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.config = checkpoint.hf_config()
        self.layouts = describe(self.config)
        if any(layout.kind == "mla" for layout in self.layouts):
            raise UnsupportedModelError(
                f"{checkpoint.source} has layers that keep a latent: this looks at keys and values "
                "of heads",
                hint="calibrate quantization packs latents.",
            )
        self.ropes = ropes_of(self.config)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(self.config)
        self._model.eval()
        if self._model.lm_head.bias is not None:
            raise UnsupportedModelError(f"{checkpoint.source} has an output head with a bias")
        embedding = self._model.model.embed_tokens  # Gemma's has a factor of its own
        own = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.embedding_factor = own * embedding_factor(self.config)
        self.finish = finish_of(self.config)
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Names and shapes, from the headers, against what the architecture needs."""
        needed = {name: tuple(x.shape) for name, x in self._model.state_dict().items()}
        if self.config.tie_word_embeddings:
            needed.pop("lm_head.weight")
        infos = self.checkpoint.tensors.items()
        shaped = {name: torch.empty(info.shape, device="meta") for name, info in infos}
        stored = {name: tuple(x.shape) for name, x in stacked(shaped, needed).items()}
        path = self.checkpoint.path
        for name, shape in needed.items():
            if name not in stored:
                raise CheckpointError(f"{path} has no tensor {name}, which its config asks for.")
            if stored[name] != shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(stored[name])}, its config asks for "
                    f"{list(shape)}."
                )
        # Such as of layers that predict several tokens, which transformers has no use for either.
        passed_over = self._model._keys_to_ignore_on_load_unexpected or ()
        for name in stored.keys() - needed.keys() - {"lm_head.weight"}:
            if not name.endswith(IGNORED) and not any(re.search(x, name) for x in passed_over):
                raise CheckpointError(
                    f"{path} has a tensor {name}, which its config has no use for."
                )

    def __len__(self) -> int:
        return len(self.layouts)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[N, T]` to hidden states `[N, T, hidden]`, fp32."""
        table = self.checkpoint.read("model.embed_tokens.weight")
        if int(ids.max()) >= len(table):
            raise CheckpointError(
                f"{self.checkpoint.path}: its tokenizer gives id {int(ids.max())}, its embedding "
                f"has {len(table)} rows."
            )
        return table[ids].float() * self.embedding_factor

    def layer(self, index: int, changed: Mapping[str, Tensor] | None = None) -> StreamedLayer:
        """Reads one layer; drop the result before asking for the next.

        Args:
            changed: Weights to take instead of its own, by name within the layer.
        """
        module = decoder_layers(self._model)[index]
        # A fresh module each time, so that nothing of the layer outlives its use.
        with torch.device("meta"):
            fresh = type(module)(self.config, index).eval().requires_grad_(False)
        weights = {**self.checkpoint.read_prefix(f"model.layers.{index}."), **(changed or {})}
        used = {k: w.float() for k, w in weights.items() if not k.endswith(IGNORED)}
        fresh.load_state_dict(stacked(used, fresh.state_dict()), assign=True)
        return StreamedLayer(index, fresh)

    @property
    def rope(self) -> Rope:
        """That of a model whose layers share one, as all do that can be converted."""
        first, *others = self.ropes
        assert all(rope.equals(first) for rope in others)
        return first

    def tables(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of a layer for positions 0 to `length - 1`, each `[T, D]`."""
        return self.ropes[index].tables(torch.arange(length))

    def exact_attention(self, layer: StreamedLayer, observe: Observer | None = None) -> Attention:
        """The layer's own attention over whole windows; `observe` sees what goes into it, unless
        there is a mixer.
        """
        if layer.mixer is not None:
            return layer.mixer

        def attention(hidden: Tensor) -> Tensor:
            stages = layer.attention
            q, k, v = stages.project(hidden)
            q, k = stages.normalise(q, k)
            q = stages.temper(q, torch.arange(hidden.shape[1]))
            if observe is not None:
                observe(q, k, v)
            q, k = stages.rotate(q, k, *self.tables(layer.index, hidden.shape[1]))
            return stages.output(stages.attend(q, k, v), hidden)

        return attention

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: `[..., hidden]` to `[..., vocabulary]`, fp32."""
        tied = self.config.tie_word_embeddings
        head = self.checkpoint.read("model.embed_tokens.weight" if tied else "lm_head.weight")
        return self.finish(self.final_norm()(hidden) @ head.float().T)

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, fp32."""
        fresh: nn.Module = copy.deepcopy(self._model.model.norm).requires_grad_(False)
        weights = self.checkpoint.read_prefix("model.norm.")
        fresh.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)
        return fresh
