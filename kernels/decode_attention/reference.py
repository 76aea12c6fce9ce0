"""Decode attention in plain torch: the contract, and the path without a C compiler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.kernels.sink_logits import attention, softmax


def paged_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor | int,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    rings: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row and head over the tokens `first` to `length - 1`.

    Nothing depends on the number or the order of the pages. What lies outside the tokens of a row
    is never used.

    Args:
        q: `[B, Q, D]`, rotated.
        keys: `[P, H, page, D]`, rotated, H divides Q.
        values: `[P, H, page, Dv]`; or Dv, when they are the first Dv columns of the keys.
        lengths: `[B]` or `[B, H]` int32; none may be read where a length is at most `first`.
        scaling: Factor on the scores.
        table: `[B, pages]` int32: token t of row b lies in page `table[b, t // page]`. Without one,
            row b is page b.
        first: Tokens that are left out at the start.
        bias: `[P, H, page]`, added to the scaled scores (as for merged tokens, the logarithm of
            how many they are).
        out: `[B, Q, Dv]` for the result, which may be a part of the heads of a larger one.
        sink_logits: `[Q]` or `[B, Q]`, a logit of each head that joins the softmax and has no value
            (`kernels/sink_logits`).
        scales: `[H]` fp32 each: what keys and values are multiplied by, which may be in e4m3 then.
        rings: Keys and values `[R, H', C, D and Dv]` of H' heads more, behind those in pages, whose
            tokens lie side by side; and in which of the R places those of each row do, `[B]` int32.
            Then there is a table, H + H' divides Q, lengths are `[B, H + H']`, and neither bias nor
            scales are given.

    Returns:
        `[B, Q, Dv]`, and the logarithm of the sum of `exp(score)`, `[B, Q]` fp32, the logit being
        one of the scores: zeros and -inf where there was nothing to read, and no logit.
    """
    rows, query_heads = q.shape[:2]
    heads, page = keys.shape[1:3]
    v_width = values if isinstance(values, int) else values.shape[-1]
    out = q.new_empty((rows, query_heads, v_width)) if out is None else out
    if rings is not None:
        ring_keys, ring_values, places = rings
        cut = query_heads // (heads + ring_keys.shape[1]) * heads
        sinks: Sequence[Tensor | None] = (None, None)
        if sink_logits is not None:
            sinks = sink_logits[..., :cut], sink_logits[..., cut:]
        _, lse = paged_decode_attention(
            q[:, :cut], keys, values, lengths[:, :heads], scaling, table, first,
            out=out[:, :cut], sink_logits=sinks[0],
        )  # fmt: skip
        _, more = paged_decode_attention(
            q[:, cut:], ring_keys, ring_values, lengths[:, heads:], scaling, places[:, None], first,
            out=out[:, cut:], sink_logits=sinks[1],
        )  # fmt: skip
        return out, torch.cat((lse, more), dim=1)
    group = query_heads // heads
    out.zero_()
    lse = q.new_full((rows, query_heads), -torch.inf, dtype=torch.float32)
    if sink_logits is not None:
        lse.copy_(sink_logits)
    per_head = lengths[:, None].expand(rows, heads) if lengths.dim() == 1 else lengths
    for b, of_row in enumerate(per_head.tolist()):
        for h, n in enumerate(of_row):
            if n <= first:
                continue
            at = torch.arange(first, n, device=q.device)
            pages = table[b, at // page].long() if table is not None else torch.full_like(at, b)
            within = at % page if table is not None else at
            k = keys[pages, h, within].float()  # [S, D]
            v = k[:, :v_width] if isinstance(values, int) else values[pages, h, within].float()
            if scales is not None:
                k, v = k * scales[0][h], v * scales[1][h]
            own = slice(h * group, (h + 1) * group)
            scores = scaling * q[b, own].float() @ k.T
            if bias is not None:
                scores += bias[pages, h, within].float()
            logits = None if sink_logits is None else lse[b, own].clone()
            lse[b, own] = torch.logaddexp(lse[b, own], scores.logsumexp(-1))
            out[b, own] = (softmax(scores, logits) @ v).to(out.dtype)
    return out, lse


def merge(parts: Sequence[Tensor], masses: Sequence[Tensor]) -> Tensor:
    """What attention over several sets of tokens gives, from what it gave over each.

    Args:
        parts: `[B, Q, D]` each.
        masses: `[B, Q]` each, the log-sum-exp of their scores; some set has a token.
    """
    shares = torch.softmax(torch.stack(list(masses)), dim=0)[..., None]
    return (torch.stack(list(parts)) * shares).sum(0).to(parts[0].dtype)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    scaling: float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query per sequence over the first `lengths[b]` cached tokens.

    Args:
        q: `[B, Q, D]`, rotated.
        keys: `[B, H, capacity, D]`, rotated; what lies past `lengths[b]` is never read.
        values: `[B, H, capacity, Dv]`.
        lengths: Tokens of each sequence, the current one included; all >= 1.
        scaling: Factor on the scores.
        sink_logits: `[Q]`, see :func:`paged_decode_attention`.

    Returns:
        `[B, Q, Dv]`.
    """
    if len(set(lengths)) > 1:  # a view per sequence beats a padded copy with a mask
        parts = zip(q.split(1), keys.split(1), values.split(1), lengths, strict=True)
        rows = [decode_attention(a, k, v, [n], scaling, sink_logits) for a, k, v, n in parts]
        return torch.cat(rows)
    n = lengths[0]
    batch, heads = keys.shape[:2]
    # The query heads of a KV head are queries of one call, so keys and values are read once.
    grouped = q.view(batch, heads, -1, q.shape[-1])  # [B, H, Q/H, D]
    context = attention(grouped, keys[:, :, :n], values[:, :, :n], None, scaling, sink_logits)
    return context.flatten(1, 2)
