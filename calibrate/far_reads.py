"""How the predictions at the end of a text change with what far tokens have left in the cache.

The model, of layers of any kind, is in memory as transformers makes it, fp32, and a reader stands
in the place of each attention module or mixer. What the gradients are for is in `felt.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.attention import (
    BorrowingAttention,
    GroupedQueryAttention,
    causal_attention,
    grouped_attention,
)
from kvtool.checkpoint import Checkpoint
from kvtool.delta_net import DeltaNet
from kvtool.errors import CalibrationError
from kvtool.factored import is_factored, latent_stages, load_model, model_config
from kvtool.factors import embedding_factor, finish_of, input_of, layer_inputs
from kvtool.kernels.sink_logits import softmax
from kvtool.latent import LatentAttention
from kvtool.layout import decoder_layers, mixer_of, put_in
from kvtool.mamba import Mixer, Past
from kvtool.rope import Rope, ropes_of, rotate

END = 256
"""Tokens at the end of each window whose predictions are looked at."""

Kept = tuple[Tensor, ...]
"""What a layer keeps of the tokens of a window, `[1, H, S, ·]` each: rotated keys and values; or a
latent with its rotated shared key, H being 1; or nothing, where that is a state."""


class Reads(NamedTuple):
    """A window.

    Attributes:
        seen: What each layer keeps of its tokens.
        felt: The gradients of far reads of that, summed over predictions.
        predictions: How many there are.
    """

    seen: list[Kept]
    felt: list[Kept]
    predictions: int


class FarRead(torch.autograd.Function):
    """Attention whose backward pass keeps apart how far tokens were read.

    `far_keys` and `far_values` are zeros of the shape of keys and values; they get the gradients of
    all reads of tokens that are neither sinks nor in the window, and `k` and `v` the others.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, far_values: Tensor,
        scaling: float, sink: int, window: int, sink_logits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`q [1, Q, M, D]`, `k`, `v` `[1, H, S, D]`; the queries are those of the last tokens.

        What the logits hold of the attention reads no value: weights are all that a gradient needs.
        """
        grouped = q.unflatten(1, (k.shape[1], -1))
        distance = _distance(q, k)
        scores = (grouped @ k[:, :, None].mT).mul_(scaling)
        weights = softmax(scores.masked_fill_(distance < 0, -torch.inf), sink_logits, first=1)
        ctx.save_for_backward(grouped, k, v, weights)
        ctx.options = (scaling, sink, window)
        context: Tensor = (weights @ v[:, :, None]).flatten(1, 2)
        return context

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        q, k, v, weights = ctx.saved_tensors  # [1, H, g, M, D], ..., [1, H, g, M, S]
        scaling, sink, window = ctx.options
        upper = gradient.unflatten(1, (k.shape[1], -1))
        changes = upper @ v[:, :, None].mT
        changes = changes.sub_((changes * weights).sum(dim=-1, keepdim=True)).mul_(weights)
        changes.mul_(scaling)
        keys, values = ((x.mT @ y).sum(dim=2) for x, y in ((changes, q), (weights, upper)))
        # Behind the sinks and before the windows of all queries every read is far.
        near = _distance(q, k) < window
        late = max(sink, k.shape[2] - q.shape[-2] - window + 1)
        near_keys, near_values = torch.zeros_like(keys), torch.zeros_like(values)
        near_keys[:, :, :sink], near_values[:, :, :sink] = keys[:, :, :sink], values[:, :, :sink]
        for into, x, y in ((near_keys, changes, q), (near_values, weights, upper)):
            into[:, :, late:] = ((x * near)[..., late:].mT @ y).sum(dim=2)
        queries = (changes @ k[:, :, None]).flatten(1, 2)
        far = (keys - near_keys, values - near_values)
        return queries, near_keys, near_values, *far, None, None, None, None


def _distance(q: Tensor, k: Tensor) -> Tensor:
    """`[M, S]`, how far each key lies behind each query."""
    at = torch.arange(k.shape[2], device=k.device)
    return at[k.shape[2] - q.shape[-2] :, None] - at


class _Now:
    """The pass that the readers are in: positions `[T]` of its tokens, and the ring behind which
    reads are watched, None while the past is read. Where they are asked for, Δ of the layers of
    Mamba-2 so far.
    """

    positions: Tensor
    ring: tuple[int, int] | None
    steps: list[Tensor] | None = None


class _Reader(nn.Module):
    """Stands where a decoder layer expects its attention or its mixer.

    Attributes:
        seen: What the layer keeps of all tokens so far.
        far: Zeros of the same shapes, which far reads are differentiated by.
    """

    seen: Kept = ()
    far: Kept = ()

    def __init__(self, now: _Now, rope: Rope) -> None:
        super().__init__()
        self.now, self.rope = now, rope

    def tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of the tokens of the pass, `[T, d]`."""
        return self.rope.tables(self.now.positions)

    def take(self, *new: Tensor) -> Kept:
        """All tokens, the new ones behind the others."""
        past = self.seen or tuple(x[:, :, :0] for x in new)
        kept = tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        self.seen = tuple(x.detach() for x in kept)
        if self.now.ring is not None:
            self.far = tuple(torch.zeros_like(x).requires_grad_() for x in self.seen)
        return kept


