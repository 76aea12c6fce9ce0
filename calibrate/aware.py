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

from kvtool.calibrate.felt import Felt
from kvtool.codes import Fitted, Part, Projection

RIDGE = 1e-6
"""Least eigenvalue of the metric, of its largest: directions that nothing reads may be lost."""


def fit(felt: Felt) -> dict[Part, Fitted]:
    """The code that keys and values of all layers of a group share."""
    values, vectors = torch.linalg.eigh(felt.metric / felt.predictions)
    roots = values.clamp(min=RIDGE * float(values.max()) or 1.0).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    felt_tokens = felt.weighted / max(felt.weight, torch.finfo(torch.float64).tiny)
    lost, directions = torch.linalg.eigh(root @ felt_tokens @ root)
    directions = directions.flip(1)
    encode, decode = directions.T @ root, inverse @ directions
    # Only the product of both has a meaning; rows of the size of what they store are kind to bf16.
    size = encode.norm(dim=1)
    encode, decode = encode / size[:, None], decode * size
    projection = Projection(encode, decode, torch.zeros(len(values), dtype=torch.float64))
    return {"joint": Fitted(projection, lost.flip(0).clamp(min=0) / 2)}
