"""Palu (arXiv 2407.21118): whitened low-rank keys before RoPE and values, ranks by Fisher.

Its whitened SVD of a group of heads is CSKV's optimum for these heads; here a layer's heads are one
group (J-LRD, the paper's most exact). What differs is how ranks are shared: matrix i gets

    rank_i = total · F_i / Σ F,     F = √(mean over batches of (∂ loss / ∂ W)²), added up over W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.attention import projections
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Fitted
from kvtool.layout import decoder_layers, describe, with_heads
from kvtool.progress import Progress, telling


def fisher(checkpoint: Checkpoint, windows: Tensor, report: Progress) -> tuple[Tensor, Tensor]:
    """F of the key and of the value projections of the layers that see the whole past, `[L]` each.

    Args:
        windows: `[N, S]` token ids.
    """
    model = checkpoint.load_transformers(torch.float32, "cpu").requires_grad_(False)
    layouts = describe(model.config)
    layers = zip(decoder_layers(model), layouts, strict=True)
    modules = [layer.self_attn for layer, layout in layers if layout.sees_all]
    parts = [part for module in modules for part in projections(module)[-2:]]
    weights = [part.weight.requires_grad_() for part in parts]
    squares = [torch.zeros_like(weight) for weight in weights]
    for ids in telling(report, "measuring", windows, len(windows)):
        loss = model(ids[None], labels=ids[None], use_cache=False).loss
        for total, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.square()
    rows = [(x / len(windows)).sqrt().double().sum(dim=1) for x in squares]
    width = with_heads(layouts).cached_values  # rows for keys and values come last
    found = torch.cat(rows).view(len(modules), -1)[:, -width:]
    keys, values = found.unflatten(1, (2, -1)).sum(dim=2).unbind(dim=1)
    return keys, values


def ranked(fitted: Fitted, importance: float) -> Fitted:
    """With a spectrum that gives ranks in proportion to importance when codes compete for rows.

    The row r of a matrix counts F / r: all rows above one threshold are r <= F / threshold of each.
    """
    rows = torch.arange(1, len(fitted.spectrum) + 1, dtype=torch.float64)
    return Fitted(fitted.projection, importance / rows)
