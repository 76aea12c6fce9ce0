"""The attention modules that take the place of transformers' own inside the host model.

Each is called by the host's decoder layer exactly as the module it replaces; the store and the
positions come in as its cache, a :class:`Step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool._transformers import cache_argument
from kvtool.attention import GroupedQueryAttention
from kvtool.factors import input_of
from kvtool.kernels.grouped_linear import grouped_linear
from kvtool.kernels.linear import linear, pack, packed_linear
from kvtool.latent import LatentAttention
from kvtool.rope import Rope, rotate
from kvtool.runtime.pages import WIDEST, PagedHeads, PagedLatents, Pages, Place
from kvtool.runtime.stores import DenseStore, KVHeads, LatentStore, Seen, Store
from kvtool.windows import WindowPlan


class DecodeLinear(nn.Linear):
    """A linear layer of the host model that is as fast for few tokens as memory allows."""

    packed: Tensor | None = None

    @classmethod
    def replace_in(cls, model: nn.Module) -> None:
        """Puts one in the place of every plain linear layer, sharing its weights."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    fast = cls(1, 1, bias=False, device="meta")
                    fast.weight = child.weight
                    fast.register_parameter("bias", child.bias)
                    fast.in_features, fast.out_features = child.in_features, child.out_features
                    setattr(parent, name, fast)

    @classmethod
    def pack_in(cls, model: nn.Module) -> None:
        """Packs the weights of all such layers, where there is a kernel for it.

        The original is let go, except where the embedding uses it as well.
        """
        for layer in model.modules():
            if isinstance(layer, cls) and layer.packed is None:
                layer.packed = pack(layer.weight)
                if layer.packed is not None:
                    empty = layer.weight.new_empty(0)
                    layer.weight = nn.Parameter(empty, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        return linear(x, self.weight, self.bias)


@dataclass
class Step:
    """One call of the model: which rows, at which positions, into which stores.

    Attributes:
        stores: One per layer.
        row: The single row being prefilled, or `None` when all rows take one token.
        starts: Tokens already stored, per row in the call.
        lengths: The same after this call.
        prompt: Tokens of the row's prompt, of which this call is a piece; `None` for later tokens.
        tables: Cos and sin `[B, T, d]` per distinct RoPE of the model.
        place: Where a step of a paged memory reads and writes; `starts` and `lengths` are empty.
        inputs: What each layer is given of the tokens themselves, `[B, T, L, P]`; None in models
            without such inputs.
        seen: By layer that others read, what the tokens of a row see of it and its store may have
            no more when they read it: see :meth:`Store.seen_by`.
        positions: Of the tokens, `[B, T]`.
    """

    stores: Sequence[Any]
    row: int | None
    starts: Sequence[int]
    lengths: Sequence[int]
    prompt: int | None = None
    tables: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    place: Place | None = None
    inputs: Tensor | None = None
    seen: dict[int, Seen] = field(default_factory=dict)
    positions: Tensor = field(kw_only=True)

    def last(self) -> Step:
        """Of one row: for its last token alone, whose layers store nothing."""
        tables = [(cos[:, -1:], sin[:, -1:]) for cos, sin in self.tables]
        inputs = None if self.inputs is None else self.inputs[:, -1:]
        starts, positions = [n - 1 for n in self.lengths], self.positions[:, -1:]
        return replace(self, tables=tables, inputs=inputs, starts=starts, positions=positions)


class NewTokens(NamedTuple):
    """What some heads make of the tokens of a call.

    Attributes:
        q, unrotated: `[B, Q, T, D]`, the queries after and before RoPE.
        k, v: `[B, H, T, D]`, rotated keys, and values.
    """

    q: Tensor
    unrotated: Tensor
    k: Tensor
    v: Tensor

    def split(self, counts: Sequence[int]) -> list[NewTokens]:
        """The same by consecutive groups of `counts[i]` KV heads."""
        heads = self.k.shape[1]
        parts = [x.split([n * x.shape[1] // heads for n in counts], dim=1) for x in self]
        return [NewTokens(*part) for part in zip(*parts, strict=True)]


class RuntimeAttention(nn.Module):
    """An attention module that reads and writes a store.

    Attributes:
        rope: Of this layer.
        table: Which of the step's RoPE tables belongs to this layer.
        window: What a row of its store grows to, where the model sees no more.
        most_tokens: Of a row, in one call that does not read a dense prompt; `None` for any.
    """

    rope: Rope
    table: int = 0
    window: WindowPlan | None = None
    most_tokens: int | None = None

    def new_store(self, rows: int, capacity: int) -> Store:
        """An empty store for this layer."""
        raise NotImplementedError  # pragma: no cover

    def new_paged_store(self, pages: Pages) -> Any:
        """The same in shared pages; None where a layer has no such store."""
        return None

    def attention(self, hidden: Tensor, step: Step, store: Any) -> Tensor:
        """`[B, T, hidden]` to `[B, T, hidden]`, storing the new tokens on the way."""
        raise NotImplementedError  # pragma: no cover

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        """The signature under which transformers' decoder layers call their attention."""
        step: Step = given[cache_argument()]
        return self.attention(hidden_states, step, step.stores[self.layer_index]), None

    layer_index: int


def through(layer: Any, hidden: Tensor, step: Step) -> Tensor:
    """Hidden states `[B, T, hidden]` through a decoder layer of the host that has such a module."""
    own = {cache_argument(): step, **input_of(step.inputs, layer)}
    result: Tensor = layer(hidden, position_embeddings=None, **own)
    return result


def step_of(store: Any, q: Tensor, k: Tensor, v: Tensor, step: Step, table: int) -> Tensor:
    """What one new token per row reads of a paged store, `[B, Q, 1, D]`.

    Args:
        q, k, v: `[B, Q or H, 1, D]`, before RoPE.
        table: Which of the step's RoPE tables is the layer's.
    """
    cos, sin = (x[:, 0] for x in step.tables[table])
    context: Tensor = store.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], cos, sin, step.place)
    return context[:, :, None]


class GroupedAttention(RuntimeAttention):
    """Grouped-query attention, over whatever store."""

    def __init__(self, stages: GroupedQueryAttention, index: int, rope: Rope) -> None:
        super().__init__()
        self.stages, self.layer_index = stages, index
        self.rope = rope

    def heads(self, first: int = 0, count: int | None = None) -> KVHeads:
        """So many of them from `first` on; without `count`, all."""
        stages, layout = self.stages, self.stages.layout
        count = layout.kv_heads if count is None else count
        like = stages.qkv.weight.new_empty(0)  # not the weight: packing lets go of that
        logits = stages.sink_logits_of(first, count)
        return KVHeads(count, layout.head_dim, like, layout.scaling, logits)

    def attention(self, hidden: Tensor, step: Step, store: Any) -> Tensor:
        stages = self.stages
        q, k, v = stages.project(hidden)
        q, k = stages.normalise(q, k)
        unrotated = stages.temper(q, step.positions)
        if step.place is not None:
            return stages.output(step_of(store, unrotated, k, v, step, self.table), hidden)
        cos, sin = (table[:, None] for table in step.tables[self.table])
        q, k = stages.rotate(unrotated, k, cos, sin)
        return stages.output(self.read(NewTokens(q, unrotated, k, v), step, store), hidden)

    def read(self, new: NewTokens, step: Step, store: Any) -> Tensor:
        """What new tokens read of a store that they are added to, `[B, Q, T, D]`."""
        lends = self.stages.layout.read and step.row is not None
        if lends and (seen := store.seen_by(new, step)) is not None:
            step.seen[self.layer_index] = seen
        context: Tensor = store.add(new, step)
        return context


class DenseAttention(GroupedAttention):
    """Grouped-query attention over a dense store."""

    def new_store(self, rows: int, capacity: int) -> DenseStore:
        return DenseStore(self.heads(), rows, capacity)

    def new_paged_store(self, pages: Pages) -> PagedHeads:
        return PagedHeads(self.heads(), pages)

    def read(self, new: NewTokens, step: Step, store: DenseStore | PagedHeads) -> Tensor:
        store.write(step.row, step.starts, {"keys": new.k, "values": new.v})
        return store.attend(new.q, step.row, step.lengths)


class LatentRuntimeAttention(RuntimeAttention):
    """Latent attention over a latent store: absorbed for one new token, expanded for many."""

    def __init__(self, stages: LatentAttention, index: int, scale: float) -> None:
        super().__init__()
        self.stages, self.layer_index = stages, index
        self.rope = Rope(stages.inv_freq, scale)
        # Absorption multiplies by these at every step: the group axis goes first for `bmm`.
        self.absorb_query = stages.absorb()  # [G, d_q, r + d_r]
        self.absorb_value = stages.value_up.transpose(1, 2).contiguous()  # [G, r, d_v]
        # Where a rotated query goes behind the absorbed one.
        self.rotated: slice | Tensor = slice(stages.rank, None)

    def new_store(self, rows: int, capacity: int) -> LatentStore:
        stages = self.stages
        like = stages.value_up
        return LatentStore(rows, capacity, stages.rank, stages.rope_dim, like, stages.scaling)

    def new_paged_store(self, pages: Pages) -> PagedLatents | None:
        stages = self.stages
        if stages.rank > WIDEST:
            return None
        return PagedLatents(pages, stages.rank, stages.rope_dim, stages.value_up, stages.scaling)

    def attention(self, hidden: Tensor, step: Step, store: LatentStore | PagedLatents) -> Tensor:
        stages = self.stages
        q, c, k_pe = stages.query_and_compress(hidden)
        cos, sin = step.tables[self.table]
        if step.place is not None:
            assert isinstance(store, PagedLatents)
            asked, c, k_pe, cos, sin = (x[:, 0] for x in (q, c, k_pe, cos, sin))
            asked = grouped_linear(asked, self.absorb_query)
            context = store.step(asked, c, k_pe, cos, sin, step.place)
            return stages.output(grouped_linear(context, self.absorb_value)[:, None])
        states = torch.cat((c, rotate(k_pe, cos, sin)), dim=-1)
        store.write(step.row, step.starts, {"latents": states})
        if hidden.shape[1] == 1 and not isinstance(store, PagedLatents):
            attend = partial(store.attend, row=step.row, lengths=step.lengths)
            return stages.output(self._absorbed(q[:, 0], cos, sin, attend))
        latents = store.gather("latents", step.row or 0, 0, step.lengths[0])
        c, k_pe = latents.split([stages.rank, stages.rope_dim], dim=-1)
        return stages.output(stages.attend_expanded(q, c, k_pe, cos, sin))

    def _absorbed(
        self, q: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One query per row, `[B, Q, d_q]`: into latent space, attend there, and back.

        Returns:
            `[B, 1, Q, d_v]`.
        """
        rank = self.stages.rank
        absorbed = grouped_linear(q, self.absorb_query)
        absorbed[..., self.rotated] = rotate(absorbed[..., rank:], cos, sin)
        return grouped_linear(attend(absorbed), self.absorb_value)[:, None]
