"""Fewer KV heads: groups of t heads become one, after "Effectively Compress KV Heads".

Yu et al., arXiv 2406.07056, compress the cache of t heads by its principal directions and fold the
encoder into the group's key and value projections, the decoder into those of its queries and its
outputs. With y = [y_1 ; ... ; y_t] what the heads of a group cache of a token, E the encoder and
F_g the part of the decoder that rebuilds head g, they take y_g to be F_g Eᴴ y.

*Values.* v' = Eᵀ v goes into `v_proj`, W_o,i F_g(i) into `o_proj` for every query head i. What is
lost of the outputs is least for the principal directions U of the moment that the output projection
and the attention weigh,

    G^{1/2} (Σ_j a_j v_j v_jᵀ) G^{1/2} = U Λ Uᵀ,   E = G^{1/2} U_D,   F = G^{-1/2} U_D,

with G the Gram matrices Σ_{i in g} W_o,iᵀ W_o,i of the heads side by side and a_j the attention
that token j gets. (The paper's *SVD-a* has G = 1 and a_j = 1.)

*Keys.* A decoder of keys cannot pass RoPE and be folded into the queries, which is why the paper
applies it at run time. It can where it commutes with RoPE: component l of a key is one complex
number κ_l, which RoPE multiplies by e^{iθ_l p}, in all heads alike. So heads are combined component
by component, with complex coefficients,

    κ'_l = u_lᴴ κ_l,   κ̂_l = d_l κ'_l,   q_{i,l} -> conj(d_{g(i),l}) q_{i,l},   u_l, d_l in C^t,

and everything stays a stock model. Averaged over distances, a score's error is that of each
component by itself, times the power of the queries that read it; with v the top eigenvector,

    w_l^{1/2} E[κ_l κ_lᴴ] w_l^{1/2} v = λ v,   u_l = w_l^{1/2} v,   d_l = w_l^{-1/2} v,
    w_{l,g} = Σ_{i in g} E|q_{i,l}|².

*Groups* of consecutive heads are the paper's. Any other costs nothing, as query heads may change
places with the columns of `o_proj`: heads are exchanged between groups while that lowers what is
lost when two of them are merged, added up over the pairs within groups.

*Refits.* Components are not independent of each other, and a score matters as far as attention
looks at it. So the d of every query head are solved anew on the text (:func:`refit_queries`), which
is still one linear system per head; and `o_proj` is on the layers converted below, as in `aware`.

All algebra is float64. Everything but the refits reads only :class:`LayerStatistics`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate.statistics_file import LayerStatistics, Statistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.convert.aware import SINKS, square_root, value_weight
from kvtool.convert.fitting import Conversion, ConvertedLayer, Fit
from kvtool.convert.planning import save_dtype
from kvtool.convert.transmla import NEGLIGIBLE, descending_eigh
from kvtool.layout import AttentionLayout

WINDOWS = 4
"""Of the calibration text, on which queries are refitted."""
EVERY = 32
"""One query in so many is looked at there."""
EVENLY = 0.2
"""Share of the weight that all keys get alike, so that rarely attended ones are not forgotten."""
RIDGE = 0.01
"""Weight of staying at the queries of the merge, of the mean square of what is summed up."""
_ROWS = 16  # queries whose scores are taken apart at once


@dataclass(frozen=True)
class Merge:
    """How the H KV heads of a layer become N = H/t.

    Attributes:
        heads: `[N, t]`, the KV heads of each group.
        key_encode: `[N, t, D/2]` complex128, u.
        key_decode: `[N, t, Q/H, D/2]` complex128, d; each query head has its own after the refit.
        value_encode, value_decode: `[N, t, D, D]` float64, E and F by head:
            v' = Σ_g value_encode[g]ᵀ v_g, and v_g is taken to be value_decode[g] v'.
    """

    heads: Tensor
    key_encode: Tensor
    key_decode: Tensor
    value_encode: Tensor
    value_decode: Tensor


def merge(
    statistics: LayerStatistics, layout: AttentionLayout, output: Tensor, kv_heads: int
) -> Merge:
    """The merge of one layer that loses least.

    Args:
        output: `[hidden, Q·D]`, weight of the output projection.
        kv_heads: N, a divisor of H.
    """
    heads, size = layout.kv_heads, layout.head_dim
    width = heads * size
    power = query_power(statistics, heads)
    keys = key_moments(statistics.joint.second[:width, :width], heads)
    values = statistics.attended[width:, width:]
    found = merge_heads(keys, power, values, value_weight(output, heads, size), kv_heads)
    shared = found.key_decode.expand(-1, -1, layout.heads // heads, -1)
    return replace(found, key_decode=shared)


def query_power(statistics: LayerStatistics, heads: int) -> Tensor:
    """`[D/2, H]`: w_{l,g}, the power of the queries that read component l of KV head g."""
    power = statistics.queries.second.diagonal(dim1=-2, dim2=-1) / statistics.queries.tokens
    power = power.unflatten(-1, (2, -1)).sum(dim=1)  # [Q, D/2]
    weight: Tensor = power.unflatten(0, (heads, -1)).sum(dim=1).T
    return weight


def key_moments(second: Tensor, heads: int) -> Tensor:
    """`[D/2, H, H]` complex: Σ κ_l κ_lᴴ from the moment `[K, K]` of the keys before RoPE."""
    parts = second.view(heads, 2, -1, heads, 2, len(second) // heads // 2)
    parts = parts.diagonal(dim1=2, dim2=5)  # [H, real | imag, H, real | imag, D/2]
    real = parts[:, 0, :, 0] + parts[:, 1, :, 1]
    imag = parts[:, 1, :, 0] - parts[:, 0, :, 1]
    return torch.complex(real, imag).permute(2, 0, 1)


def merge_heads(keys: Tensor, power: Tensor, values: Tensor, gram: Tensor, kv_heads: int) -> Merge:
    """The merge under given moments and weights.

    Args:
        keys: `[D/2, H, H]` complex128, moments κ_l κ_lᴴ.
        power: `[D/2, H]`, w.
        values: `[K, K]`, moment of the values of all heads.
        gram: `[K, K]`, G of all heads, head by head.
        kv_heads: N.
    """
    pairs, heads = power.shape
    size = 2 * pairs
    root = power.clamp(min=NEGLIGIBLE * float(power.max()) or 1.0).sqrt()
    keys = root[:, :, None] * keys * root[:, None]
    value_root, value_inverse = square_root(gram)
    values = value_root @ values @ value_root
    groups = groups_of(keys, values, kv_heads)
    channel = torch.arange(heads * size).view(heads, size)
    encode, decode, value_encode, value_decode = [], [], [], []
    for group in groups:
        vector = _top(keys[:, group][:, :, group])  # [D/2, t]
        u, d = root[:, group] * vector, vector / root[:, group]
        length = u.norm(dim=1, keepdim=True)  # only the product of both has a meaning
        encode.append((u / length).T)
        decode.append((d * length).T[:, None])
        own = channel[group].flatten()
        principal = descending_eigh(values[own][:, own])[1][:, :size]  # [t·D, D]
        # Orthonormal, so that a merged value is as large as the values were.
        basis, triangle = torch.linalg.qr(value_root[own][:, own] @ principal)
        value_encode.append(basis.unflatten(0, (-1, size)))
        rebuilt = value_inverse[own][:, own] @ principal @ triangle.T
        value_decode.append(rebuilt.unflatten(0, (-1, size)))
    parts = (encode, decode, value_encode, value_decode)
    return Merge(groups, *(torch.stack(part) for part in parts))


def _top(moments: Tensor) -> Tensor:
    """`[n, t]`: the top eigenvectors of Hermitian `[n, t, t]`, largest entry real and positive."""
    vector = torch.linalg.eigh(moments).eigenvectors[..., -1]
    pivot = vector.gather(1, vector.abs().argmax(dim=1, keepdim=True))
    fixed: Tensor = vector * (pivot.conj() / pivot.abs())
    return fixed


def groups_of(keys: Tensor, values: Tensor, kv_heads: int) -> Tensor:
    """`[N, t]`: which heads are merged, each group ascending.

    Args:
        keys: `[D/2, H, H]`, weighted by the queries.
        values: `[K, K]`, weighted by the output projection.
    """
    heads = keys.shape[1]
    groups = torch.arange(heads).view(kv_heads, -1)
    if kv_heads in (1, heads):
        return groups
    cost = pair_costs(keys, values)
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(heads), 2):
            trial = groups.flatten().clone()
            trial[[a, b]] = trial[[b, a]]
            trial = trial.view_as(groups)
            # Not by rounding alone, or it might never end.
            if _within(cost, trial) < _within(cost, groups) - 1e-9:
                groups, improved = trial, True
    groups = groups.sort(dim=1).values
    return groups[groups[:, 0].argsort()]


def _within(cost: Tensor, groups: Tensor) -> float:
    """Of all pairs within groups, each counted twice."""
    return float(cost[groups[:, :, None], groups[:, None]].sum())


def pair_costs(keys: Tensor, values: Tensor) -> Tensor:
    """`[H, H]`: what merging two heads loses, as shares of the weighted keys and values."""
    heads = keys.shape[1]
    size = len(values) // heads
    blocks = values.unflatten(0, (heads, size)).unflatten(2, (heads, size))
    totals = (keys.diagonal(dim1=1, dim2=2).real.sum(), values.trace())
    cost = torch.zeros(heads, heads, dtype=torch.float64)
    for pair in itertools.combinations(range(heads), 2):
        among = torch.tensor(pair)
        lost_keys = torch.linalg.eigvalsh(keys[:, among][:, :, among])[:, :-1].sum()
        both = blocks[among][:, :, among].reshape(2 * size, 2 * size)
        lost_values = torch.linalg.eigvalsh((both + both.T) / 2)[:-size].sum()
        lost = (lost_keys, lost_values)
        share = sum(x / t.clamp(min=NEGLIGIBLE) for x, t in zip(lost, totals, strict=True))
        cost[pair] = cost[pair[::-1]] = share
    return cost


@torch.inference_mode()
def refit_queries(
    stream: LayerStream, layer: StreamedLayer, merge: Merge, original: Tensor
) -> Merge:
    """The merge with the d of every query head that keep its attention best on text.

    With s_j the scores of a query in the original model, a_j its attention there, and e_j what the
    scores Re Σ_l d_l conj(q_l) κ'_{l,j} of the merged keys are wrong by, KL(a ‖ merged) is
    ½ Var_{j~a}(e_j) up to third order. Over all queries looked at, it is

        argmin_d Σ Var_{j~w}(e_j) + RIDGE · (mean square) · |d - d_merge|²,

    w = (1 - EVENLY) a + EVENLY / (number of keys): one linear system of D numbers per query head.

    Args:
        original: Hidden states `[n, T, hidden]` of the original before the layer.
    """
    own, size = layer.attention, layer.attention.layout.head_dim
    scaling, heads = own.layout.scaling, merge.heads
    before = merge.key_decode.flatten(0, 2)  # [Q, D/2], query heads in the order of the merge
    before = torch.cat((before.real, before.imag), dim=1)  # [Q, D]
    gram = torch.zeros(len(before), size, size, dtype=torch.float64)
    cross = torch.zeros(len(before), size, dtype=torch.float64)
    length = original.shape[1]
    at = torch.arange(min(SINKS, length - 1), length, EVERY)
    for window in original[:WINDOWS, None]:
        q, k, _ = own.project(layer.normed(window))
        q, k = (x[0] for x in own.rotate(q, k, *stream.tables(layer.index, length)))
        q = q[:, at].unflatten(0, (own.layout.kv_heads, -1))[heads].flatten(0, 2)  # [Q, R, D]
        k = k[heads]  # [N, t, T, D]
        kappa = torch.complex(*k.chunk(2, dim=-1))
        merged = (merge.key_encode.conj()[:, :, None] * kappa).sum(dim=1).to(kappa)  # [N, T, D/2]
        for i, queries in enumerate(q):
            n = i * len(heads) // len(q)
            keys = k.flatten(0, 1)[i * heads.numel() // len(q)]
            for rows, positions in zip(queries.split(_ROWS), at.split(_ROWS), strict=True):
                seen = torch.arange(length) <= positions[:, None]  # [R, T]
                scores = scaling * rows @ keys.T
                evenly = seen / seen.sum(dim=1, keepdim=True)
                weight = scores.masked_fill(~seen, -torch.inf).softmax(dim=1)
                weight = (1 - EVENLY) * weight + EVENLY * evenly
                product = torch.complex(*rows.chunk(2, dim=-1)).conj()[:, None] * merged[n]
                parts = scaling * torch.cat((product.real, -product.imag), dim=-1)  # [R, T, D]
                wrong = scores - parts @ before[i].to(parts)
                parts = parts - (weight[..., None] * parts).sum(dim=1, keepdim=True)
                weighted = (weight[..., None] * parts).flatten(0, 1)
                gram[i] += (weighted.T @ parts.flatten(0, 1)).double()
                cross[i] += (weighted.T @ wrong.flatten()).double()
    # A head may have no queries at all: then they stay.
    ridge = (RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1)).clamp(min=NEGLIGIBLE)
    gram += ridge[:, None, None] * torch.eye(size, dtype=torch.float64)
    after = before + torch.linalg.solve(gram, cross)
    return replace(merge, key_decode=torch.complex(*after.chunk(2, 1)).view_as(merge.key_decode))


def fold(attention: GroupedQueryAttention, merge: Merge) -> dict[str, Tensor]:
    """The projections of the merged layer, by name relative to `self_attn`, float32.

    Query heads are in the order of `merge.heads`.
    """
    layout, heads = attention.layout, merge.heads
    size, biased = layout.head_dim, layout.qkv_bias
    weight = attention.qkv.weight.double()
    if biased:  # one more column, for an input that is always 1
        weight = torch.cat((weight, attention.qkv.bias.double()[:, None]), dim=1)
    query, key, value = (
        w.unflatten(0, (layout.kv_heads, -1)) for w in weight.split(attention.sizes)
    )
    query = query.unflatten(1, (-1, size))[heads]  # [N, t, Q/H, D, hidden]
    queries = merge.key_decode.conj()[..., None] * _components(query)
    keys = torch.einsum("nhl,nhlx->nlx", merge.key_encode.conj(), _components(key[heads]))
    values = torch.einsum("nhde,nhdx->nex", merge.value_encode, value[heads])
    output = attention.o_proj.weight.double()
    output = output.unflatten(1, (layout.kv_heads, -1, size))[:, heads]  # [hidden, N, t, Q/H, D]
    output = torch.einsum("xnhqd,nhde->xnhqe", output, merge.value_decode)
    projections = {"q_proj": _channels(queries), "k_proj": _channels(keys), "v_proj": values}
    folded = {"o_proj.weight": output.flatten(1)}
    for name, projection in projections.items():
        made = projection.flatten(0, -2)
        folded[f"{name}.weight"] = made[:, : layout.hidden_size]
        if biased:
            folded[f"{name}.bias"] = made[:, -1]
    if (bias := attention.o_proj.bias) is not None:
        folded["o_proj.bias"] = bias.detach()
    return {name: tensor.float() for name, tensor in folded.items()}


def _components(rows: Tensor) -> Tensor:
    """`[..., D, hidden]` to complex `[..., D/2, hidden]`; dims l and l + D/2 are a pair."""
    return torch.complex(*rows.chunk(2, dim=-2))


def _channels(components: Tensor) -> Tensor:
    """What `_components` took apart."""
    return torch.cat((components.real, components.imag), dim=-2)


class ToGqa(Conversion):
    """A conversion to fewer KV heads, of the model's own class."""

    def method(self, measured: Statistics | None, text: Tensor | None) -> Fit:
        assert measured is not None
        kv_heads = self.options.kv_heads
        assert kv_heads is not None

        def fit(layer: StreamedLayer, original: Tensor) -> ConvertedLayer:
            own, here = layer.attention, measured.layer(layer.index)
            merged = merge(here, own.layout, own.o_proj.weight, kv_heads)
            merged = refit_queries(self.stream, layer, merged, original)
            return ConvertedLayer(None, fold(own, merged))

        return fit

    def tensors(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        dtype = save_dtype(self.stream.checkpoint, self.options)
        prefix = f"model.layers.{index}.self_attn."
        return {prefix + name: tensor.to(dtype) for name, tensor in converted.weights.items()}

    def config(self, last: ConvertedLayer) -> dict[str, Any]:
        """The model's own, with fewer KV heads."""
        config = dict(self.stream.checkpoint.config)
        config.pop("torch_dtype", None)  # the older name
        dtype = str(save_dtype(self.stream.checkpoint, self.options)).removeprefix("torch.")
        return {**config, "dtype": dtype, "num_key_value_heads": self.options.kv_heads}
