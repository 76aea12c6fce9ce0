"""What the predictions of a model feel of its past: one backward pass behind each window.

Let g be the gradient of the log-probability of a token, drawn from the model's own prediction, by
what a past token has left in the cache, y = [keys ; values] of some layers. If y is stored with an
error e, the prediction moves by (Fisher)

    KL ≈ ½ E (Σ_tokens gᵀ e)² ≈ ½ Σ_tokens E (gᵀ e)²

where errors of different tokens are independent. g knows all at once what the closed forms of
single parts weigh by hand: the queries that read a key, the attention it gets, what softmax and
output projection make of a value, and how much a layer matters. Only reads of tokens that a code
stands for count: sinks and the window are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import rotate
from kvtool.calibrate.past import predictions, tables
from kvtool.calibrate.tail import Attend, Behind, TailModel
from kvtool.codes import CodeKind
from kvtool.errors import CalibrationError

END = 256
"""Tokens at the end of each window whose predictions are looked at."""


@dataclass
class Felt:
    """Sums over past tokens of the keys and values y `[W]` that a group of layers keeps of each.

    W = 2 n K numbers: the keys of all n layers, then their values. The sinks are left out.

    Attributes:
        predictions: How many predictions the gradients are of.
        tokens: How many tokens were added up.
        second: `[W, W]`, Σ y yᵀ.
        metric: `[W, W]`, Σ g gᵀ.
        weight: Σ |g|.
        weighted: `[W, W]`, Σ |g| y yᵀ.
    """

    predictions: int
    tokens: int
    second: Tensor
    metric: Tensor
    weight: float
    weighted: Tensor


class FarRead(torch.autograd.Function):
    """Attention whose backward pass keeps apart how far tokens were read.

    `far_keys` and `far_values` are zeros of the shape of keys and values; they get the gradients of
    all reads of tokens that are neither sinks nor in the window, and `k` and `v` the others.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, far_values: Tensor,
        scaling: float, sink: int, window: int,
    ) -> Tensor:  # fmt: skip
        """`q [1, Q, M, D]`, `k`, `v` `[1, H, S, D]`; the queries are those of the last tokens."""
        grouped = q.unflatten(1, (k.shape[1], -1))
        distance = _distance(q, k)
        scores = (grouped @ k[:, :, None].mT).mul_(scaling)
        weights = scores.masked_fill_(distance < 0, -torch.inf).softmax(dim=-1)
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
        return queries, near_keys, near_values, *far, None, None, None


def _distance(q: Tensor, k: Tensor) -> Tensor:
    """`[M, S]`, how far each key lies behind each query."""
    at = torch.arange(k.shape[2], device=k.device)
    return at[k.shape[2] - q.shape[-2] :, None] - at


