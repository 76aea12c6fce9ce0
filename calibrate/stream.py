"""Streams hidden states through a checkpoint, one decoder layer in memory at a time.

A layer's weights are read from the shards, used for every token at hand, and dropped, so the memory
of a pass is bounded by the largest layer and the hidden states, not by the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvtool._transformers import empty_model
from kvtool.attention import BorrowingAttention, GroupedQueryAttention, grouped_attention
from kvtool.calibrate.experts import stacked
from kvtool.checkpoint import Checkpoint
from kvtool.delta_net import DeltaNet
from kvtool.errors import CalibrationError, CheckpointError, UnsupportedModelError
from kvtool.factors import embedding_factor, finish_of
from kvtool.fp8 import SCALES
from kvtool.layout import AttentionLayout, decoder_layers, describe, mixer_of, put_in
from kvtool.mamba import Mixer
from kvtool.rope import Rope, ropes_of

BATCH = 8
"""Windows that go through a layer together."""
IGNORED = ("rotary_emb.inv_freq", *SCALES)
"""Endings of tensors that nothing here reads: of old checkpoints, and for the cache of engines."""

_OWN_TABLE = "model.embed_tokens_per_layer.weight"

Attention = Callable[[Tensor], Tensor]
"""Normed hidden states `[B, T, hidden]` to the attention's output, same shape."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Sees queries `[B, Q, T, D]`, keys and values `[B, H, T, D]`: normed, before RoPE."""


