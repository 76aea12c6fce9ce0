"""One new query per row against cached latents, in absorbed form.

The latent is the value too, so both operations are decode attention whose values are the first
columns of the keys: :func:`paged_latent_attention` loads every latent once for both.
"""

from torch import Tensor

from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.kernels.latent_attention.reference import latent_decode_attention

__all__ = ["latent_decode_attention", "paged_latent_attention"]


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