class _Heads(_Reader):
    """Of a layer with KV heads.

    Attributes:
        kept: Keys and values that the tokens of the pass see.
    """

    kept: Kept = ()

    def __init__(self, stages: GroupedQueryAttention, now: _Now, rope: Rope) -> None:
        super().__init__(now, rope)
        self.stages = stages

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        stages = self.stages
        q, k, v = stages.project(hidden_states)
        q, k = stages.normalise(q, k)
        q, k = stages.rotate(stages.temper(q, self.now.positions), k, *self.tables())
        self.kept = self.take(k, v)
        return stages.output(self.read(q), hidden_states), None

    def take(self, *new: Tensor) -> Kept:
        if (window := self.stages.layout.sliding_window) is None:
            return super().take(*new)
        past = self.seen or tuple(x[:, :, :0] for x in new)  # there are no far reads
        kept = tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        self.seen = tuple(x[:, :, -window:].detach() for x in kept)
        return kept

    def read(self, q: Tensor) -> Tensor:
        """What rotated queries of the tokens just taken read, `[1, Q, T, D]`."""
        layout, logits, (keys, values) = self.stages.layout, self.stages.sink_logits, self.kept
        if layout.sliding_window is not None or self.now.ring is None:
            scaling, window = layout.scaling, layout.sliding_window
            return causal_attention(q, keys, values, scaling, window, logits)
        read: Tensor = FarRead.apply(  # type: ignore[no-untyped-call]
            q, keys, values, *self.far, layout.scaling, *self.now.ring, logits
        )
        return read


class _Borrowing(_Reader):
    """Of a layer that reads what an earlier one keeps."""

    def __init__(self, stages: BorrowingAttention, lender: _Heads, now: _Now, rope: Rope) -> None:
        super().__init__(now, rope)
        self.stages, self.lender = stages, (lender,)  # no module of this one

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q = rotate(self.stages.queries(hidden_states), *self.tables())
        return self.stages.output(self.lender[0].read(q), hidden_states), None


class _Latent(_Reader):
    def __init__(self, stages: LatentAttention, now: _Now, rope: Rope) -> None:
        super().__init__(now, rope)
        self.stages = stages

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        stages, (cos, sin) = self.stages, self.tables()
        q, c, k_pe = stages.query_and_compress(hidden_states)
        (kept,) = self.take(torch.cat((c, rotate(k_pe, cos, sin)), dim=-1)[:, None])
        q = stages.expand_query(q, cos, sin)
        keys, values = self._expanded(kept)
        if self.now.ring is None:
            read = causal_attention(q, keys, values, stages.scaling)
        else:
            far = self._expanded(self.far[0])
            read = FarRead.apply(  # type: ignore[no-untyped-call]
                q, keys, values, *far, stages.scaling, *self.now.ring
            )
        return stages.output(read.transpose(1, 2)), None

    def _expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.stages.expand(
            *latents[:, 0].split([self.stages.rank, self.stages.rope_dim], -1)
        )


class _State(_Reader):
    past: Past | None = None

    def __init__(self, stages: Mixer | DeltaNet, now: _Now, rope: Rope) -> None:
        super().__init__(now, rope)
        self.stages = stages

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if self.now.steps is not None and isinstance(self.stages, Mixer):
            self.now.steps.append(self.stages.steps(self.stages.project(hidden_states)[1].dt)[0])
        output, past = self.stages.mix(hidden_states, self.past)
        self.past = Past(*(x.detach() for x in past))
        return output


