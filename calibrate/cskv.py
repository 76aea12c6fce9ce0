"""CSKV (arXiv 2409.10593): low-rank keys before RoPE and values, for all heads of a layer at once.

The paper trains K ≈ X A B by the error of keys and values with the original's inputs. That is
reduced-rank regression, and its optimum is closed: A B = Wᵀ U Uᵀ with U the first eigenvectors of
the second moment of the layer's own keys (RoPE turns the error, but keeps its length).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.codes import Fitted, Part, Projection


def fit(statistics: LayerStatistics, heads: int) -> dict[Part, Fitted]:
    """Keys and values of a layer; the code knows no heads."""
    second = statistics.joint.second / statistics.joint.tokens
    width = second.shape[0] // 2
    return {"keys": principal(second[:width, :width]), "values": principal(second[width:, width:])}


def principal(second: Tensor) -> Fitted:
    """Principal directions of a second moment `[W, W]`, not centred."""
    values, vectors = torch.linalg.eigh(second)
    rows = vectors.T.flip(0)
    mean = torch.zeros(len(rows), dtype=torch.float64)
    return Fitted(Projection(rows, rows.T, mean), values.flip(0).clamp(min=0))
