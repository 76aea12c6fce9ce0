"""Palu (arXiv 2407.21118): whitened low-rank keys before RoPE and values, ranks by Fisher.

Its whitened SVD of a group of heads is CSKV's optimum for these heads; here a layer's heads are one
group (J-LRD, the paper's most exact). What differs is how ranks are shared: matrix i gets

    rank_i = total · F_i / Σ F,     F = √(mean over batches of (∂ loss / ∂ W)²), added up over W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.attention import decoder_layers
from kvtool.calibrate.stream import Report
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Fitted


def fisher(checkpoint: Checkpoint, windows: Tensor, report: Report) -> tuple[Tensor, Tensor]:
    """F of the key and of the value projections, `[L]` each, from `windows [N, S]` of token ids."""
    model = checkpoint.load_transformers(torch.float32, "cpu").requires_grad_(False)
    weights = [
        getattr(layer.self_attn, name).weight.requires_grad_()
        for name in ("k_proj", "v_proj")
        for layer in decoder_layers(model)
    ]
    squares = [torch.zeros_like(weight) for weight in weights]
    report("measuring", 0, len(windows))
    for done, ids in enumerate(windows):
        loss = model(ids[None], labels=ids[None], use_cache=False).loss
        for total, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.square()
        report("measuring", done + 1, len(windows))
    found = torch.stack([(x / len(windows)).sqrt().double().sum() for x in squares])
    keys, values = found.chunk(2)
    return keys, values


def ranked(fitted: Fitted, importance: float) -> Fitted:
    """With a spectrum that gives ranks in proportion to importance when codes compete for rows.

    The row r of a matrix counts F / r: all rows above one threshold are r <= F / threshold of each.
    """
    rows = torch.arange(1, len(fitted.spectrum) + 1, dtype=torch.float64)
    return Fitted(fitted.projection, importance / rows)