class WholeModel:
    """A checkpoint whose layers have KV heads, a latent or a state.

    Attributes:
        shapes: Of a latent layer r and d_r, and None of others.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = model_config(checkpoint)
        self.ropes = ropes_of(self.config)
        self.model = load_model(checkpoint, torch.float32).requires_grad_(False)
        self.shapes: list[tuple[int, int] | None] = []
        factors_in = checkpoint if is_factored(checkpoint) else None
        self._now = _Now()
        self._readers: list[_Reader] = []
        layers = zip(decoder_layers(self.model), self.ropes, strict=True)
        for index, (layer, rope) in enumerate(layers):
            self.shapes.append(None)
            if (mixer := mixer_of(layer)) is not None:
                self._readers.append(_State(mixer, self._now, rope))
                put_in(layer, self._readers[-1])
                continue
            module, name = layer.self_attn, f"model.layers.{index}.self_attn"
            latent = latent_stages(module, name, rope.inv_freq, factors_in, index)
            if latent is None:
                layer.self_attn = self._heads(grouped_attention(module, name), rope)
            else:
                self.shapes[-1] = latent.rank, latent.rope_dim
                layer.self_attn = _Latent(latent, self._now, rope)
            self._readers.append(layer.self_attn)

    def _heads(self, stages: GroupedQueryAttention, rope: Rope) -> _Reader:
        if not isinstance(stages, BorrowingAttention):
            return _Heads(stages, self._now, rope)
        assert stages.layout.reads is not None
        lender = self._readers[stages.layout.reads]
        assert isinstance(lender, _Heads)
        return _Borrowing(stages, lender, self._now, rope)

    def far_reads(
        self, windows: Tensor, offsets: Sequence[int], ring: tuple[int, int], seed: int
    ) -> Iterator[Reads]:
        """What all layers keep of each window, and what its predictions feel of it.

        The last tokens of a window read the others as they are, so only they are differentiated.

        Args:
            windows: `[N, S]` token ids.
            offsets: The position at which each begins.
            ring: Sink and window of the tokens whose reads are not watched.
            seed: Draws the tokens whose probability is differentiated, from the predictions.

        Raises:
            CalibrationError: A prediction is no number, or a gradient is not finite.
        """
        end = min(END, windows.shape[1] // 2)
        generator = torch.Generator().manual_seed(seed)
        for ids, offset in zip(windows, offsets, strict=True):
            yield self._window(ids, offset, end, ring, generator)

    @torch.no_grad()
    def steps(self, ids: Tensor, offset: int) -> list[Tensor]:
        """Δ `[T, H]` of the tokens of a window, of every layer of Mamba-2."""
        self._start()
        found: list[Tensor] = []
        self._now.steps = found
        self._hidden(ids, offset)
        self._now.steps = None
        return found

    def rates(self) -> list[Tensor]:
        """A `[H]` of the same layers."""
        stages = [reader.stages for reader in self._readers if isinstance(reader, _State)]
        return [one.decay.detach() for one in stages if isinstance(one, Mixer)]

    def _start(self) -> None:
        for reader in self._readers:
            reader.seen, reader.far = (), ()
            if isinstance(reader, _State):
                reader.past = None
        self._now.ring = None

    def _window(
        self, ids: Tensor, offset: int, end: int, ring: tuple[int, int], generator: torch.Generator
    ) -> Reads:
        self._start()
        with torch.no_grad():
            self._hidden(ids[:-end], offset)
        self._now.ring = ring
        hidden = self._hidden(ids[-end:], offset + len(ids) - end)
        logits = self.model.lm_head(self.model.model.norm(hidden))[0].float()
        said = finish_of(self.config)(logits).log_softmax(-1)
        if said.isnan().any():
            raise CalibrationError("the model's predictions are not all numbers")
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        far = [x for reader in self._readers for x in reader.far]
        felt = iter(torch.autograd.grad(said.gather(1, drawn).sum(), far))
        by_layer = [tuple(next(felt) for _ in reader.far) for reader in self._readers]
        if not all(bool(x.isfinite().all()) for layer in by_layer for x in layer):
            raise CalibrationError("the model's gradients are not all finite numbers")
        return Reads([reader.seen for reader in self._readers], by_layer, end)

    def _hidden(self, ids: Tensor, start: int) -> Tensor:
        """Final hidden states `[1, T, hidden]` in front of the last norm."""
        self._now.positions = torch.arange(start, start + len(ids))
        hidden: Tensor = self.model.model.embed_tokens(ids[None])
        hidden = hidden * embedding_factor(self.config)
        inputs = layer_inputs(self.model, ids[None], hidden)
        for layer in decoder_layers(self.model):
            hidden = layer(hidden, position_embeddings=None, **input_of(inputs, layer))
        return hidden
