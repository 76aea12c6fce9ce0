"""Scores read off the attention of a model that recalls: no gradient, one pass over the tail.

* *Retrieval score* (Wu et al., arXiv 2404.15574): the share of recalled tokens at which the head's
  most attended token is the very one being copied.
* *Semantic retrieval score* (CompressKV, arXiv 2508.02401): the attention mass that the head puts
  on the whole needle while its tokens are recalled, which also credits heads that look around.

Both count only tokens that the model itself recalls. They are defined per query head; a KV head is
needed when any head of its group needs it, so its score is their maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvtool.calibrate.tail import Attend, Reading, TailModel

Report = Callable[[str, int, int], None]
"""Told (stage, steps done, steps in all)."""


@torch.no_grad()
def attention_scores(
    model: TailModel, readings: Sequence[Reading], report: Report
) -> tuple[Tensor, Tensor]:
    """Retrieval and semantic retrieval scores of every KV head, each `[L, H]` float64 in [0, 1]."""
    layers, heads = len(model.layers), model.layouts[0].kv_heads
    retrieval = torch.zeros(layers, heads, dtype=torch.float64)
    semantic = torch.zeros_like(retrieval)
    report("reading attention", 0, len(readings))
    for number, reading in enumerate(readings):
        rows, recalled = look(model, reading)
        sample = reading.sample
        positions = sample.source[sample.answers].to(model.device)  # [A], in the context
        spans = sample.spans[sample.answers].to(model.device)  # [A, 2]
        for index, attention in enumerate(rows):  # [Q, A, S]
            top = attention.argmax(-1) == positions
            column = torch.arange(attention.shape[-1], device=model.device)
            needle = (column >= spans[:, :1]) & (column < spans[:, 1:])  # [A, S]
            mass = (attention * needle).sum(-1)
            for scores, found in ((retrieval, top), (semantic, mass)):
                per_query = (found * recalled).double().sum(-1) / max(int(recalled.sum()), 1)
                scores[index] += per_query.view(heads, -1).amax(-1).cpu() / len(readings)
        report("reading attention", number + 1, len(readings))
    return retrieval, semantic


def look(model: TailModel, reading: Reading) -> tuple[list[Tensor], Tensor]:
    """One pass over a tail.

    Returns:
        Per layer the attention `[Q, A, S]` of the tokens that predict the answers, and whether each
        answer is the model's likeliest token, `[A]`.
    """
    rows: list[Tensor] = []
    hidden = model.embed(reading.ids)
    for index, layout in enumerate(model.layouts):
        dense = model.dense(index)

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            start: int,
            dense: Attend = dense,
            scaling: float = layout.scaling,
        ) -> Tensor:
            rows.append(answer_attention(q, k, reading, scaling))
            return dense(q, k, v, start)

        hidden = model.layer(index, hidden, reading, attend)
    predicted = model.log_probabilities(hidden, reading)[0].argmax(-1)
    return rows, predicted == reading.ids[reading.answers]


def answer_attention(q: Tensor, k: Tensor, reading: Reading, scaling: float) -> Tensor:
    """Attention rows of the queries that predict the answers, `[Q, A, S]` fp32.

    Args:
        q: `[1, Q, M, D]` of the tail, k: `[1, H, S, D]`, both rotated.
    """
    heads, columns = k.shape[1], k.shape[2]
    rows = reading.answers - 1
    queries = q[0, :, rows].unflatten(0, (heads, -1))  # [H, Q/H, A, D]
    scores = torch.matmul(queries.float() * scaling, k[0, :, None].float().transpose(-1, -2))
    future = torch.arange(columns, device=q.device) > (reading.start + rows)[:, None]
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1).flatten(0, 1)
