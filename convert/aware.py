"""Score-aware conversion of GQA to MLA: every choice is made by what it does to attention.

TransMLA (see `transmla.py`) keeps the rotation of the key components with the most energy, one per
frequency, and cuts the rank by the energy of keys and values. Here:

1. *Which rotations stay.* Without its rotation, component e of frequency l scores q* k where the
   model scores q* k e^{iθΔ}: wrong by the factor 1 - e^{iθΔ} at distance Δ. Its expected damage is

       I_{l,e} = λ_e( w_l^{1/2} G_l w_l^{1/2} ),
       w_{l,g} = Σ_{i in g} E|q_{i,l}|² · Σ_Δ m_i(Δ) |1 - e^{iθ_lΔ}|²

   with G_l the keys' second moment over heads (real and imaginary parts added up) and m_i the
   attention of head i by distance. The components with the largest damage stay, whatever their
   frequency; slow frequencies barely turn within the text and go first. The components diagonalise
   the damage: a key enters them through w^{1/2}, a query reads them through w^{-1/2}.
2. *One decomposition of unrotated keys and values*, in which a value counts by what the output
   projection makes of it, and a token by the attention that it gets: the principal directions of
   Σ_j a_j y_j y_jᵀ, y = [k̂ ; v], not those of Σ_j y_j y_jᵀ. Sinks weigh what they are worth.
3. *The output projection is solved anew* on lower layers that are converted already, for the
   original's attention output plus a share of what the hidden states have drifted since.

Everything but step 3 reads only :class:`LayerStatistics`, and is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvtool.attention import DenseAttention
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import BATCH, LayerStream, StreamedLayer
from kvtool.convert.transmla import NEGLIGIBLE, descending_eigh, key_gram
from kvtool.latent import FactoredAttention, LatentFactors, query_blocks
from kvtool.layout import AttentionLayout
from kvtool.rope import Rope

DRIFT = 0.5
"""Share of the hidden states' drift that the refitted output projection takes back."""
RIDGE = 0.1
"""Weight of staying at the original output projection, of the mean square of what goes in."""
SINKS = 4
"""First positions of a window that the refit leaves out."""


@dataclass(frozen=True)
class Components:
    """Key components of one layer by frequency l, those that need their rotation most first.

    Attributes:
        damage: `[N, H]`, I_{l,e}, descending in e.
        encode: `[N, H, H]`, row e combines the heads' keys of frequency l into component e.
        decode: `[N, H, H]`, row e: what component e adds to the key of each head.
    """

    damage: Tensor
    encode: Tensor
    decode: Tensor


def rope_components(statistics: LayerStatistics, layout: AttentionLayout, rope: Rope) -> Components:
    """Diagonalises the damage of dropped rotations, frequency by frequency."""
    heads, width = layout.kv_heads, layout.kv_heads * layout.head_dim
    gram = key_gram(statistics.joint_moment[:width, :width], heads)  # [H, N, H, N]
    gram = torch.einsum("hlgl->lhg", gram) / statistics.joint.tokens  # [N, H, H]
    power = statistics.queries.second.diagonal(dim1=-2, dim2=-1) / statistics.queries.tokens
    power = power.unflatten(-1, (2, -1)).sum(dim=1)  # [Q, N], E|q_{i,l}|²
    damage = power * turned(statistics.distance_mass, rope)
    weight = damage.unflatten(0, (heads, -1)).sum(dim=1).T  # [N, H]
    root = weight.clamp(min=NEGLIGIBLE * float(weight.max()) or 1.0).sqrt()
    weighted = root[:, :, None] * gram * root[:, None, :]
    eigenvalues, vectors = torch.linalg.eigh((weighted + weighted.mT) / 2)
    vectors = vectors.flip(-1).mT  # [N, component, head]
    encode, decode = vectors * root[:, None], vectors / root[:, None]
    length = encode.norm(dim=-1, keepdim=True)  # only the product of both has a meaning
    return Components(eigenvalues.flip(-1).clamp(min=0), encode / length, decode * length)


def turned(distance_mass: Tensor, rope: Rope) -> Tensor:
    """`[Q, N]`: Σ_Δ m(Δ) |1 - e^{iθΔ}|², m the attention by distance without the sinks.

    Args:
        distance_mass: `[Q, buckets]`, see `LayerStatistics.distance_mass`.
    """
    mass = distance_mass[:, :-1]
    mass = mass / mass.sum(dim=1, keepdim=True).clamp(min=NEGLIGIBLE)
    theta = rope.inv_freq.double()
    rows: list[Tensor] = [torch.zeros_like(theta)]  # a token does not turn against itself
    for bucket in range(mass.shape[1] - 1):
        distance = torch.arange(2**bucket, 2 ** (bucket + 1), dtype=torch.float64)
        rows.append(2 - 2 * torch.cos(distance[:, None] * theta).mean(dim=0))
    return mass @ torch.stack(rows)


