"""A model in memory that reads a context once and the tokens behind it many times.

What streaming a head does to the recall of a long context shows in the tail alone where the context
was read densely, so every trial costs a forward pass over some dozens of tokens and not over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tasks import RecallSample
from kvtool.divergence import kl_divergence
from kvtool.errors import CheckpointError
from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.mamba import Past
from kvtool.plan_file import Prefill

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Queries `[B, Q, M, D]` from position `start` on, keys and values `[B, H, start + M, D]`, and
`start`; returns `[B, Q, M, D]`."""


@dataclass(frozen=True)
class Window:
    """A streaming head sees the first `sink` tokens and the last `window`, itself included."""

    sink: int
    window: int


@dataclass(frozen=True)
class Behind:
    """Tokens behind a context that a model has read.

    Attributes:
        keys, values: Per layer `[1, H, C, D]` of the context, keys rotated; C may be 0, and is in
            layers with a state.
        ids: `[M]`, the tokens behind the context.
        offset: Position of the context's first token.
        states: What layers with a state remember of the context.
    """

    keys: list[Tensor]
    values: list[Tensor]
    ids: Tensor
    offset: int = field(default=0, kw_only=True)
    states: dict[int, Past] = field(default_factory=dict, kw_only=True)

    @property
    def start(self) -> int:
        """Tokens of the context."""
        return max((x.shape[2] for x in self.keys), default=0)


@dataclass(frozen=True)
class Reading(Behind):
    """A recall sample as a model has read it.

    Where the policy is to stream from the first token, C is 0 and `ids` the whole sample.

    Attributes:
        answers: `[A]`, where in `ids` the tokens to be recalled are.
        sample: The sample itself.
    """

    answers: Tensor
    sample: RecallSample


