"""Grouped-query attention of any family as stages: project, normalise, rotate, attend, output.

What a module computes is said by its layout (`kvtool.layout`); what is particular to a family ends
in the weights held here. The stages of MLA are those of `kvtool.latent`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.layout import GATES, INTERLEAVED, borrows, recognise
from kvtool.rope import Rope, channel_order, rotate


class GroupedQueryAttention(nn.Module):
    """The stages of a GQA attention module, sharing its weights.

    Q query heads, H KV heads, head size D; hidden states are `[B, T, hidden]`.

    Attributes:
        sink_logits: `[Q]`, one logit of each head that joins its softmax and has no value; None
            where there are none.
    """

    turned: Tensor | None
    sink_logits: Tensor | None

    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        self.layout = recognise(module, name)
        self.name = name
        interleaved = module.config.model_type in INTERLEAVED
        self._order = channel_order(self.layout.head_dim, self.layout.rotary_dim, interleaved)
        turned = None
        if self.layout.turned_scale != 1:
            turned = module.o_proj.weight.new_ones(self.layout.head_dim)
            turned[: self.layout.rotary_dim] = self.layout.turned_scale
            turned = self._in_order(turned)
        self.register_buffer("turned", turned, persistent=False)
        self._own_gate = GATES.get(module.config.model_type)
        self.gate = self._gate(module) if self.layout.gated else None
        # One matrix for the three projections: a decode step is bound by the calls it makes. The
        # module's own weights become views of it, so nothing is held twice.
        self.sizes, weights, biases = self._projections(module)
        self.qkv = nn.Linear(1, 1, bias=False, device="meta")
        self.qkv.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        if self.layout.qkv_bias:
            self.qkv.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        parts = projections(module)
        rows = self.qkv.weight.split(self.sizes) if len(parts) > 1 else [self.qkv.weight]
        for part, own in zip(parts, rows, strict=True):
            part.weight = nn.Parameter(own, requires_grad=False)
        self.o_proj, self.v_norm = module.o_proj, getattr(module, "v_norm", None)
        self.sink_logits = getattr(module, "sinks", None)
        self.q_norm, self.k_norm = (
            self._in_order_of(getattr(module, x, None)) for x in ("q_norm", "k_norm")
        )

    def _projections(self, module: Any) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Rows, weights and biases for queries, keys and values, in the order of `_order`."""
        layout = self.layout
        sizes = [n * layout.head_dim for n in (layout.heads, layout.kv_heads, layout.kv_heads)]
        if hasattr(module, "qkv_proj"):
            found = [x.split(sizes) for x in module.qkv_proj.parameters()]
        else:
            parts: list[list[Tensor]] = [list(x.parameters()) for x in projections(module)]
            if layout.gated and self._own_gate is None:
                parts[0] = [self._halves(x)[0] for x in parts[0]]
            found = list(zip(*parts, strict=True))
        ordered = [[self._in_order(q), self._in_order(k), v] for q, k, v in found]
        return sizes, ordered[0], ordered[1] if layout.qkv_bias else []

    def _gate(self, module: Any) -> nn.Linear:
        """A module, or of every head the second half of its rows of `q_proj` (Qwen3-Next)."""
        if self._own_gate is not None:
            return getattr(module, self._own_gate)  # type: ignore[no-any-return]
        gate = nn.Linear(1, 1, bias=False, device="meta")
        for name, rows in module.q_proj.named_parameters():
            setattr(gate, name, nn.Parameter(self._halves(rows)[1], requires_grad=False))
        return gate

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of `[heads * 2 D, ...]` the first and the second D of every head."""
        by_head = rows.unflatten(0, (self.layout.heads, 2, self.layout.head_dim))
        return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)

    def _in_order(self, rows: Tensor) -> Tensor:
        """`[heads * D, ...]` with the channels of every head in the order of `_order`."""
        if self._order is None:
            return rows
        by_head = rows.unflatten(0, (-1, self.layout.head_dim))
        ordered: Tensor = by_head[:, self._order].flatten(0, 1)
        return ordered

    def _in_order_of(self, norm: Any) -> Any:
        """A q/k norm with its weight in that order."""
        if norm is None or self._order is None:
            return norm
        ordered = copy.deepcopy(norm)
        ordered.weight = nn.Parameter(self._in_order(norm.weight), requires_grad=False)
        return ordered

    @torch.no_grad()
    def reorder_kv_heads(self, order: Sequence[int]) -> None:
        """Puts KV head `order[i]`, and the query heads that read it, in place i.

        The layer computes what it did: the columns of `o_proj` follow their query heads.
        """
        layout = self.layout
        heads = torch.tensor(order, device=self.qkv.weight.device)
        group = layout.heads // layout.kv_heads
        q = _block_rows(_block_rows(heads, group), layout.head_dim)
        kv = _block_rows(heads, layout.head_dim)
        rows = torch.cat((q, self.sizes[0] + kv, self.sizes[0] + self.sizes[1] + kv))
        self.qkv.weight.copy_(self.qkv.weight[rows])
        if layout.qkv_bias:
            self.qkv.bias.copy_(self.qkv.bias[rows])
        self.o_proj.weight = nn.Parameter(self.o_proj.weight[:, q], requires_grad=False)
        if self.sink_logits is not None:
            logits = self.sink_logits[_block_rows(heads, group)]
            self.sink_logits = nn.Parameter(logits, requires_grad=False)
        for kind, rows in [] if self.gate is None else list(self.gate.named_parameters()):
            own = _block_rows(heads, group) if len(rows) == layout.heads else q
            setattr(self.gate, kind, nn.Parameter(rows[own], requires_grad=False))
        if layout.norm_over_heads:
            for norm, own in ((self.q_norm, q), (self.k_norm, kv)):
                assert norm is not None
                norm.weight = nn.Parameter(norm.weight[own], requires_grad=False)

    def sink_logits_of(self, start: int, count: int) -> Tensor | None:
        """Those of the query heads that read `count` KV heads from `start` on."""
        if self.sink_logits is None:
            return None
        group = self.layout.heads // self.layout.kv_heads
        return self.sink_logits[start * group : (start + count) * group]

    @torch.no_grad()
    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Puts copies of other weights in place of its own, where those are.

        Args:
            weights: By name, such as `k_proj.weight`. Keys and values may have fewer heads.
        """
        for norm, name in ((self.q_norm, "q_norm.weight"), (self.k_norm, "k_norm.weight")):
            if norm is not None and name in weights:
                copied = weights[name].to(norm.weight, copy=True)
                norm.weight = nn.Parameter(copied, requires_grad=False)
        names, sizes = ("q_proj", "k_proj", "v_proj"), self.sizes
        for kind, own in list(self.qkv.named_parameters()):
            parts = zip(names, own.split(sizes), strict=True)
            rows = [weights.get(f"{name}.{kind}", part).to(own) for name, part in parts]
            setattr(self.qkv, kind, nn.Parameter(torch.cat(rows), requires_grad=False))
            self.sizes = [len(part) for part in rows]
        for kind, own in list(self.o_proj.named_parameters()):
            copied = weights.get(f"o_proj.{kind}", own).to(own, copy=True)
            setattr(self.o_proj, kind, nn.Parameter(copied, requires_grad=False))
        kv_heads = self.sizes[1] // self.layout.head_dim
        self.layout = replace(self.layout, kv_heads=kv_heads)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, Q, T, D]` and keys `[B, H, T, D]`, before norm and RoPE, and values alike;
        those are normed already where a model norms them (Gemma 4).
        """
        split = self.qkv(hidden).split(self.sizes, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.layout.head_dim)).transpose(1, 2) for x in split)
        return q, k, v if self.v_norm is None else self.v_norm(v)

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the RMSNorm per head of Qwen3 or over all heads of OLMo 2, or none; and the scale
        of RoPE, where that turns a part of each head.
        """
        if self.q_norm is not None and self.k_norm is not None:
            if self.layout.norm_over_heads:
                q, k = _over_heads(self.q_norm, q), _over_heads(self.k_norm, k)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        return (q, k) if self.turned is None else (q * self.turned, k * self.turned)

    def temper(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries `[B, Q, T, D]` with the factor that some models give them by position.

        Args:
            positions: `[T]` or `[B, T]`.
        """
        if self.layout.temper is None:
            return q
        beta, length = self.layout.temper
        factor = 1 + beta * torch.log1p(positions // length)
        return q * factor[..., None, :, None].to(q.dtype)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys by tables `[B, 1, T, D]` (or broadcastable)."""
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Exact causal attention over the tokens at hand, `[B, Q, T, Dv]`."""
        scaling, window = self.layout.scaling, self.layout.sliding_window
        return causal_attention(q, k, v, scaling, window, self.sink_logits)

    def output(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Per-head results `[B, Q, T, Dv]` to hidden states `[B, T, hidden]`.

        Args:
            hidden: `[B, T, hidden]`, what they were projected from: a gate reads it.
        """
        heads = context.transpose(1, 2).flatten(2)
        result: Tensor = self.o_proj(heads if self.gate is None else self._gated(heads, hidden))
        return result

    def _gated(self, heads: Tensor, hidden: Tensor) -> Tensor:
        assert self.gate is not None
        gate: Tensor = self.gate(hidden)
        if self._own_gate == "g_proj":  # of Laguna; per head or per channel
            gate = F.softplus(gate.float()).to(heads.dtype)
            return heads * gate.repeat_interleave(heads.shape[-1] // gate.shape[-1], dim=-1)
        return heads * gate.sigmoid()


class BorrowingAttention(GroupedQueryAttention):
    """The stages of a layer that has queries alone, and reads what an earlier layer makes.

    Attributes:
        lent: The keys and values that `project` gives, `[B, H, T, D]` each: normed, before RoPE.
    """

    lent: tuple[Tensor, Tensor] | None = None

    def _projections(self, module: Any) -> tuple[list[int], list[Tensor], list[Tensor]]:
        weight, *biases = module.q_proj.parameters()
        return [len(weight)], [weight], biases

    def queries(self, hidden: Tensor) -> Tensor:
        """`[B, T, hidden]` to `[B, Q, T, D]`, normed, before RoPE."""
        q = self.qkv(hidden).unflatten(-1, (-1, self.layout.head_dim)).transpose(1, 2)
        queries: Tensor = q if self.q_norm is None else self.q_norm(q)
        return queries

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, which are normed already, and what was lent."""
        assert self.lent is not None
        return self.queries(hidden), *self.lent

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is left to be normed."""
        return q, k


def grouped_attention(module: Any, name: str) -> GroupedQueryAttention:
    """The stages of a GQA attention module, with keys and values of its own or without."""
    kind = BorrowingAttention if borrows(module) else GroupedQueryAttention
    return kind(module, name)


class DenseAttention(nn.Module):
    """A GQA module over whole windows from position 0, with its keys and values as they are.

    It has the stages of :class:`kvtool.latent.FactoredAttention`.
    """

    inv_freq: Tensor

    def __init__(self, gqa: GroupedQueryAttention, rope: Rope) -> None:
        super().__init__()
        self.gqa = gqa
        inv_freq = rope.inv_freq.to(gqa.qkv.weight.device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def context(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        """What `output` reads, `[B, T, Q, D]`, of `hidden [B, T, hidden]`.

        Args:
            scale: Of the model's RoPE.
        """
        q, k, v = self.gqa.project(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        tables = Rope(self.inv_freq, scale).tables(positions)
        q, k = self.gqa.normalise(q, k)
        q, k = self.gqa.rotate(self.gqa.temper(q, positions), k, *tables)
        return self.gqa.attend(q, k, v).transpose(1, 2)

    def output(self, context: Tensor) -> Tensor:
        """`[B, T, Q, D]` to hidden states `[B, T, hidden]`."""
        result: Tensor = self.gqa.o_proj(context.flatten(2))
        return result


def projections(module: Any) -> list[nn.Linear]:
    """Of a transformers module, to queries, keys and values; or the one to all of them, or to
    queries where there is no other.
    """
    if hasattr(module, "qkv_proj"):
        return [module.qkv_proj]
    if borrows(module):
        return [module.q_proj]
    values = module.k_proj if module.v_proj is None else module.v_proj  # Gemma 4 has one for both
    return [module.q_proj, module.k_proj, values]


def _over_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of all heads of a token together, of `x [B, H, T, D]`."""
    normed: Tensor = norm(x.transpose(1, 2).flatten(2))
    return normed.view(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2)


def _block_rows(blocks: Tensor, size: int) -> Tensor:
    """Rows of blocks of `size` rows each, block by block."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention where query `i` of T sees keys up to `S - T + i`.

    Args:
        q: `[B, Q, T, D]`; k: `[B, H, S, D]`; v: `[B, H, S, Dv]`, S >= T, H divides Q.
        scaling: Factor on the scores.
        window: Sees only the last `window` keys, itself included.
        sink_logits: `[Q]`, see :class:`GroupedQueryAttention`; Dv is D then, and with a window.

    Returns:
        `[B, Q, T, Dv]`.
    """
    t, s, width = q.shape[2], k.shape[2], v.shape[-1]
    window = None if window is None or window >= s else window
    if sink_logits is not None or (window is not None and t > 1):
        seen = window or s  # a window that holds everything is none
        return streaming_attention(q, k, v, 0, seen, scaling, s - t, sink_logits=sink_logits)
    if width < q.shape[-1]:
        # The fused CPU kernel wants one head size; without it every score would be written out.
        v = F.pad(v, (0, q.shape[-1] - width))
    mask: Tensor | None = None
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    elif t > 1 and s > t and q.is_cuda:
        # Flash attention takes no mask written out, but knows this one.
        mask = causal_lower_right(t, s)
    elif t > 1 and s > t:
        query_at = torch.arange(s - t, s, device=q.device)[:, None]
        mask = torch.arange(s, device=q.device) <= query_at
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and t > 1, scale=scaling, enable_gqa=True
    )
    return out[..., :width]
