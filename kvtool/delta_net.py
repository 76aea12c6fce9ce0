"""The Gated DeltaNet mixer of Qwen3-Next and Qwen3.5, in stages: project, convolve, scan, gate.

With u a token's normed hidden state (Yang, Kautz, Hatamizadeh, arXiv 2412.06464),

    [z ; q k v ; b ; a] = W_in u,   [q k v] <- SiLU(conv([q k v])),   q <- q / (|q| √N),
    k <- k / |k|,   β = σ(b),   g = -e^{A_log} softplus(a + b_Δ),
    S_t = e^{g_t} S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,   y_t = S_t q_t,
    out = W_out (w ⊙ RMSNorm(y) ⊙ SiLU(z)),

and the norm is over the channels of one head. Its sizes and its past are those of a Mamba-2 mixer
(`kvtool.mamba`): G groups of heads share q and k, N is their size, P that of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels.gated_delta import gated_delta_chunked, gated_delta_step
from kvtool.kernels.ssd import causal_conv
from kvtool.mamba import CHUNK, MixerShape, Past

_NORM_EPS = 1e-6
"""Of the norms of q and k."""


class Projected(NamedTuple):
    """Of every token: `[q ; k ; v]` before the convolution `[B, T, C]`; b and a `[B, T, H]`."""

    qkv: Tensor
    b: Tensor
    a: Tensor


class Written(NamedTuple):
    """What the recurrence takes of T tokens.

    Attributes:
        q, k: `[B, T, G, N]` fp32. v: `[B, T, H, P]`. g, beta: `[B, T, H]` fp32.
        conv: `[B, C, K - 1]`, what the convolution remembers behind them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    conv: Tensor


class DeltaNet(nn.Module):
    """The stages of a mixer.

    Attributes:
        norm_weight: `[P]`.
        eps: Of that norm.
    """

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape
        self.in_proj = nn.Linear(
            shape.hidden_size, shape.inner + shape.convolved + 2 * shape.heads, bias=False
        )
        self.conv_weight = nn.Parameter(torch.zeros(shape.convolved, shape.taps))
        self.dt_bias = nn.Parameter(torch.zeros(shape.heads))
        self.A_log = nn.Parameter(torch.zeros(shape.heads))
        self.norm_weight = nn.Parameter(torch.ones(shape.head_dim))
        self.out_proj = nn.Linear(shape.inner, shape.hidden_size, bias=False)
        self.eps = 1e-6

    @staticmethod
    def shape_of(module: Any) -> MixerShape:
        """The sizes of a transformers module."""
        return MixerShape(
            hidden_size=module.hidden_size,
            heads=module.num_v_heads,
            head_dim=module.head_v_dim,
            groups=module.num_k_heads,
            state=module.head_k_dim,
            taps=module.conv_kernel_size,
            rule="delta",
        )

    @classmethod
    def of(cls, module: Any) -> DeltaNet:
        """The stages of a transformers module, whose projections become one.

        The numbers per head that decide the decay are kept in fp32, whatever the module is.
        """
        shape = cls.shape_of(module)
        with torch.device("meta"):
            mixer = cls(shape)
        mixer.in_proj.weight = nn.Parameter(_in_rows(module, shape), requires_grad=False)
        mixer.out_proj = module.out_proj
        mixer.conv_weight = nn.Parameter(module.conv1d.weight[:, 0], requires_grad=False)
        for name in ("dt_bias", "A_log"):
            values = getattr(module, name).detach().float()
            setattr(mixer, name, nn.Parameter(values, requires_grad=False))
        mixer.norm_weight, mixer.eps = module.norm.weight, module.norm.variance_epsilon
        return mixer

    def project(self, hidden: Tensor) -> tuple[Tensor, Projected]:
        """z `[B, T, H·P]`, and what the scan reads, of `[B, T, hidden]`."""
        shape = self.shape
        sizes = [shape.inner, shape.convolved, shape.heads, shape.heads]
        z, *new = self.in_proj(hidden).split(sizes, dim=-1)
        return z, Projected(*new)

    def scan(self, new: Projected, past: Past | None = None) -> tuple[Tensor, Past]:
        """y `[B, T, H, P]` of T new tokens behind a past, and the past behind them."""
        q, k, v, g, beta, conv = self.convolve(new, None if past is None else past.conv)
        y, state = gated_delta_chunked(q, k, v, g, beta, past and past.state, CHUNK)
        return y, Past(conv, state)

    def step(self, new: Projected, past: Past) -> Tensor:
        """y `[B, 1, H, P]` of one new token; the past is changed in place."""
        q, k, v, g, beta, conv = self.convolve(new, past.conv)
        past.conv.copy_(conv)
        y = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], past.state)
        return y[:, None]

    def convolve(self, new: Projected, conv: Tensor | None) -> Written:
        """What the recurrence takes of T new tokens behind `conv [B, C, K - 1]`."""
        shape, keys = self.shape, self.shape.groups * self.shape.state
        qkv, conv = causal_conv(new.qkv, self.conv_weight, None, conv)
        q, k, v = F.silu(qkv).split([keys, keys, shape.inner], dim=-1)
        q, k = (_normed(x.unflatten(-1, (shape.groups, -1))) for x in (q, k))
        g = -self.A_log.float().exp() * F.softplus(new.a.float() + self.dt_bias.float())
        v, beta = v.unflatten(-1, (shape.heads, -1)), new.b.float().sigmoid()
        return Written(q * shape.state**-0.5, k, v, g, beta, conv)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """What goes into `out_proj`, `[B, T, H·P]`: normed by head, weighted and gated."""
        wide = y.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weighted = (self.norm_weight * normed.to(y.dtype)).flatten(2)
        return (weighted * F.silu(z.float())).to(y.dtype)

    def mix(self, hidden: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """T new tokens `[B, T, hidden]` behind a past, to the same, and the past behind them."""
        z, new = self.project(hidden)
        y, after = self.scan(new, past)
        return self.out_proj(self.gate(y, z)), after

    def forward(self, hidden: Tensor) -> Tensor:
        """Whole texts `[B, T, hidden]`, to the same."""
        return self.mix(hidden)[0]


def _normed(x: Tensor) -> Tensor:
    """`[..., N]` fp32 of norm 1."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _NORM_EPS)


def _in_rows(module: Any, shape: MixerShape) -> Tensor:
    """`[z ; q ; k ; v ; b ; a]` as rows of one matrix.

    Qwen3-Next has them in two, group by group: q, k, v, z of a group's heads, and its b, a.
    """
    if not hasattr(module, "in_proj_qkvz"):
        parts = (module.in_proj_z, module.in_proj_qkv, module.in_proj_b, module.in_proj_a)
        return torch.cat([part.weight for part in parts])
    heads = shape.heads // shape.groups
    sizes = [shape.state, shape.state, heads * shape.head_dim, heads * shape.head_dim]
    by_group = module.in_proj_qkvz.weight.unflatten(0, (shape.groups, -1))
    q, k, v, z = (part.flatten(0, 1) for part in by_group.split(sizes, dim=1))
    of_heads = module.in_proj_ba.weight.unflatten(0, (shape.groups, -1))
    b, a = (part.flatten(0, 1) for part in of_heads.split([heads, heads], dim=1))
    return torch.cat((z, q, k, v, b, a))