def feel(
    model: TailModel,
    windows: Tensor,
    offsets: Sequence[int],
    groups: Sequence[int],
    kind: CodeKind,
    ring: tuple[int, int],
    seed: int,
    report: Callable[[str, int, int], None],
) -> list[Felt]:
    """One :class:`Felt` per group of consecutive layers.

    Args:
        windows: `[N, S]` token ids.
        offsets: The position at which each begins.
        groups: Numbers of layers.
        kind: Whether y has keys after RoPE, or before.
        ring: Sink and window of the tokens that are read exactly.
        seed: Draws the tokens.

    Raises:
        CalibrationError: A prediction is no number, or a gradient is not finite.
    """
    end = min(END, windows.shape[1] // 2)
    generator = torch.Generator(model.device).manual_seed(seed)
    sums: list[Felt] = []
    report("measuring", 0, len(windows))
    for done, (ids, offset) in enumerate(zip(windows, offsets, strict=True)):
        seen, drawn = _backward(model, ids, offset, end, ring, generator)
        tokens = slice(ring[0], len(ids))
        first = 0
        for index, count in enumerate(groups):
            own = slice(first, first + count)
            y = joined(model, seen[own], offset, kind, model.rope.scale**-2)[tokens]
            g = joined(model, drawn[own], offset, kind, 1.0)[tokens]
            found = _sums(y, g, end)
            if index == len(sums):
                sums.append(found)
            else:
                have = sums[index]
                for name, value in vars(found).items():
                    setattr(have, name, getattr(have, name) + value)
            first += count
        report("measuring", done + 1, len(windows))
    if not all(bool(x.metric.isfinite().all() and x.second.isfinite().all()) for x in sums):
        raise CalibrationError("the model's gradients are not all finite numbers")
    return sums


def far_reads(
    model: TailModel,
    windows: Tensor,
    offsets: Sequence[int],
    ring: tuple[int, int],
    seed: int,
) -> Iterator[tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], int]]:
    """Window by window what all layers keep, and what its predictions feel of it.

    Args:
        windows, offsets, ring, seed: See :func:`feel`.

    Yields:
        Rotated keys and values by layer, `[1, H, S, D]`; the gradients of far reads of them, summed
        over predictions; and how many predictions.

    Raises:
        CalibrationError: See :func:`feel`.
    """
    end = min(END, windows.shape[1] // 2)
    generator = torch.Generator(model.device).manual_seed(seed)
    for ids, offset in zip(windows, offsets, strict=True):
        seen, drawn = _backward(model, ids, offset, end, ring, generator)
        if not all(bool(x.isfinite().all()) for pair in drawn for x in pair):
            raise CalibrationError("the model's gradients are not all finite numbers")
        yield seen, drawn, end


def joined(
    model: TailModel,
    layers: Sequence[tuple[Tensor, Tensor]],
    offset: int,
    kind: CodeKind,
    factor: float,
) -> Tensor:
    """Keys and values `[1, H, S, D]` of some layers, or their gradients, as y `[S, W]`.

    Args:
        layers: Keys as they are after RoPE; they are turned back where asked for.
        factor: What is behind the transpose of RoPE: a gradient is turned back by the transpose
            alone, a key by the inverse, from which yarn's factor on cos and sin keeps it apart.
    """
    keys, values = ([pair[part] for pair in layers] for part in (0, 1))
    if kind == "unrotated":
        cos, sin = tables(model, Behind([], [], keys[0], offset=offset), keys[0].shape[2])
        keys = [rotate(k, cos, -sin) * factor for k in keys]
    return torch.cat([x[0].transpose(0, 1).flatten(1) for x in (*keys, *values)], dim=-1)


def _sums(y: Tensor, g: Tensor, predictions: int) -> Felt:
    size = g.norm(dim=1, keepdim=True)
    second, metric, weighted = (x.double().cpu() for x in (y.T @ y, g.T @ g, (y * size).T @ y))
    return Felt(predictions, len(y), second, metric, float(size.sum()), weighted)


def _backward(
    model: TailModel,
    ids: Tensor,
    offset: int,
    end: int,
    ring: tuple[int, int],
    generator: torch.Generator,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Rotated keys and values of a window by layer, `[1, H, S, D]`, and the gradients of far reads.

    The last `end` tokens read the others as they are, so only they are differentiated.
    """
    past = Behind([], [], ids[:-end], offset=offset)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def reading(index: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            keys.append(k)
            values.append(v)
            return model.dense(index)(q, k, v, start)

        return attend

    with torch.no_grad():
        hidden = model.embed(past.ids)
        for index in range(len(model.layers)):
            hidden = model.layer(index, hidden, past, reading(index))
    far: list[tuple[Tensor, Tensor]] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(index: int) -> Attend:
        scaling = model.layouts[index].scaling

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            seen.append((k.detach(), v.detach()))
            far.append((torch.zeros_like(k).requires_grad_(), torch.zeros_like(v).requires_grad_()))
            read: Tensor = FarRead.apply(  # type: ignore[no-untyped-call]
                q, k, v, *far[-1], scaling, *ring
            )
            return read

        return attend

    behind = Behind(keys, values, ids[-end:].to(model.device), offset=offset)
    hidden = model.embed(behind.ids)
    for index in range(len(model.layers)):
        hidden = model.layer(index, hidden, behind, watched(index))
    said = predictions(model, hidden)
    if said.isnan().any():
        raise CalibrationError("the model's predictions are not all numbers")
    drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
    flat = torch.autograd.grad(said.gather(1, drawn).sum(), [x for pair in far for x in pair])
    return seen, list(zip(flat[::2], flat[1::2], strict=True))