def most_damaging(damage: Tensor, pairs: int) -> Tensor:
    """How many components of each frequency keep their rotation, `[N]`: the largest, pooled."""
    kept = torch.zeros(damage.numel(), dtype=torch.long)
    kept[damage.flatten().topk(pairs).indices] = 1
    return kept.view_as(damage).sum(dim=1)


def shared_by_layers(layers: Sequence[Components], pairs: int) -> Tensor:
    """The same, one choice for all layers: for engines with one list of frequencies."""
    share = [layer.damage / layer.damage.sum().clamp(min=NEGLIGIBLE) for layer in layers]
    return most_damaging(torch.stack(share).sum(dim=0), pairs)


def one_per_frequency(head_dim: int, rope_dim: int) -> Tensor:
    """The same for engines whose frequencies are θ^(-2i/d_r): one component each, `[N]`."""
    kept = torch.zeros(head_dim // 2, dtype=torch.long)
    kept[:: head_dim // rope_dim] = 1
    return kept


@dataclass(frozen=True)
class Basis:
    """The components that keep their rotation.

    Attributes:
        encode: `[d_r, K]`; row p and row p + d_r/2 are the pair of `frequency[p]`.
        decode: `[d_r, K]`; the keys that lose their rotation are k̂ - decodeᵀ encode k̂.
        frequency: `[d_r/2]`, index into the model's frequencies, ascending.
    """

    encode: Tensor
    decode: Tensor
    frequency: Tensor


def basis_of(components: Components, kept: Tensor) -> Basis:
    """Takes the first `kept[l]` components of each frequency l."""
    pairs, heads = components.damage.shape
    channel = torch.arange(heads * 2 * pairs).view(heads, 2, pairs)
    frequency = torch.repeat_interleave(torch.arange(pairs), kept)
    rope_dim = 2 * len(frequency)
    encode = torch.zeros(rope_dim, heads * 2 * pairs, dtype=torch.float64)
    decode = torch.zeros_like(encode)
    first = torch.cumsum(kept, dim=0) - kept
    for row, at in enumerate(frequency.tolist()):
        e = row - int(first[at])
        for part in (0, 1):  # the same combination for real and imaginary parts
            pair = row + part * (rope_dim // 2)
            encode[pair, channel[:, part, at]] = components.encode[at, e]
            decode[pair, channel[:, part, at]] = components.decode[at, e]
    return Basis(encode, decode, frequency)


def latent_factors(
    statistics: LayerStatistics, basis: Basis, output: Tensor, rope: Rope, rank: int
) -> LatentFactors:
    """The joint decomposition.

    Args:
        output: `[hidden, Q·D]`, weight of the output projection.
        rank: r, at most 2K - d_r; equality loses nothing. Directions that carry only rounding
            noise are left out, so the result may be narrower.
    """
    size = statistics.queries.mean.shape[-1]
    heads = basis.encode.shape[1] // size
    values = square_root(value_weight(output, heads, size))
    alpha = balance(statistics, basis, values[0])
    identity = torch.eye(len(values[0]), dtype=torch.float64)
    keys = (alpha * identity, identity / alpha)
    return decompose(statistics.attended, basis, keys, values, rope, rank, heads)


def balance(statistics: LayerStatistics, basis: Basis, values: Tensor) -> float:
    """What keys are scaled by: total variances of keys and weighted values are then the same.

    A weighting of keys by the queries' second moment, and other balances, were measured and did not
    help: `benchmarks/mla_ablation.py`.

    Args:
        values: `[K, K]`, what values are multiplied by.
    """
    # Of all tokens alike: sinks, which get most of the attention, have extraordinary keys.
    width = len(values)
    moment = statistics.joint.second
    lost = torch.eye(width, dtype=torch.float64) - basis.decode.T @ basis.encode
    keys_power = float((lost @ moment[:width, :width] @ lost.T).trace())
    values_power = float((values @ moment[width:, width:] @ values).trace())
    # Where every key keeps its rotation, rounding noise is left of them.
    rotated = keys_power <= NEGLIGIBLE * float(moment[:width, :width].trace())
    return 1.0 if rotated or not values_power else (values_power / keys_power) ** 0.5


def decompose(
    moment: Tensor,
    basis: Basis,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    rope: Rope,
    rank: int,
    heads: int,
) -> LatentFactors:
    """Principal directions of `moment [2K, 2K]` under weights of keys and values.

    Args:
        keys, values: Each a weight `[K, K]` and its inverse.
    """
    rope_dim, width = basis.encode.shape
    identity = torch.eye(width, dtype=torch.float64)
    unrotated = torch.block_diag(identity - basis.decode.T @ basis.encode, identity)
    weigh = torch.block_diag(keys[0], values[0]) @ unrotated
    eigenvalues, vectors = descending_eigh(weigh @ moment @ weigh.T)
    used = int((eigenvalues > NEGLIGIBLE * eigenvalues[0]).sum())
    principal = vectors[:, : min(rank, max(used, 1), 2 * width - rope_dim)]  # [2K, r]
    down, up = principal.T @ weigh, torch.block_diag(keys[1], values[1]) @ principal
    length = down.norm(dim=1)  # only the product of both has a meaning
    down, up = down / length[:, None], up * length
    # RoPE of the yarn kind also scales its cos and sin; an unrotated score needs that factor too.
    key_up, value_up = up[:width] * rope.scale**2, up[width:]
    return LatentFactors(
        rope=basis.encode,
        rope_query=query_blocks(basis.decode, heads),
        inv_freq=rope.inv_freq[basis.frequency],
        down=down,
        key_up=key_up.view(heads, -1, key_up.shape[1]),
        value_up=value_up.view(heads, -1, value_up.shape[1]),
    )


def value_weight(output: Tensor, heads: int, size: int) -> Tensor:
    """`[K, K]`: Σ W_o,iᵀ W_o,i over the query heads i that read a value, head by head."""
    blocks = output.double().unflatten(1, (heads, -1, size))  # [hidden, H, g, D]
    grams = torch.einsum("ohgd,ohge->hde", blocks, blocks)
    weight: Tensor = torch.block_diag(*grams)
    return weight


def square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric matrix, and its inverse, with small eigenvalues lifted."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    values = eigenvalues.clamp(min=1e-6 * float(eigenvalues.max()) or 1.0).sqrt()
    roots: Tensor = (vectors * values) @ vectors.T
    return roots, (vectors / values) @ vectors.T


# --------------------------------------------------------------- on layers converted already


@torch.inference_mode()
def refit_output(
    stream: LayerStream,
    layer: StreamedLayer,
    stages: FactoredAttention | DenseAttention,
    original: Tensor,
    converted: Tensor,
) -> Tensor:
    """The output projection that does best on what the converted layers below hand over.

    With z what it reads in the converted model, a the attention's output in the original, and
    h, h~ the hidden states before the layer, it is

        argmin_W Σ ‖W z - (a + DRIFT (h - h~))‖² + RIDGE · tr(Σ z zᵀ)/dim · ‖W - W_o‖²

    over all positions but the first few, whose hidden states are larger than all others.

    Args:
        stages: The converted attention of the layer; its output projection is replaced.
        original, converted: Hidden states `[N, T, hidden]` before the layer; both go through it,
            in place.

    Returns:
        `[hidden, Q·D]` float32.
    """
    drift = DRIFT * (original - converted)
    outputs: list[Tensor] = []
    exact = stream.exact_attention(layer)

    def watched(hidden: Tensor) -> Tensor:
        outputs.append(exact(hidden))
        return outputs[-1]

    layer.run(original, watched)
    before = stages.gqa.o_proj.weight.double()
    bias = stages.gqa.o_proj.bias
    width = before.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, before.shape[0], dtype=torch.float64)
    contexts = []
    pieces = zip(converted.split(BATCH), outputs, drift.split(BATCH), strict=True)
    for hidden, output, missing in pieces:
        z = stages.context(layer.normed(hidden), stream.rope.scale).flatten(2)
        contexts.append(z)
        target = output + missing if bias is None else output + missing - bias
        z, target = z[:, SINKS:].flatten(0, 1), target[:, SINKS:].flatten(0, 1)
        gram += (z.T @ z).double()
        cross += (z.T @ target).double()
    # A layer may give nothing at all: then the projection stays.
    size = (RIDGE * gram.diagonal().mean()).clamp(min=NEGLIGIBLE)
    ridge = size * torch.eye(width, dtype=torch.float64)
    weight: Tensor = torch.linalg.solve(gram + ridge, cross + ridge @ before.T).T.float()
    stages.gqa.o_proj.weight = nn.Parameter(weight, requires_grad=False)
    ready = iter(contexts)
    layer.run(converted, lambda _: stages.gqa.o_proj(next(ready)))
    return weight
