"""The closed form that keeps what the predictions feel (`felt.py`).

With F = Σ g gᵀ the metric of the errors and C = Σ |g| y yᵀ / Σ |g| the tokens as they are felt, the
code M of rank r that loses least, tr F (I - M) C (I - M)ᵀ, is oblique:

    F^½ C F^½ = U diag(λ) Uᵀ,     encode = U_rᵀ F^½,     decode = F^-½ U_r,     ½ Σ_{j>r} λ_j lost.

It is the form of KQ-SVD (arXiv 2512.05916) for keys and of the output-weighted SVD for values, with
both in one metric: keys, values and the layers of a group share one code (xKV, arXiv 2503.18893,
offline), rows are ordered, so that any number of them is the best code of that width, and λ is in
nats, so that a budget is shared by comparing the rows of all codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.calibrate.felt import Felt
from kvtool.codes import Fitted, Part, Projection

RIDGE = 1e-6
"""Least eigenvalue of the metric, of its largest: directions that nothing reads may be lost."""


def fit(felt: Felt, parts: tuple[Part, ...]) -> dict[Part, Fitted]:
    """A code of all keys of a group and one of all values, or the one that they share.

    What is read as it is stored is better split: a query then reads each number once.
    """
    metric = felt.metric / felt.predictions
    tokens = felt.weighted / max(felt.weight, torch.finfo(torch.float64).tiny)
    if parts == ("joint",):
        return {"joint": _fit(metric, tokens)}
    half = len(metric) // 2
    places: dict[Part, slice] = {"keys": slice(0, half), "values": slice(half, None)}
    return {part: _fit(metric[own, own], tokens[own, own]) for part, own in places.items()}


def _fit(metric: Tensor, tokens: Tensor) -> Fitted:
    """Of the metric F and the second moment C `[W, W]`."""
    values, vectors = torch.linalg.eigh(metric)
    roots = values.clamp(min=RIDGE * float(values.max()) or 1.0).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    lost, directions = torch.linalg.eigh(root @ tokens @ root)
    directions = directions.flip(1)
    encode, decode = directions.T @ root, inverse @ directions
    # Only the product of both has a meaning; rows of the size of what they store are kind to bf16.
    size = encode.norm(dim=1)
    encode, decode = encode / size[:, None], decode * size
    projection = Projection(encode, decode, torch.zeros(len(values), dtype=torch.float64))
    return Fitted(projection, lost.flip(0).clamp(min=0) / 2)
