"""Double Sparsity (arXiv 2408.07092) in plain torch: the contract, and the CPU path.

The channels of keys, and of queries alike, lie in an order in which the r label channels are the
first. What they alone make of q·k says which k tokens are read; those are read exactly.

The paper chooses for each query head. Here the query heads of a KV head share a choice, so that a
token is gathered once for all of them: the one with the most attention, summed over the heads, if
the labels were all there is of q·k.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvtool.kernels.decode_attention import decode_attention
from kvtool.kernels.sink_logits import softmax


def choose(
    q: Tensor,
    keys: Tensor,
    length: int,
    labels: int,
    tokens: int,
    sink: int,
    window: int,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The tokens that one query of every head is to read.

    The first `sink` and the last `window` are always among them; the others have the largest
    Σ_heads softmax_t(scaling · q[:r] · k_t[:r]).

    Args:
        q: `[Q, D]`, rotated, in the order of the keys' channels.
        keys: `[H, capacity, D]`, rotated, H divides Q; what lies past `length` is never read.
        length: n, tokens that are cached, the current one included; at least k.
        labels: r, channels that are looked at.
        tokens: k, at least `sink + window`.
        scaling: Factor on q·k, that of all D channels.
        sink_logits: `[Q]`, a logit of each head that joins the softmax (`kernels/sink_logits`).

    Returns:
        `[H, k]` int64, in no order.
    """
    asked = (q[:, :labels] * scaling).view(keys.shape[0], -1, labels)  # [H, Q/H, r]
    scores = torch.bmm(asked, keys[:, :length, :labels].mT)  # a view: rows are D apart
    shares = softmax(scores, sink_logits, dtype=torch.float32).sum(dim=1)  # [H, n]
    shares[:, :sink] = torch.inf
    shares[:, length - window :] = torch.inf
    if not shares.is_cpu:
        return shares.topk(tokens, sorted=False).indices
    # numpy selects three to four times as fast as torch, which otherwise takes a third of all time.
    return torch.from_numpy(np.argpartition(shares.numpy(), -tokens)[:, -tokens:])


def sparse_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    labels: int,
    tokens: int,
    sink: int,
    window: int,
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query per head over the tokens that :func:`choose` names.

    Args:
        q: `[Q, D]`; the others as there.
        keys, values: `[H, capacity, D or Dv]`, contiguous.

    Returns:
        `[Q, Dv]`.
    """
    chosen = choose(q, keys, length, labels, tokens, sink, window, scaling, sink_logits)
    heads, capacity = keys.shape[:2]
    first = torch.arange(0, heads * capacity, capacity, device=q.device)
    rows = (chosen + first[:, None]).view(-1)
    k, v = (
        x.view(heads * capacity, -1).index_select(0, rows).view(1, heads, tokens, -1)
        for x in (keys, values)
    )
    return decode_attention(q[None], k, v, [tokens], scaling, sink_logits)[0]
