"""PCA of keys after RoPE and of values, head by head: where MatryoshkaKV starts.

MatryoshkaKV (arXiv 2410.14731, section 3.2): an orthogonal basis of each head's centred covariance,
largest variance first. Real GQA: one basis per KV head, not per query head. The mean of the keys
is part of the code, because exact tokens stand beside the coded ones in the softmax.
"""

from __future__ import annotations

import torch

from kvtool.calibrate.statistics_file import LayerStatistics, Moments
from kvtool.codes import Fitted, Part, Projection


def fit(statistics: LayerStatistics, heads: int) -> dict[Part, Fitted]:
    """Keys and values of a layer with H heads."""
    values = statistics.joint.part(statistics.rotated_keys.mean.shape[0])
    return {"keys": per_head(statistics.rotated_keys, heads), "values": per_head(values, heads)}


def per_head(moments: Moments, heads: int) -> Fitted:
    """Principal directions of each head; all heads take turns, so that ranks stay equal."""
    width = moments.mean.shape[0]
    size = width // heads
    covariance = moments.covariance.view(heads, size, heads, size)
    own = torch.stack([covariance[h, :, h] for h in range(heads)])
    variances, vectors = torch.linalg.eigh(own)  # ascending
    encode = torch.zeros(size, heads, heads, size, dtype=torch.float64)
    for head in range(heads):
        encode[:, head, head] = vectors[head].T.flip(0)
    rows = encode.reshape(width, width)
    spectrum = variances.flip(-1).clamp(min=0).T.flatten()
    return Fitted(Projection(rows, rows.T, moments.mean), spectrum)