class TailModel:
    """All layers of a checkpoint whose layers have KV heads or a state, fp32.

    Attributes:
        planned_layers: Those that see the whole past.
    """

    def __init__(self, stream: LayerStream, device: str = "cpu") -> None:
        checkpoint = stream.checkpoint
        self.device = torch.device(device)
        self.layouts = stream.layouts
        self.planned_layers = [i for i, layout in enumerate(self.layouts) if layout.sees_all]
        self.layers = [stream.layer(i).to(self.device) for i in range(len(stream))]
        self.ropes = [rope.to(self.device) for rope in stream.ropes]
        self.norm = stream.final_norm().to(self.device)
        self.table = checkpoint.read("model.embed_tokens.weight").float().to(self.device)
        self.head = self.table
        if not stream.config.tie_word_embeddings:
            self.head = checkpoint.read("lm_head.weight").float().to(self.device)
        self.embedding_factor = stream.embedding_factor
        self.finish_logits, self.columns = stream.finish, stream.columns

    def embed(self, ids: Tensor) -> Tensor:
        """`[M]` to `[1, M, width]`, see `Columns`.

        Raises:
            CheckpointError: The tokenizer knows more tokens than the embedding.
        """
        if len(ids) and int(ids.max()) >= len(self.table):
            raise CheckpointError(
                f"the tokenizer gives id {int(ids.max())}, the embedding has {len(self.table)} rows"
            )
        ids = ids.to(self.device)[None]
        return self.columns.first(self.table[ids] * self.embedding_factor, ids)

    @torch.no_grad()
    def read(self, sample: RecallSample, prefill: Prefill = "dense") -> Reading:
        """Reads the context of a sample, densely, or leaves it to be streamed with the tail."""
        context, ids, answers = sample.context, sample.tail, sample.answers
        if prefill == "streamed":
            ids, answers = torch.cat((context, ids)), answers + len(context)
            context = context[:0]
        keys, values = self.nothing(), self.nothing()
        states: dict[int, Past] = {}
        hidden = self.embed(context)
        for index, layer in enumerate(self.layers):
            if not len(context):
                continue

            def remember(q: Tensor, k: Tensor, v: Tensor, start: int, index: int = index) -> Tensor:
                keys[index], values[index] = k.contiguous(), v.contiguous()
                return self.dense(index)(q, k, v, start)

            if layer.mixer is not None:
                hidden, states[index] = self.mix(index, hidden)
            else:
                hidden = self.layer(index, hidden, None, remember)
        where = ids.to(self.device), answers.to(self.device)
        return Reading(keys, values, *where, sample, states=states)

    def layer(self, index: int, hidden: Tensor, reading: Behind | None, attend: Attend) -> Tensor:
        """Hidden states `[B, M, width]` behind a context through one layer; differentiable."""
        layer = self.layers[index]
        if layer.mixer is not None:
            past = None if reading is None else reading.states.get(index)
            return self.mix(index, hidden, past)[0]
        stages = layer.attention
        start = 0 if reading is None else reading.start
        first = start + (0 if reading is None else reading.offset)
        positions = torch.arange(first, first + hidden.shape[1], device=self.device)
        cos, sin = self.ropes[index].tables(positions)

        def attention(normed: Tensor) -> Tensor:
            q, k, v = stages.project(normed)
            q, k = stages.normalise(q, k)
            q, k = stages.rotate(stages.temper(q, positions), k, cos, sin)
            if start and reading is not None:
                rows = (len(hidden), -1, -1, -1)
                k = torch.cat((reading.keys[index].expand(rows), k), dim=2)
                v = torch.cat((reading.values[index].expand(rows), v), dim=2)
            return stages.output(attend(q, k, v, start), normed)

        return layer(hidden, attention)

    def mix(self, index: int, hidden: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The same through a layer with a state behind a past, and the past behind it."""
        layer, after = self.layers[index], []
        mixer = layer.mixer
        assert mixer is not None
        if past is not None:
            past = Past(*(x.expand(len(hidden), *x.shape[1:]) for x in past))

        def mix(normed: Tensor) -> Tensor:
            output, behind = mixer.mix(normed, past)
            after.append(behind)
            return output

        return layer(hidden, mix), after[0]

    def nothing(self) -> list[Tensor]:
        """Keys, or values, of no token in all layers."""
        return [self.table.new_empty(1, 1, 0, 1)] * len(self.layers)

    def dense(self, index: int, heads: slice = slice(None)) -> Attend:
        """The layer's own attention, of some query heads."""
        layout, logits = self.layouts[index], self.sink_logits(index, heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            return causal_attention(q, k, v, layout.scaling, layout.sliding_window, logits)

        return attend

    def sink_logits(self, index: int, heads: slice = slice(None)) -> Tensor | None:
        """Of some query heads, `[Q]`, see `kernels/sink_logits`; None of a layer without them."""
        layer = self.layers[index]
        logits = layer.attention.sink_logits if layer.mixer is None else None
        return None if logits is None else logits[heads]

    def streamed(self, index: int, window: Window, heads: slice = slice(None)) -> Attend:
        """Some query heads of the layer see sinks and a window only."""
        scaling, logits = self.layouts[index].scaling, self.sink_logits(index, heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            ring = window.sink, window.window
            return streaming_attention(q, k, v, *ring, scaling, start, sink_logits=logits)

        return attend

    def split(self, index: int, streaming: Tensor, window: Window) -> Attend:
        """Heads marked in `streaming [H]` (bool) see sinks and a window, the others everything."""
        group = self.layouts[index].heads // self.layouts[index].kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            parts = []
            for head, streams in enumerate(streaming.tolist()):
                own = slice(head * group, (head + 1) * group)
                one = self.streamed(index, window, own) if streams else self.dense(index, own)
                parts.append(one(q[:, own], k[:, head, None], v[:, head, None], start))
            return torch.cat(parts, dim=1)

        return attend

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm of `[..., width]`, `[..., hidden]`."""
        normed: Tensor = self.norm(self.columns.states(hidden))
        return normed

    def log_probabilities(self, hidden: Tensor, reading: Reading) -> Tensor:
        """Of the whole vocabulary at every token to be recalled.

        Args:
            hidden: `[B, M, width]` behind the last layer.

        Returns:
            `[B, A, V]` fp32.
        """
        return self.predictions(hidden[:, reading.answers - 1])

    def predictions(self, hidden: Tensor) -> Tensor:
        """Log-probabilities `[B, M, V]` fp32 behind `hidden [B, M, width]` of the last layer."""
        logits = self.finish_logits(self.finish(hidden) @ self.head.T)
        return torch.log_softmax(logits, dim=-1)

    @torch.no_grad()
    def recall(self, reading: Reading, streaming: Tensor, window: Window) -> Tensor:
        """`log_probabilities` `[A, V]` with the heads in `streaming [L, H]` (bool) streaming."""
        hidden = self.embed(reading.ids)
        for index, heads in enumerate(streaming):
            attend = self.split(index, heads, window) if heads.any() else self.dense(index)
            hidden = self.layer(index, hidden, reading, attend)
        return self.log_probabilities(hidden, reading)[0]


def divergence(original: Tensor, other: Tensor) -> Tensor:
    """Mean KL(original || other) in nats over the tokens of log-probabilities `[..., A, V]`."""
    return kl_divergence(original, other).mean(-1)