@dataclass(frozen=True)
class Columns:
    """Where what goes from layer to layer lies in the hidden states `[B, T, width]` of a stream.

    In most models they are the hidden states and nothing else. Small ones of Gemma 4 give each
    layer an input made of the tokens themselves, and the last layers read keys and values of
    earlier ones; so behind the hidden states lie the token's id, and what those layers lend.

    Attributes:
        hidden: Numbers of a hidden state.
        ids: Whether the ids of the tokens come next; fp32 holds those of any vocabulary exactly.
        lent: By layer that lends, where its keys lie, normed and before RoPE, and behind these its
            values.
        width: Of all together.
    """

    hidden: int
    ids: bool
    lent: dict[int, slice]
    width: int

    @classmethod
    def of(cls, layouts: Sequence[AttentionLayout], *, ids: bool) -> Columns:
        """Those of a model."""
        width, lent = layouts[0].hidden_size + int(ids), {}
        for index, layout in enumerate(layouts):
            if layout.read:
                size = 2 * layout.kv_heads * layout.head_dim
                lent[index] = slice(width, width + size)
                width += size
        return cls(layouts[0].hidden_size, ids, lent, width)

    def first(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """What the first layer is given: `embedded [..., hidden]` of `ids [...]`, fp32."""
        if self.width == self.hidden:
            return embedded
        wide = embedded.new_zeros((*ids.shape, self.width))
        wide[..., : self.hidden] = embedded
        if self.ids:
            wide[..., self.hidden] = ids
        return wide

    def states(self, wide: Tensor) -> Tensor:
        """The hidden states alone, `[..., hidden]`."""
        return wide[..., : self.hidden]

    def lend(self, wide: Tensor, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """With what a layer lends, `[B, H, T, D]` each, in its place; differentiable."""
        own = self.lent[index]
        lent = (x.transpose(1, 2).flatten(2) for x in (keys, values))
        return torch.cat((wide[..., : own.start], *lent, wide[..., own.stop :]), dim=-1)

    def borrow(self, wide: Tensor, index: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer has lent."""
        halves = wide[..., self.lent[index]].chunk(2, dim=-1)
        keys, values = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in halves)
        return keys, values


class OwnInput:
    """What one layer of a small Gemma 4 is given of the tokens themselves.

    With e the embedding of a token and p its row of the layer's own table, P numbers wide, that is
    (norm(W e / √hidden) + √P p) / √2.

    Args:
        tables: The embedding `[V, hidden]` and the own table `[V, P]`, on the host.
        factor: Of embeddings.
        project: W, `[P, hidden]`, fp32.
        norm: The norm, fp32.
    """

    def __init__(
        self, tables: tuple[Tensor, Tensor], factor: float, project: Tensor, norm: nn.Module
    ) -> None:
        self.tables, self.factor, self.project, self.norm = tables, factor, project, norm

    def to(self, device: torch.device) -> None:
        """Moves the weights."""
        self.project = self.project.to(device)
        self.norm.to(device)

    def __call__(self, ids: Tensor) -> Tensor:
        """`[B, T]` to `[B, T, P]`, fp32."""
        device, (hidden, size) = self.project.device, (x.shape[1] for x in self.tables)
        embedded, own = (table[ids.cpu()].float().to(device) for table in self.tables)
        projected = (self.factor * embedded) @ self.project.T / hidden**0.5
        result: Tensor = (self.norm(projected) + size**0.5 * own) / 2**0.5
        return result


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

    Hidden states are those of a stream, with what else goes from layer to layer behind them.

    Attributes:
        mixer: The stages of its mixer, where it has one in the place of attention.
    """

    def __init__(
        self, index: int, module: Any, columns: Columns, own_input: OwnInput | None = None
    ) -> None:
        self.index, self.columns, self._own_input = index, columns, own_input
        self.mixer = mixer_of(module)
        self._stages: GroupedQueryAttention | Mixer | DeltaNet = (
            grouped_attention(module.self_attn, f"model.layers.{index}.self_attn")
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
        if self._own_input is not None:
            self._own_input.to(device)
        return self

    def __call__(self, hidden: Tensor, attention: Attention) -> Tensor:
        """The layer with `attention` in it, `[B, T, width]` to the same; differentiable."""
        columns, more = self.columns, {}
        states = columns.states(hidden)
        if self._own_input is not None:
            more["per_layer_input"] = self._own_input(hidden[..., columns.hidden].long())
        stages = self._stages
        if isinstance(stages, BorrowingAttention):
            assert stages.layout.reads is not None
            stages.lent = columns.borrow(hidden, stages.layout.reads, stages.layout.head_dim)
        elif self.index in columns.lent:
            _, keys, values = self.attention.project(self.normed(hidden))
            keys = keys if self.attention.k_norm is None else self.attention.k_norm(keys)
            hidden = columns.lend(hidden, self.index, keys, values)
        self._slot.attention = attention
        try:
            result: Tensor = self._module(states, position_embeddings=None, **more)
        finally:
            # It may hold the layer, and a cycle would keep the weights until Python looks for one.
            del self._slot.attention
            if isinstance(stages, BorrowingAttention):
                stages.lent = None
        if columns.width == columns.hidden:
            return result
        return torch.cat((result, hidden[..., columns.hidden :]), dim=-1)

    def normed(self, hidden: Tensor) -> Tensor:
        """What the attention is given of `hidden [B, T, width]`, `[B, T, hidden]`."""
        result: Tensor = self._module.input_layernorm(self.columns.states(hidden))
        return result

    @torch.inference_mode()
    def run(self, hidden: Tensor, attention: Attention, batch: int = BATCH) -> None:
        """Takes `hidden [N, T, width]` through the layer, in place, `batch` windows at a time.

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
        columns: What the hidden states of the stream hold.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
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
        self._model = empty_model(self.config)
        self._model.eval()
        if self._model.lm_head.bias is not None:
            raise UnsupportedModelError(f"{checkpoint.source} has an output head with a bias")
        embedding = self._model.model.embed_tokens  # Gemma's has a factor of its own
        own = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.embedding_factor = own * embedding_factor(self.config)
        self.finish = finish_of(self.config)
        self._own_inputs = hasattr(self._model.model, "embed_tokens_per_layer")
        self.columns = Columns.of(self.layouts, ids=self._own_inputs)
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
        for name in stored.keys() - needed.keys() - {"lm_head.weight"}:
            if not self._passed_over(name):
                raise CheckpointError(
                    f"{path} has a tensor {name}, which its config has no use for."
                )

    def _passed_over(self, name: str) -> bool:
        """Whether transformers has no use for a tensor either, such as of layers that predict
        several tokens, or keys and values of a layer that reads those of another.
        """
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        return name.endswith(IGNORED) or any(re.search(x, name) for x in ignored)

    def __len__(self) -> int:
        return len(self.layouts)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[N, T]` to what the first layer is given, `[N, T, width]`, fp32."""
        table = self.checkpoint.read("model.embed_tokens.weight")
        rows = len(table)
        if self._own_inputs:
            rows = min(rows, self.checkpoint.tensors[_OWN_TABLE].shape[0])
        if int(ids.max()) >= rows:
            raise CheckpointError(
                f"{self.checkpoint.path}: its tokenizer gives id {int(ids.max())}, its embedding "
                f"has {rows} rows."
            )
        return self.columns.first(table[ids].float() * self.embedding_factor, ids)

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
        prefix = f"model.layers.{index}."
        used = {k: w.float() for k, w in weights.items() if not self._passed_over(prefix + k)}
        fresh.load_state_dict(stacked(used, fresh.state_dict()), assign=True)
        own_input = self._own_input(index) if self._own_inputs else None
        return StreamedLayer(index, fresh, self.columns, own_input)

    def _own_input(self, index: int) -> OwnInput:
        """Tables are mapped, so that what is read of them are the rows of the tokens at hand."""
        size, read = self.config.hidden_size_per_layer_input, self.checkpoint.read
        own = slice(index * size, (index + 1) * size)
        tables = read("model.embed_tokens.weight"), read(_OWN_TABLE)[:, own]
        project = read("model.per_layer_model_projection.weight")[own].float()
        norm = self._norm("per_layer_projection_norm")
        return OwnInput(tables, self.embedding_factor, project, norm)

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
        """Final norm and output head: `[..., width]` to `[..., vocabulary]`, fp32."""
        tied = self.config.tie_word_embeddings
        head = self.checkpoint.read("model.embed_tokens.weight" if tied else "lm_head.weight")
        normed = self.final_norm()(self.columns.states(hidden))
        return self.finish(normed @ head.float().T)

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, fp32."""
        return self._norm("norm")

    def _norm(self, name: str) -> nn.Module:
        """A norm beside the layers."""
        own = getattr(self._model.model, name)
        fresh: nn.Module = copy.deepcopy(own).requires_grad_(False)
        weights = self.checkpoint.read_prefix(f"model.{name}.")
        fresh.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)
        return fresh
