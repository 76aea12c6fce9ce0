"""Which tokens of a prompt are worth keeping: scores per KV head, computed at the prompt's end.

Each policy is a pure function from what it looks at to scores `[H, n]`, and an observer that
collects what it looks at while the prompt is read in chunks. Tokens that a policy always keeps
score infinity.

* **SnapKV** (arXiv 2404.14469, Algorithm 1): what the last queries of the prompt look at.
* **Expected attention** (kvpress, NVIDIA; arXiv 2510.00636): what queries distributed as the
  prompt's would look at, were they to come next. It needs no attention weights.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kernels.sink_logits import softmax
from kvtool.plan import Policy
from kvtool.rope import Rope, rotate

WINDOW = 32
"""SnapKV: the queries at the end of a prompt that vote."""
POOL = 5
"""SnapKV: neighbours that share a vote."""
SINKS = 4
"""Expected attention: the first tokens, always kept; their queries are like no others."""
FUTURE = 512
"""Expected attention: positions behind the prompt where queries are expected."""


def snapkv_scores(
    q: Tensor, keys: Tensor, scaling: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Attention that the last w queries pay to each token before them, pooled over neighbours.

    Args:
        q: `[Q, w, D]`, the prompt's last queries, rotated.
        keys: `[H, n, D]`, all of the prompt, rotated.
        scaling: Factor on the scores before the softmax.
        sink_logits: `[Q]`, see `kernels/sink_logits`.

    Returns:
        `[H, n]` fp32; infinite for the last w tokens.
    """
    heads, n = keys.shape[:2]
    w = q.shape[1]
    if n <= w:
        return q.new_full((heads, n), torch.inf, dtype=torch.float32)
    grouped = q.float().unflatten(0, (heads, -1))  # [H, Q/H, w, D]
    logits = torch.matmul(grouped, keys.float()[:, None].mT) * scaling
    future = torch.ones(w, n, dtype=torch.bool, device=q.device).triu(n - w + 1)
    attention = softmax(logits.masked_fill(future, -torch.inf), sink_logits)
    votes = attention.sum(2)[..., : n - w]  # [H, Q/H, n - w]
    pooled = F.avg_pool1d(votes, POOL, stride=1, padding=POOL // 2).mean(1)
    return F.pad(pooled, (0, w), value=torch.inf)


def expected_logits(mean: Tensor, covariance: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """log E[exp(scaling · q·k)] for Gaussian q: `scaling · μ·k + scaling² / 2 · kᵀ Σ k`.

    Args:
        mean: `[Q, D]`, covariance: `[Q, D, D]`, of the queries as they meet the keys.
        keys: `[H, n, D]`, H divides Q.

    Returns:
        `[Q, n]` fp32.
    """
    group = mean.shape[0] // keys.shape[0]
    logits = []
    for i in range(mean.shape[0]):  # one head at a time: k Σ is as large as the keys
        k = keys[i // group].float()
        spread = (torch.matmul(k, covariance[i]) * k).sum(-1)
        logits.append(scaling * torch.mv(k, mean[i]) + scaling**2 / 2 * spread)
    return torch.stack(logits)


def expected_scores(
    mean: Tensor,
    covariance: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Share of the expected attention that each token gets, times the norm of its value.

    Args:
        mean: `[Q, D]`, covariance: `[Q, D, D]`, of the queries to come, rotated.
        keys: `[H, n, D]`, rotated, values: `[H, n, Dv]`.
        sink_logits: `[Q]`, see `kernels/sink_logits`.

    Returns:
        `[H, n]` fp32; infinite for the first :data:`SINKS` tokens, which get no share.
    """
    sinks = min(SINKS, keys.shape[1])
    keys, values = keys[:, sinks:], values[:, sinks:]
    share = softmax(expected_logits(mean, covariance, keys, scaling), sink_logits)
    share = share.unflatten(0, (keys.shape[0], -1)).mean(1)  # [H, n - sinks]
    return F.pad(share * values.float().norm(dim=-1), (sinks, 0), value=torch.inf)


def rotated_moments(
    mean: Tensor, covariance: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments `[Q, D]`, `[Q, D, D]` of queries after a rotation given by tables `[D]`.

    With tables averaged over positions this is the rotation R averaged over them: R μ and R Σ Rᵀ.
    """
    turned = rotate(rotate(covariance, cos, sin).mT, cos, sin)
    return rotate(mean, cos, sin), turned


def keep(scores: Tensor, budget: int) -> Tensor:
    """Positions of the `budget` best of n tokens with `scores [n]`, ascending; of equals the later.

    All n if the budget allows it.
    """
    latest_first = scores.flip(-1).sort(descending=True, stable=True).indices[:budget]
    return (len(scores) - 1 - latest_first).sort().values


class Selector(Protocol):
    """Watches a prompt being read, and then scores its tokens."""

    def see(self, q: Tensor, unrotated: Tensor, start: int) -> None:
        """The queries `[Q, T, D]` of the next piece, which begins at position `start`."""

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        """`[H, n]` fp32 for the prompt's `keys`, `values` `[H, n, D]`."""


class SnapKV:
    """Holds the last :data:`WINDOW` queries."""

    def __init__(self, scaling: float, sink_logits: Tensor | None = None) -> None:
        self.scaling, self.sink_logits = scaling, sink_logits
        self.q: Tensor | None = None

    def see(self, q: Tensor, unrotated: Tensor, start: int) -> None:
        q = q if self.q is None else torch.cat((self.q, q), dim=1)
        self.q = q[:, -WINDOW:].clone()

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        assert self.q is not None
        return snapkv_scores(self.q, keys, self.scaling, self.sink_logits)


class ExpectedAttention:
    """Adds up the moments of the queries behind the sinks, in float64."""

    def __init__(self, scaling: float, rope: Rope, sink_logits: Tensor | None = None) -> None:
        self.scaling, self.rope, self.sink_logits = scaling, rope, sink_logits
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def see(self, q: Tensor, unrotated: Tensor, start: int) -> None:
        bulk = unrotated[:, max(0, SINKS - start) :].double()
        self.count += bulk.shape[1]
        self.sum = self.sum + bulk.sum(1)  # [Q, D]
        self.square = self.square + torch.matmul(bulk.mT, bulk)  # [Q, D, D]

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        mean = torch.as_tensor(self.sum) / max(self.count, 1)
        covariance = self.square / max(self.count, 1) - mean[:, :, None] * mean[:, None]
        n = keys.shape[1]
        tables = self.rope.tables(torch.arange(n, n + FUTURE, device=keys.device))
        cos, sin = (table.mean(0) for table in tables)
        mean, covariance = rotated_moments(mean.float(), covariance.float(), cos, sin)
        return expected_scores(mean, covariance, keys, values, self.scaling, self.sink_logits)


def selector(
    policy: Policy, scaling: float, rope: Rope, sink_logits: Tensor | None = None
) -> Selector:
    """A fresh observer for one prompt."""
    if policy == "snapkv":
        return SnapKV(scaling, sink_logits)
    return ExpectedAttention(scaling, rope, sink_logits)
