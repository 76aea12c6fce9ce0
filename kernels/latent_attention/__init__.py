"""One new query per row against cached latents, in absorbed form.

The latent is the value too, so all operations are decode attention whose values are the first
columns of the keys: :func:`paged_latent_attention` loads every latent once for both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.kernels.decode_attention import Run, decode_runs, fits, paged_decode_attention
from kvtool.kernels.latent_attention import reference

__all__ = ["latent_decode_attention", "latent_decode_rows", "paged_latent_attention"]


def latent_decode_attention(
    q: Tensor, latents: Tensor, rank: int, lengths: Sequence[int], scaling: float
) -> Tensor:
    """See :func:`kvtool.kernels.latent_attention.reference.latent_decode_attention`."""
    if fits(q, latents, latents[..., :rank]):
        return latent_decode_rows(q, latents.split(1), rank, lengths, scaling)
    return reference.latent_decode_attention(q, latents, rank, lengths, scaling)


def latent_decode_rows(
    q: Tensor, latents: Sequence[Tensor], rank: int, lengths: Sequence[int], scaling: float
) -> Tensor:
    """The same with a tensor `[1, ·, r + d_r]` for each row."""
    if all(fits(q, x, x[..., :rank]) for x in latents):
        pairs = zip(latents, lengths, strict=True)
        read = [[Run(x, x[..., :rank], n)] for x, n in pairs]
        return decode_runs(q, read, 1, scaling)[0]
    rows = zip(q.split(1), latents, lengths, strict=True)
    contract = reference.latent_decode_attention
    return torch.cat([contract(x, own, rank, [n], scaling) for x, own, n in rows])


def paged_latent_attention(
    q: Tensor,
    latents: Tensor,
    rank: int,
    lengths: Tensor,
    scaling: float,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one absorbed query per head over the tokens of a row.

    Args:
        q: `[B, Q, r + d_r]`: absorbed content query, then rotated RoPE query.
        latents: `[P, page, r + d_r]`.
        rank: r, the width of the part that is also the value.
        lengths, scaling, table: As in :func:`paged_decode_attention`.

    Returns:
        `[B, Q, r]`, to be multiplied by the value up-projection, and the log-sum-exp `[B, Q]`.
    """
    return paged_decode_attention(q, latents[:, None], rank, lengths, scaling, table)
