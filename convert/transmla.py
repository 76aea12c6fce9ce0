"""TransMLA (Meng et al., NeurIPS 2025, arXiv 2502.07864): GQA to MLA in closed form.

1. *Merge*: the keys of all H heads are one vector k̂ of width K = H·D; query head i reads its block.
2. *RoRoPE* (section 4.2): a rotation that mixes heads, the same for the real and the imaginary part
   of a frequency, commutes with RoPE. Per band of F neighbouring frequencies (*FreqFold*), PCA
   gathers the key energy in a few components; those keep RoPE, the others lose it.
3. *BKV* (section 4.3): unrotated keys are scaled to the norm of the values, then one PCA
   over [k_nope/α ; v] gives the latent.

All algebra is float64, on uncentred second moments, as published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.calibrate.stream import Attention, LayerStream, StreamedLayer
from kvtool.latent import LatentFactors, query_blocks
from kvtool.progress import Progress
from kvtool.rope import Rope, rotate

NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue below which a latent direction is rounding noise."""


class RotatedBasis:
    """RoRoPE with FreqFold for one layer: which key components keep their rotation.

    Attributes:
        rope: `[d_r, K]`, orthonormal rows; row p and row p + d_r/2 are the pair of `frequency[p]`.
        frequency: `[d_r/2]`, index into the model's frequencies.
        kept: Share of the key energy in the rows of `rope`.
    """

    def __init__(self, gram: Tensor, rope_dim: int, fold: int) -> None:
        """Finds the basis.

        Args:
            gram: `[H, N, H, N]` float64, Σ over tokens and {real, imag} of k̂[h, l] k̂[h', l'].
            rope_dim: d_r; D must be a multiple of it (D / d_r is the paper's *collapse* c).
            fold: F, a multiple of c that divides N.
        """
        heads, pairs = gram.shape[:2]
        collapse = 2 * pairs // rope_dim
        width, kept_per_band = heads * 2 * pairs, fold // collapse
        channel = torch.arange(width).view(heads, 2, pairs)
        rope = torch.zeros(rope_dim, width, dtype=torch.float64)
        frequency = torch.empty(rope_dim // 2, dtype=torch.long)
        energy = 0.0
        for band in range(pairs // fold):
            within = slice(band * fold, (band + 1) * fold)
            moment = gram[:, within, :, within].reshape(heads * fold, heads * fold)
            eigenvalues, vectors = descending_eigh(moment)
            for j in range(kept_per_band):
                row = band * kept_per_band + j
                for part in (0, 1):  # the same combination for real and imaginary parts
                    columns = channel[:, part, within].flatten()
                    rope[row + part * (rope_dim // 2), columns] = vectors[:, j]
                # Exact for F = c = 1; otherwise component j takes its band's frequency c·j.
                frequency[row] = band * fold + collapse * j
                energy += float(eigenvalues[j])
        self.rope, self.frequency = rope, frequency
        total = float(torch.einsum("hlhl->", gram))
        self.kept = energy / total if total else 1.0

    def inv_freq(self, rope: Rope) -> Tensor:
        """Frequencies `[d_r/2]` of the kept components."""
        return rope.inv_freq[self.frequency]


def key_gram(moment: Tensor, heads: int) -> Tensor:
    """`[H, N, H, N]`, the two parts of each pair added up.

    Args:
        moment: `[K, K]` float64, second moment of k̂.
        heads: H.
    """
    parts = moment.view(heads, 2, -1, heads, 2, moment.shape[0] // heads // 2)
    return parts[:, 0, :, :, 0] + parts[:, 1, :, :, 1]


def descending_eigh(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a symmetric matrix, largest first, with a fixed sign."""
    eigenvalues, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    pivot = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return eigenvalues, vectors * pivot.sign()


def latent_factors(
    moment: Tensor, basis: RotatedBasis, rope: Rope, heads: int, rank: int
) -> LatentFactors:
    """BKV, with norms of keys and values made equal, and joint PCA.

    Args:
        moment: `[2K, 2K]` float64, second moment of [k̂ ; v].
        heads: H.
        rank: r, at most 2K - d_r; equality loses nothing. Directions that carry only rounding
            noise are left out, so the result may be narrower.
    """
    width = moment.shape[0] // 2
    nope = complement(basis.rope)  # [K - d_r, K]
    keys_norm = _mean_column_norm(nope @ moment[:width, :width] @ nope.T)
    values_norm = _mean_column_norm(moment[width:, width:])
    alpha = keys_norm / values_norm if keys_norm and values_norm else 1.0
    merge = torch.block_diag(nope / alpha, torch.eye(width, dtype=torch.float64))
    eigenvalues, vectors = descending_eigh(merge @ moment @ merge.T)
    used = int((eigenvalues > NEGLIGIBLE * eigenvalues[0]).sum())
    rank = min(rank, max(used, 1))  # no engine has a latent of width 0
    principal = vectors[:, :rank]  # [2K - d_r, r]
    from_keys, from_values = principal.split([nope.shape[0], width])
    # RoPE of the yarn kind also scales its cos and sin; an unrotated score needs that factor too.
    key_up = alpha * rope.scale**2 * nope.T @ from_keys  # [K, r]
    return LatentFactors(
        rope=basis.rope,
        rope_query=query_blocks(basis.rope, heads),
        inv_freq=basis.inv_freq(rope),
        down=principal.T @ merge,
        key_up=key_up.view(heads, -1, rank),
        value_up=from_values.reshape(heads, -1, rank),
    )


def complement(rope: Tensor) -> Tensor:
    """Orthonormal rows `[K - d_r, K]` that span what the rows of `rope` leave."""
    residual = torch.eye(rope.shape[1], dtype=torch.float64) - rope.T @ rope
    _, vectors = descending_eigh(residual)
    return vectors[:, : rope.shape[1] - rope.shape[0]].T.contiguous()


def _mean_column_norm(moment: Tensor) -> float:
    if not len(moment):
        return 0.0
    return float(moment.diagonal().clamp(min=0).sqrt().mean())


def partial_rope_attention(
    stream: LayerStream, layer: StreamedLayer, basis: RotatedBasis
) -> Attention:
    """The layer with RoPE on the kept components only, and no rank cut."""
    stages, layout = layer.attention, layer.attention.layout
    rope = basis.rope.float()
    blocks = rope.view(rope.shape[0], layout.kv_heads, layout.head_dim)
    inv_freq = basis.inv_freq(stream.rope)

    def attention(hidden: Tensor) -> Tensor:
        q, k, v = stages.project(hidden)
        q, k = stages.normalise(q, k)
        cos, sin = Rope(inv_freq, stream.rope.scale).tables(torch.arange(hidden.shape[1]))
        grouped = q.unflatten(1, (layout.kv_heads, -1))  # [B, H, g, T, D]
        q_pe = torch.einsum("bhgtd,rhd->bhgtr", grouped, blocks).flatten(1, 2)
        k_pe = torch.einsum("bhtd,rhd->btr", k, blocks)
        k_nope = k - torch.einsum("btr,rhd->bhtd", k_pe, blocks)
        shared = rotate(k_pe, cos, sin)[:, None].expand(-1, layout.kv_heads, -1, -1)
        scale = stream.rope.scale**2
        context = causal_attention(
            torch.cat((q * scale, rotate(q_pe, cos, sin)), dim=-1),
            torch.cat((k_nope, shared), dim=-1),
            v,
            layout.scaling,
        )
        return stages.output(context, hidden)

    return attention


def measure_gram(stream: LayerStream, layer: StreamedLayer, hidden: Tensor) -> Tensor:
    """`key_gram` of a layer over `hidden [N, T, hidden]`, which goes through the layer."""
    layout = layer.attention.layout
    width = layout.kv_heads * layout.head_dim
    moment = torch.zeros(width, width, dtype=torch.float64)

    def observe(q: Tensor, k: Tensor, v: Tensor) -> None:
        keys = k.transpose(1, 2).flatten(2).flatten(0, 1).double()  # [tokens, K]
        moment.addmm_(keys.T, keys)

    layer.run(hidden, stream.exact_attention(layer, observe))
    return key_gram(moment, layout.kv_heads)


def choose_freqfold(
    stream: LayerStream, ids: Tensor, rope_dim: int, candidates: list[int], report: Progress
) -> int:
    """FreqFold's automatic F: doubled while the perplexity without the other RoPE improves.

    All candidates go through the model together, layer by layer.

    Args:
        ids: `[N, T]` calibration tokens.
        candidates: Ascending.
    """
    original = stream.embed(ids)
    folded = {fold: original.clone() for fold in candidates}
    for index in range(len(stream)):
        layer = stream.layer(index)
        gram = measure_gram(stream, layer, original)
        for fold, hidden in folded.items():
            basis = RotatedBasis(gram, rope_dim, fold)
            layer.run(hidden, partial_rope_attention(stream, layer, basis))
        report("choosing FreqFold", index + 1, len(stream))
    best, lowest = candidates[0], float("inf")
    for fold in candidates:
        loss = next_token_loss(stream, folded[fold], ids)
        if loss >= lowest:
            break
        best, lowest = fold, loss
    return best


def next_token_loss(stream: LayerStream, hidden: Tensor, ids: Tensor) -> float:
    """Mean cross entropy in nats of `ids [N, T]` given final hidden states `[N, T, hidden]`."""
    losses = [
        F.cross_entropy(stream.logits(window[:-1]), tokens[1:])
        for window, tokens in zip(hidden, ids, strict=True)
    ]
    return float(torch.stack(losses).mean())
