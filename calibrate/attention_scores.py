"""Scores read off the attention of a model that recalls: no gradient, one pass over the tail.

* *Retrieval score* (Wu et al., arXiv 2404.15574): the share of recalled tokens at which the head's
  most attended position is one of the needle that holds the very token being copied.
* *Semantic retrieval score* (CompressKV, arXiv 2508.02401): the attention mass that the head puts
  on the whole needle while its tokens are recalled, which also credits heads that look around. Here
  the needle is what is asked for, without the sentence that introduces it.

Both count only tokens that the model itself recalls. They are defined per query head; a KV head is
needed when any head of its group needs it, so its score is their maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.calibrate.tail import Attend, Reading, TailModel
from kvtool.kernels.sink_logits import softmax
from kvtool.layout import with_heads
from kvtool.progress import Progress, telling


@torch.no_grad()
def attention_scores(
    model: TailModel, readings: Sequence[Reading], report: Progress
) -> tuple[Tensor, Tensor]:
    """Retrieval and semantic retrieval scores of every KV head, each `[L, H]` float64 in [0, 1]."""
    retrieval, semantic = (
        [torch.zeros(layout.heads, dtype=torch.float64) for layout in model.layouts]
        for _ in range(2)
    )
    for reading in telling(report, "reading attention", readings, len(readings)):
        rows, recalled = look(model, reading)
        sample = reading.sample
        text = torch.cat((sample.context, sample.tail)).to(model.device)
        spans = sample.spans[sample.answers].to(model.device)  # [A, 2]
        column = torch.arange(len(text), device=model.device)
        needle = (column >= spans[:, :1]) & (column < spans[:, 1:])  # [A, S]
        copied = needle & (text == reading.ids[reading.answers][:, None])
        for index, attention in rows.items():  # [Q, A, S]
            top = F.one_hot(attention.argmax(-1), len(text)).bool()
            for scores, found in ((retrieval, top & copied), (semantic, attention * needle)):
                per_query = (found.sum(-1) * recalled).double().sum(-1)
                scores[index] += per_query.cpu() / max(int(recalled.sum()), 1) / len(readings)

    def of_groups(scores: Sequence[Tensor]) -> Tensor:
        """0 of layers that see no whole past."""
        heads = with_heads(model.layouts).kv_heads
        found = torch.zeros(len(scores), heads, dtype=torch.float64)
        for index in (i for i, layout in enumerate(model.layouts) if layout.sees_all):
            found[index] = scores[index].view(heads, -1).amax(-1)
        return found

    return of_groups(retrieval), of_groups(semantic)


def look(model: TailModel, reading: Reading) -> tuple[dict[int, Tensor], Tensor]:
    """One pass over a tail.

    Returns:
        By layer that sees the whole past the attention `[Q, A, S]` of the tokens that predict the
        answers, and whether each answer is the model's likeliest token, `[A]`.
    """
    rows: dict[int, Tensor] = {}
    hidden = model.embed(reading.ids)
    for index, layout in enumerate(model.layouts):
        dense = model.dense(index)

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            start: int,
            index: int = index,
            dense: Attend = dense,
            scaling: float = layout.scaling,
        ) -> Tensor:
            if model.layouts[index].sees_all:
                logits = model.sink_logits(index)
                rows[index] = answer_attention(q, k, reading, scaling, logits)
            return dense(q, k, v, start)

        hidden = model.layer(index, hidden, reading, attend)
    predicted = model.log_probabilities(hidden, reading)[0].argmax(-1)
    return rows, predicted == reading.ids[reading.answers]


def answer_attention(
    q: Tensor, k: Tensor, reading: Reading, scaling: float, sink_logits: Tensor | None = None
) -> Tensor:
    """Attention rows of the queries that predict the answers, `[Q, A, S]` fp32.

    Args:
        q: `[1, Q, M, D]` of the tail, k: `[1, H, S, D]`, both rotated.
        sink_logits: `[Q]`, see `kernels/sink_logits`.
    """
    heads, columns = k.shape[1], k.shape[2]
    rows = reading.answers - 1
    queries = q[0, :, rows].unflatten(0, (heads, -1))  # [H, Q/H, A, D]
    scores = torch.matmul(queries.float() * scaling, k[0, :, None].float().transpose(-1, -2))
    future = torch.arange(columns, device=q.device) > (reading.start + rows)[:, None]
    return softmax(scores.masked_fill(future, -torch.inf), sink_logits).flatten(0, 1)
