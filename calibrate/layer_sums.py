"""What one layer leaves in the statistics: sums over what goes through its attention module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.calibrate.stream import Attention, LayerStream, StreamedLayer
from kvtool.kernels.sink_logits import softmax
from kvtool.layout import AttentionLayout

ROWS = 32
"""Queries at the end of each window whose attention is looked at row by row."""
EVICTION_TOP, EVICTION_LAST = 32, 8
"""Keys that CompressKV's eviction error leaves: the most attended, and the latest."""
EVERY = 4
"""One query in so many is looked at for the attention that keys receive."""
KINDS = ("queries", "rotated_queries", "joint", "rotated_keys", "outputs")
"""What is summed up, see `LayerStatistics`."""

_ROWS = 128  # queries whose attention is written out at once


def pack(second: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices `[..., W, W]`, row by row: `[..., W(W+1)/2]`."""
    rows, columns = torch.triu_indices(*second.shape[-2:]).unbind()
    return second[..., rows, columns]


def unpack(packed: Tensor) -> Tensor:
    """What `pack` packed."""
    width = int((2 * packed.shape[-1]) ** 0.5)
    rows, columns = torch.triu_indices(width, width).unbind()
    second = packed.new_empty(*packed.shape[:-1], width, width)
    second[..., rows, columns] = packed
    second[..., columns, rows] = packed
    return second


def shapes(layout: AttentionLayout) -> dict[str, tuple[int, int]]:
    """Per kind the number of groups, each with moments of its own, and their width."""
    heads, size = layout.heads, layout.head_dim
    width = layout.kv_heads * size
    return {
        "queries": (heads, size),
        "rotated_queries": (heads, size),
        "joint": (1, 2 * width),
        "rotated_keys": (1, width),
        "outputs": (1, heads * size),
    }


@dataclass(frozen=True)
class Seen:
    """What went through an attention module: queries `[B, Q, T, D]`, keys, values, results."""

    hidden: Tensor  # [B, T, hidden]
    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    context: Tensor
    output: Tensor  # [B, T, hidden]


def watched(
    stream: LayerStream, layer: StreamedLayer, starts: Tensor, seen: list[Seen]
) -> Attention:
    """The layer's own attention over windows that begin at positions `starts [B]`."""

    def attention(hidden: Tensor) -> Tensor:
        stages = layer.attention
        q, k, v = stages.project(hidden)
        q, k = stages.normalise(q, k)
        positions = starts[:, None] + torch.arange(hidden.shape[1])
        q = stages.temper(q, positions)
        cos, sin = (table[:, None] for table in stream.ropes[layer.index].tables(positions))
        q_rotated, k_rotated = stages.rotate(q, k, cos, sin)
        context = stages.attend(q_rotated, k_rotated, v)
        output = stages.output(context, hidden)
        seen.append(Seen(hidden, q, k, v, q_rotated, k_rotated, context, output))
        return output

    return attention


class Sums:
    """Of vectors `[G, n, W]`, each of G groups by itself."""

    def __init__(self, groups: int, width: int, *, second: bool) -> None:
        self.tokens = 0
        self.total = torch.zeros(groups, width, dtype=torch.float64)
        self.peak = torch.zeros(groups, width)
        shape = (groups, width, width)
        self.second = torch.zeros(shape, dtype=torch.float64) if second else None

    def add(self, x: Tensor) -> None:
        """Adds vectors `[G, n, W]`, float64."""
        self.tokens += x.shape[1]
        self.total += x.sum(dim=1)
        if x.shape[1]:
            self.peak = torch.maximum(self.peak, x.abs().amax(dim=1).float())
        if self.second is not None:
            self.second.baddbmm_(x.mT, x)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Mean, peak and packed second moment; no axis for a single group."""
        found = {"mean": self.total / max(self.tokens, 1), "peak": self.peak}
        if self.second is not None:
            found["second"] = pack(self.second)
        return {f"{name}.{k}": x.squeeze(0) for k, x in found.items()}


class LayerSums:
    """Everything that is added up in one layer."""

    def __init__(self, layout: AttentionLayout, sinks: int, budgets: Sequence[int]) -> None:
        self.layout, self.sinks = layout, sinks
        widths = shapes(layout)
        self.bulk = {kind: Sums(*widths[kind], second=True) for kind in KINDS}
        self.at_sinks = {kind: Sums(*widths[kind], second=kind == "joint") for kind in KINDS}
        self.budgets = torch.tensor(budgets) - 1
        width = 2 * layout.kv_heads * layout.head_dim
        self.attended = torch.zeros(width, width, dtype=torch.float64)
        self.windows = 0
        self.per_window: dict[str, Tensor] = {}

    @torch.inference_mode()
    def add(self, layer: StreamedLayer, seen: Seen) -> None:
        """Adds what a batch of windows showed."""
        self.windows += len(seen.q)
        rotated, logits = (seen.q_rotated, seen.k_rotated), layer.attention.sink_logits
        received = received_mass(*rotated, self.layout, self.sinks, logits)
        for kind, x in _kinds(seen).items():
            x = x.to(torch.float64, memory_format=torch.contiguous_format)
            if kind == "joint":
                tokens = x.flatten(0, 2)
                self.attended.addmm_(tokens.T, tokens * received.flatten()[:, None])
            self.at_sinks[kind].add(x[:, :, : self.sinks].flatten(1, 2))
            bulk = x[:, :, self.sinks :]
            self.bulk[kind].add(bulk.flatten(1, 2))
            if kind == "rotated_queries":
                self._add("query_entropy", matrix_entropy(bulk).sum(dim=1))
        mass = sampled_attention(*rotated, self.layout, logits)
        self._add("distance_mass", distance_mass(mass, self.sinks).sum(dim=0))
        self._add("budget_mass", budget_mass(mass)[..., self.budgets].sum(dim=0))
        few = evicted(mass, joined=logits is not None) @ seen.v[:, :, None]  # [B, H, g, R, D]
        few = few.flatten(1, 2)
        output = layer.attention.output(few, seen.hidden[:, -few.shape[2] :])
        full = seen.output[:, -output.shape[1] :]
        error = (output - full).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)
        self._add("eviction_error", error.double().mean(dim=1).sum())

    def _add(self, name: str, value: Tensor) -> None:
        self.per_window[name] = self.per_window.get(name, 0) + value

    def tensors(self) -> dict[str, Tensor]:
        """Under their names in the file, without the layer."""
        found = {name: total / self.windows for name, total in self.per_window.items()}
        found["attended"] = pack(self.attended / self.windows)
        for kind in KINDS:
            found |= self.bulk[kind].tensors(kind)
            found |= self.at_sinks[kind].tensors(f"sinks.{kind}")
        return found


def _kinds(seen: Seen) -> dict[str, Tensor]:
    """Vectors `[G, B, T, W]` of every kind."""

    def merged(x: Tensor) -> Tensor:  # [B, heads, T, D]
        return x.transpose(1, 2).flatten(2)[None]

    return {
        "queries": seen.q.transpose(0, 1),
        "rotated_queries": seen.q_rotated.transpose(0, 1),
        "joint": merged(torch.cat((seen.k, seen.v), dim=1)),
        "rotated_keys": merged(seen.k_rotated),
        "outputs": merged(seen.context),
    }


def sampled_attention(
    q: Tensor, k: Tensor, layout: AttentionLayout, sink_logits: Tensor | None = None
) -> Tensor:
    """Attention of the last R = min(32, T) queries, from rotated `q`, `k` `[B, Q or H, T, D]`.

    Args:
        sink_logits: `[Q]`, see `kernels/sink_logits`.

    Returns:
        `[B, H, g, R, T]`, fp32, rows sum to 1, or to less by what the logits hold.
    """
    length = q.shape[2]
    distance = _distance(min(ROWS, length), length)
    return _attention(q[:, :, -ROWS:], k, layout, distance, sink_logits)


def _attention(
    q: Tensor, k: Tensor, layout: AttentionLayout, distance: Tensor, sink_logits: Tensor | None
) -> Tensor:
    """Attention `[B, H, g, R, T]` of queries `[B, Q, R, D]`, `distance [R, T]` before the keys."""
    grouped = q.unflatten(1, (layout.kv_heads, -1))
    scores = grouped @ k[:, :, None].mT * layout.scaling
    hidden = distance < 0
    if layout.sliding_window is not None:
        hidden |= distance >= layout.sliding_window
    return softmax(scores.masked_fill(hidden, -torch.inf), sink_logits, first=1)


def received_mass(
    q: Tensor,
    k: Tensor,
    layout: AttentionLayout,
    sinks: int,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`[B, T]` float64: attention that each key gets, mean over heads and every fourth query.

    Args:
        q, k: Rotated, `[B, Q or H, T, D]`.
        sinks: First positions whose queries are left out.
        sink_logits: `[Q]`, see `kernels/sink_logits`.
    """
    length = q.shape[2]
    distance = _distance(length, length)
    received = torch.zeros(len(q), length, dtype=torch.float64)
    looked_at = torch.arange(sinks, length, EVERY)
    for rows in looked_at.split(_ROWS):  # T x T of every head is too much at once
        mass = _attention(q[:, :, rows], k, layout, distance[rows], sink_logits)
        received += mass.sum(dim=(1, 2, 3)).double()
    return received / (q.shape[1] * len(looked_at))


def _distance(rows: int, length: int) -> Tensor:
    """`[R, T]`: how far each key lies behind each of the last queries."""
    at = torch.arange(length)
    return at[length - rows :, None] - at


def distance_mass(mass: Tensor, sinks: int) -> Tensor:
    """`[B, Q, buckets]` from attention `[B, H, g, R, T]`, see `LayerStatistics.distance_mass`."""
    rows, length = mass.shape[-2:]
    distance = _distance(rows, length).clamp(min=0)
    bucket = torch.frexp(distance.float()).exponent  # 0; 1; 2, 3; 4 to 7; ... give 0, 1, 2, 3
    last = (length - 1).bit_length() + 1
    bucket[:, :sinks] = last
    member = F.one_hot(bucket.flatten().long(), last + 1).double()  # [R·T, buckets]
    return mass.flatten(1, 2).flatten(2).double() @ member / rows


def budget_mass(mass: Tensor) -> Tensor:
    """`[B, H, T]` float64: what the n + 1 most attended keys hold of `mass [B, H, g, R, T]`."""
    per_key = mass.double().mean(dim=(2, 3))
    return per_key.sort(dim=-1, descending=True).values.cumsum(dim=-1)


def evicted(mass: Tensor, *, joined: bool = False) -> Tensor:
    """`mass [B, H, g, R, T]` on the layer's most attended keys and each query's latest ones.

    Args:
        joined: What a row lacks of 1 is held by a logit that no key is evicted with.
    """
    rows, length = mass.shape[-2:]
    per_key = mass.mean(dim=(1, 2, 3))  # [B, T]
    top = per_key.topk(min(EVICTION_TOP, length)).indices
    chosen = torch.zeros_like(per_key, dtype=torch.bool).scatter(1, top, True)
    latest = _distance(rows, length) < EVICTION_LAST
    few = mass * (chosen[:, None, None, None] | latest)
    left = few.sum(dim=-1, keepdim=True)
    if joined:
        left += (1 - mass.sum(dim=-1, keepdim=True)).clamp(min=0)
    # A query may look elsewhere with all that fp32 holds of its attention: it then reads nothing.
    return few / left.clamp(min=torch.finfo(few.dtype).tiny)


def matrix_entropy(queries: Tensor) -> Tensor:
    """`[...]` from `[..., T, D]` float64: entropy of their normed covariance's largest D/4 values.

    UNComp (arXiv 2410.03090): -Σ σ log σ / log D, with 32 values at D = 128.
    """
    size = queries.shape[-1]
    centred = queries - queries.mean(dim=-2, keepdim=True)
    rows = F.normalize(centred, dim=-1)
    gram = rows.mT @ rows
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    values = torch.linalg.eigvalsh(gram / trace.clamp(min=1e-300))[..., -max(size // 4, 1) :]
    terms: Tensor = -torch.xlogy(values.clamp(min=0), values.clamp(min=0))
    return terms.sum(dim=-1) / math.log(size)
