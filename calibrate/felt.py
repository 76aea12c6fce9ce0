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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.calibrate.far_reads import Kept, Reads, WholeModel
from kvtool.codes import CodeKind
from kvtool.errors import CalibrationError
from kvtool.progress import Progress, telling
from kvtool.rope import Rope, rotate


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


def feel(
    model: WholeModel,
    windows: Tensor,
    offsets: Sequence[int],
    groups: Sequence[Sequence[int]],
    kind: CodeKind,
    ring: tuple[int, int],
    seed: int,
    report: Progress,
) -> list[Felt]:
    """One :class:`Felt` per group of layers.

    Args:
        windows: `[N, S]` token ids.
        offsets: The position at which each begins.
        groups: Layers with KV heads that see the whole past.
        kind: Whether y has keys after RoPE, or before.
        ring: Sink and window of the tokens that are read exactly.
        seed: Draws the tokens.

    Raises:
        CalibrationError: A prediction is no number, or a gradient is not finite.
    """
    sums: list[Felt] = []
    reads = model.far_reads(windows, offsets, ring, seed)
    pairs = zip(offsets, reads, strict=True)
    for offset, read in telling(report, "measuring", pairs, len(windows)):
        for index, layers in enumerate(groups):
            y, g = joined(model.ropes, read, layers, offset, kind)
            found = _sums(y[ring[0] :], g[ring[0] :], read.predictions)
            if index == len(sums):
                sums.append(found)
            else:
                have = sums[index]
                for name, value in vars(found).items():
                    setattr(have, name, getattr(have, name) + value)
    if not all(bool(x.metric.isfinite().all() and x.second.isfinite().all()) for x in sums):
        raise CalibrationError("the model's gradients are not all finite numbers")
    return sums


def joined(
    ropes: Sequence[Rope], read: Reads, layers: Sequence[int], offset: int, kind: CodeKind
) -> tuple[Tensor, Tensor]:
    """What some layers with KV heads keep of a window, y `[S, W]`, and its gradients g.

    Args:
        ropes: Of all layers.
    """
    own = [ropes[layer] for layer in layers]
    seen, felt = ([kept[layer] for layer in layers] for kept in (read.seen, read.felt))
    # A gradient is turned back by the transpose of RoPE alone, a key by its inverse, from which
    # yarn's factor on cos and sin keeps it apart.
    return _joined(own, seen, offset, kind, -2), _joined(own, felt, offset, kind, 0)


def _joined(
    ropes: Sequence[Rope], layers: Sequence[Kept], offset: int, kind: CodeKind, power: int
) -> Tensor:
    keys, values = ([pair[part] for pair in layers] for part in (0, 1))
    if kind == "unrotated":
        positions = torch.arange(offset, offset + keys[0].shape[2])
        tables = [rope.tables(positions) for rope in ropes]
        keys = [
            rotate(k, cos, -sin) * rope.scale**power
            for k, rope, (cos, sin) in zip(keys, ropes, tables, strict=True)
        ]
    return torch.cat([x[0].transpose(0, 1).flatten(1) for x in (*keys, *values)], dim=-1)


def _sums(y: Tensor, g: Tensor, predictions: int) -> Felt:
    size = g.norm(dim=1, keepdim=True)
    second, metric, weighted = (x.double().cpu() for x in (y.T @ y, g.T @ g, (y * size).T @ y))
    return Felt(predictions, len(y), second, metric, float(size.sum()), weighted)
