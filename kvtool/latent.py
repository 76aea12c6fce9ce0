"""Attention that caches a latent instead of keys and values.

:class:`LatentFactors` is what a conversion *means*, before it is written for an engine;
:class:`FactoredAttention` is a GQA module with them, :class:`MultiheadLatentAttention` a stock
MLA module. Both have the same stages: *query, compress, rotate, output* and two
up-projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.attention import GroupedQueryAttention, causal_attention
from kvtool.kernels.linear import pack, packed_linear
from kvtool.layout import recognise
from kvtool.rope import Rope, rotate


@dataclass(frozen=True)
class LatentFactors:
    """What a conversion to MLA does to one GQA layer, independent of any engine.

    With k̂ the concatenated normed pre-RoPE keys of all H heads (K = H·D numbers) and v the values:

        latent  c    = down · [k̂ ; v]                     [r]
        shared  k_pe = RoPE(rope · k̂)                     [d_r]
        query   q_pe,i = RoPE(rope_query[g(i)]ᵀ · q̂_i)
        key     k_i  = [key_up[g(i)] · c ; k_pe],   value v_i = value_up[g(i)] · c
        score        = scaling · ( q̂_i · key_up c + q_pe,i · k_pe )

    Attributes:
        rope: `[d_r, K]`; row `p` and row `p + d_r/2` are the pair turned by `inv_freq[p]`.
        rope_query: `[H, D, d_r]`, reads the shared RoPE query off a head's query.
        inv_freq: `[d_r/2]`.
        down: `[r, 2K]`.
        key_up: `[H, d_n, r]` with d_n = D, or 0 where every score comes from `k_pe`.
        value_up: `[H, D, r]`.
    """

    rope: Tensor
    rope_query: Tensor
    inv_freq: Tensor
    down: Tensor
    key_up: Tensor
    value_up: Tensor

    @property
    def rank(self) -> int:
        """Width r of the latent."""
        return self.down.shape[0]


def query_blocks(rope: Tensor, heads: int) -> Tensor:
    """`[H, D, d_r]`: how a query reads the components that the rows of `rope [d_r, K]` hold.

    Each head reads the columns of its own KV head; exact for rows that are orthonormal.
    """
    return rope.view(rope.shape[0], heads, -1).permute(1, 2, 0).contiguous()


class LatentAttention(nn.Module):
    """What every latent layout offers.

    G distinct up-projections are each used by Q/G consecutive query heads: a GQA-born model has
    G = H, not Q.

    Attributes:
        key_up: `[G, d_n, r]`, value_up: `[G, d_v, r]`.
        rope_query: `[G, d_q, d_r]`, reads the shared RoPE query off a head's query.
    """

    name: str
    heads: int
    rank: int
    rope_dim: int
    scaling: float
    inv_freq: Tensor
    key_up: Tensor
    value_up: Tensor
    rope_query: Tensor

    def query_and_compress(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer takes from `hidden [B, T, hidden]`.

        Returns:
            Queries `[B, T, Q, d_q]`, whose first d_n numbers meet `key_up`; latents `[B, T, r]`;
            unrotated shared keys `[B, T, d_r]`.
        """
        raise NotImplementedError  # pragma: no cover

    def output(self, context: Tensor) -> Tensor:
        """`[B, T, Q, d_v]` to hidden states `[B, T, hidden]`."""
        raise NotImplementedError  # pragma: no cover

    def absorb(self) -> Tensor:
        """`[G, d_q, r + d_r]`: takes a query straight to `[W_UKᵀ q ; q_pe]`, in latent space."""
        content = self.key_up
        rest = self.rope_query.shape[1] - content.shape[1]
        return torch.cat((F.pad(content, (0, 0, 0, rest)), self.rope_query), dim=-1)

    def attend_expanded(
        self, q: Tensor, c: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Causal attention in expanded form (cheaper than absorbed for many queries).

        Args:
            q: `[B, T, Q, d_q]`.
            c: `[B, S, r]`, k_pe: `[B, S, d_r]` rotated, S >= T.
            cos, sin: For the queries, `[B, T, d_r]` or broadcastable.

        Returns:
            `[B, T, Q, d_v]`.
        """
        q, (k, v) = self.expand_query(q, cos, sin), self.expand(c, k_pe)
        return causal_attention(q, k, v, self.scaling).transpose(1, 2)

    def expand_query(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries `[B, Q, T, d_n + d_r]` for :meth:`expand`; see :meth:`attend_expanded`."""
        groups, nope = self.key_up.shape[:2]
        grouped = q.transpose(1, 2).unflatten(1, (groups, -1))  # [B, G, Q/G, T, d_q]
        q_pe = torch.matmul(grouped, self.rope_query[:, None]).flatten(1, 2)
        q_pe = rotate(q_pe, cos[..., None, :, :], sin[..., None, :, :])
        return torch.cat((q.transpose(1, 2)[..., :nope], q_pe), dim=-1)

    def expand(self, c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, G, S, d_n + d_r]` and values `[B, G, S, d_v]` of latents `[B, S, ·]`."""
        groups = self.key_up.shape[0]
        k_nope = torch.einsum("bsr,gdr->bgsd", c, self.key_up)
        v = torch.einsum("bsr,gdr->bgsd", c, self.value_up)
        return torch.cat((k_nope, k_pe[:, None].expand(-1, groups, -1, -1)), dim=-1), v

    def context(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        """What `output` reads, `[B, T, Q, d_v]`, of whole windows `hidden [B, T, hidden]`.

        Args:
            scale: Of the model's RoPE.
        """
        q, c, k_pe = self.query_and_compress(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        cos, sin = Rope(self.inv_freq, scale).tables(positions)
        cos, sin = cos.to(k_pe.dtype), sin.to(k_pe.dtype)
        return self.attend_expanded(q, c, rotate(k_pe, cos, sin), cos, sin)


class FactoredAttention(LatentAttention):
    """A GQA module that caches what :class:`LatentFactors` keeps of its keys and values.

    The original projections (biases, per-head norms) stay as they are, which makes this exact for
    Qwen3 too: keys are normed first, then factored.
    """

    down: Tensor
    rope: Tensor

    def __init__(self, gqa: GroupedQueryAttention, factors: LatentFactors) -> None:
        super().__init__()
        self.gqa = gqa
        layout = gqa.layout
        self.name, self.heads, self.scaling = gqa.name, layout.heads, layout.scaling
        self.rank, self.rope_dim = factors.rank, factors.rope.shape[0]
        for part in ("down", "rope", "rope_query", "key_up", "value_up"):
            tensor = getattr(factors, part).to(gqa.qkv.weight)
            self.register_buffer(part, tensor, persistent=False)
        self.inv_freq = factors.inv_freq.to(gqa.qkv.weight.device)
        self.packed: dict[str, Tensor] = {}

    def pack(self) -> None:
        """Packs what every new token is multiplied by, where there is a kernel for it."""
        for part in ("down", "rope"):
            packed = pack(getattr(self, part))
            if packed is not None:
                self.packed[part] = packed

    def query_and_compress(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.gqa.project(hidden)
        q, k = self.gqa.normalise(q, k)
        keys = k.transpose(1, 2).flatten(2)  # [B, T, K]
        values = v.transpose(1, 2).flatten(2)
        c = self._project(torch.cat((keys, values), dim=-1), "down")
        return q.transpose(1, 2), c, self._project(keys, "rope")

    def _project(self, x: Tensor, part: str) -> Tensor:
        if part in self.packed:
            return packed_linear(x, self.packed[part], None)
        return F.linear(x, getattr(self, part))

    def output(self, context: Tensor) -> Tensor:
        result: Tensor = self.gqa.o_proj(context.flatten(2))
        return result


class MultiheadLatentAttention(LatentAttention):
    """The stages of a stock MLA module, such as that of `deepseek_v3`.

    Read once at load, none of which changes a result: interleaved RoPE rows are put in half-split
    order; heads of a group whose up-projections are equal (GQA-born) share one copy; where the
    RoPE query is a reading of the content query (GQA-born again), the reading replaces its rows;
    latent columns that are zero everywhere (padding to the engine's rank) are not stored.
    """

    def __init__(self, module: Any, name: str, inv_freq: Tensor) -> None:
        super().__init__()
        layout = recognise(module, name)
        self.name, self.heads, self.scaling = name, layout.heads, layout.scaling
        self.rope_dim, self.inv_freq = layout.rope_dim, inv_freq
        nope, rope, rank = layout.nope_dim, layout.rope_dim, layout.rank
        pairs = torch.arange(rope)
        if layout.interleaved:
            pairs = pairs.view(-1, 2).t().flatten()

        kv_a = module.kv_a_proj_with_mqa
        up = module.kv_b_proj.weight.view(layout.heads, nope + layout.value_dim, rank)
        self.rank = used_rank(kv_a.weight[:rank], None if kv_a.bias is None else kv_a.bias[:rank])
        rows = torch.cat((torch.arange(self.rank), rank + pairs))
        # RMSNorm takes its mean over all `rank` columns, zero ones included.
        share = rank / self.rank
        norm = module.kv_a_layernorm
        self.norm_weight = norm.weight[: self.rank].float() * math.sqrt(share)
        self.norm_eps = norm.variance_epsilon * share

        group = _shared_heads(up)
        distinct = up[::group, :, : self.rank]
        self.key_up = distinct[:, :nope].contiguous()
        self.value_up = distinct[:, nope:].contiguous()
        self.o_proj = module.o_proj

        low_rank = getattr(module, "q_proj", None) is None
        last = module.q_b_proj if low_rank else module.q_proj
        wide = last.weight.view(layout.heads, nope + rope, -1)
        wide = wide[:, torch.cat((torch.arange(nope), nope + pairs))]
        reading = _rope_reading(wide, nope, group)
        if reading is None:
            zeros = wide.new_zeros(nope, rope)
            select = torch.cat((zeros, torch.eye(rope).to(wide)))
            self.rope_query = select.expand(layout.heads // group, -1, -1)
        else:
            self.rope_query, wide = reading.to(wide.dtype), wide[:, :nope]
        # One matrix for all that reads the hidden states: a decode step is bound by its calls.
        first = module.q_a_proj.weight if low_rank else wide.flatten(0, 1)
        bias = None if kv_a.bias is None else kv_a.bias[rows]
        if bias is not None:
            own = module.q_a_proj.bias if low_rank else None
            bias = torch.cat((bias.new_zeros(first.shape[0]) if own is None else own, bias))
        self.down = _linear(torch.cat((first, kv_a.weight[rows])), bias)
        self.down_sizes = [first.shape[0], self.rank, rope]
        self.query_up: nn.Module | None = None
        if low_rank:
            self.query_up = nn.Sequential(module.q_a_layernorm, _linear(wide.flatten(0, 1), None))

    def query_and_compress(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, c, k_pe = self.down(hidden).split(self.down_sizes, dim=-1)
        # In fp32, whatever the model runs in: sqrt(share) is no number of bf16.
        normed = F.rms_norm(c.float(), (self.rank,), self.norm_weight, self.norm_eps)
        if self.query_up is not None:
            q = self.query_up(q)
        return q.unflatten(-1, (self.heads, -1)), normed.to(c.dtype), k_pe

    def output(self, context: Tensor) -> Tensor:
        result: Tensor = self.o_proj(context.flatten(2))
        return result


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def used_rank(weight: Tensor, bias: Tensor | None) -> int:
    """Latent columns up to the last one that is ever written; others stay 0, also in the norm.

    Args:
        weight, bias: `[r, hidden]` and `[r]`, what a latent is made with.
    """
    written = weight.ne(0).any(dim=1)
    if bias is not None:
        written |= bias.ne(0)
    columns = written.nonzero()
    return int(columns.max()) + 1 if len(columns) else 1


def _shared_heads(up: Tensor) -> int:
    """Largest group of consecutive heads with equal up-projections `[Q, d_n + d_v, r]`."""
    heads = up.shape[0]
    for group in range(heads, 1, -1):
        if heads % group == 0:
            grouped = up.unflatten(0, (-1, group))
            if torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
                return group
    return 1


def _rope_reading(queries: Tensor, nope: int, group: int) -> Tensor | None:
    """`[G, d_n, d_r]` such that each head's RoPE rows are `readingᵀ ·` its content rows, or `None`.

    Args:
        queries: `[Q, d_n + d_r, in]`, the query matrix by heads.
        group: Heads that share a reading.
    """
    content, rope = queries.double().split([nope, queries.shape[1] - nope], dim=1)
    if not nope:
        return None
    first = content[::group]
    gram = torch.matmul(first, first.mT)
    solved, info = torch.linalg.solve_ex(gram, torch.matmul(first, rope[::group].mT))
    if bool(info.any()):
        return None
    rebuilt = torch.matmul(solved.mT.repeat_interleave(group, dim=0), content)
    # Weights rounded to less than fp32 do not pass: the rows then carry roundings of their own.
    error = (rebuilt - rope).abs().max()
    return solved if bool(error <= 1e-5 * rope.abs().max()) else None
