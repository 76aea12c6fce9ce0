"""Decode attention over codes of keys before RoPE, in plain torch: the contract.

The key of the token at position t is

    k_t = RoPE_t(z_t W + μ),

with its code z_t, and the decoder W and mean μ of the KV head. RoPE turns every token differently,
so W cannot be absorbed into the query: keys are rebuilt whenever they are read. Values are read as
codes, too, and nothing turns them: what comes out is a sum of codes, to be decoded once.
"""

import torch
from torch import Tensor


def rebuild_decode_attention(
    q: Tensor,
    codes: Tensor,
    decoder: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
    first: int = 0,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query per row and head over the tokens `first` to `length - 1`.

    A token's position is its index. What lies outside the tokens of a row is never used.

    Args:
        q: `[B, Q, D]`, rotated; D even.
        codes: `[P, H, page, R]`, a code for each KV head; or `[P, 1, page, R]`, one for all.
        decoder: `[H, R, D]`, W; in the dtype of the codes.
        values: `[P, H or 1, page, Rv]`, codes of values.
        cos, sin: `[S, D]`, at positions 0, 1, ..., both halves the same; S >= all lengths.
        lengths: `[B]` or `[B, H]` int32.
        scaling: Factor on the scores.
        table: `[B, pages]` int32: token t of row b lies in page `table[b, t // page]`. Without one,
            row b is page b.
        first: Tokens that are left out at the start.
        mean: `[H, D]`, μ; zero if not given.

    Returns:
        `[B, Q, Rv]`, and the logarithm of the sum of `exp(score)`, `[B, Q]` fp32: zeros and -inf
        where there was nothing to read.
    """
    rows, query_heads, width = q.shape
    heads, page = decoder.shape[0], codes.shape[2]
    group = query_heads // heads
    out = q.new_zeros((rows, query_heads, values.shape[-1]))
    lse = q.new_full((rows, query_heads), -torch.inf, dtype=torch.float32)
    per_head = lengths[:, None].expand(rows, heads) if lengths.dim() == 1 else lengths
    for b, of_row in enumerate(per_head.tolist()):
        for h, n in enumerate(of_row):
            if n <= first:
                continue
            at = torch.arange(first, n, device=q.device)
            pages = table[b, at // page].long() if table is not None else torch.full_like(at, b)
            within = at % page if table is not None else at
            z = codes[pages, min(h, codes.shape[1] - 1), within].float()  # [S, R]
            k = z @ decoder[h].float()
            if mean is not None:
                k += mean[h]
            real, imag = k.split(width // 2, dim=-1)
            k = k * cos[at].float() + torch.cat((-imag, real), dim=-1) * sin[at].float()
            v = values[pages, min(h, values.shape[1] - 1), within].float()
            own = slice(h * group, (h + 1) * group)
            scores = scaling * q[b, own].float() @ k.T
            lse[b, own] = scores.logsumexp(-1)
            out[b, own] = (scores.softmax(-1) @ v).to(out.dtype)
    return out, lse
