"""The Mamba-2 mixer of a hybrid checkpoint, in stages: project, convolve, scan, gate, output.

Weights lie as in transformers' `GraniteMoeHybridForCausalLM`, whose rows of `in_proj` are the gate
z, then x, B, C and Δ. With u a token's normed hidden state,

    [z ; xBC ; Δ'] = W_in u + b_in,   xBC <- SiLU(conv(xBC)),   Δ = softplus(Δ' + b_Δ),
    S_t = e^{Δ_t A} S_{t-1} + Δ_t x_t B_tᵀ,   y_t = S_t C_t + D x_t,
    out = W_out RMSNorm(y ⊙ SiLU(z)) + b_out,   A = -e^{A_log},

and the norm is over the channels of a group of heads.

A mixer that training made (:mod:`kvtool.convert.mamba`) is *linear*: its x goes past the SiLU, and
its norm has weights, but divides by nothing. It can be written in the stock form all the same, see
:func:`kvtool.convert.granite.stock_mixer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.kernels.ssd import causal_conv, ssd_chunked, ssd_step

Rule = Literal["mamba2", "delta"]

CHUNK = 64
"""Tokens of a chunk of the scan."""


@dataclass(frozen=True)
class MixerShape:
    """Sizes of a mixer.

    Attributes:
        heads: H. head_dim: P. groups: G, divides H. state: N. taps: K of the convolution.
        rule: How a token changes the state: as in Mamba-2, or as in Gated DeltaNet.
    """

    hidden_size: int
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int = 4
    rule: Rule = "mamba2"

    @property
    def inner(self) -> int:
        """Channels of x, z and the output: H·P."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of [x ; B ; C]."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """Rows of `in_proj`."""
        return self.inner + self.convolved + self.heads

    @property
    def state_values(self) -> int:
        """Numbers of the state S of one sequence."""
        return self.inner * self.state

    @property
    def conv_values(self) -> int:
        """Numbers that the convolution remembers of one sequence."""
        return self.convolved * (self.taps - 1)

    def constant_bytes(self, itemsize: int) -> int:
        """What is kept of a sequence of any length: the state is fp32."""
        return 4 * self.state_values + itemsize * self.conv_values


class Past(NamedTuple):
    """What is kept of a text: `conv [B, C, K - 1]`, and S `[B, H, P, N]` fp32."""

    conv: Tensor
    state: Tensor


class Projected(NamedTuple):
    """Of every token: `[x ; B ; C]` before the convolution `[B, T, C]`, and Δ' `[B, T, H]`."""

    xbc: Tensor
    dt: Tensor


class Written(NamedTuple):
    """What the recurrence takes of T tokens.

    Attributes:
        x: `[B, T, H, P]`. dt: Δ `[B, T, H]` fp32. b, c: `[B, T, G, N]`.
        conv: `[B, C, K - 1]`, what the convolution remembers behind them.
    """

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    conv: Tensor


class Mixer(nn.Module):
    """The stages of a mixer.

    Args:
        linear: x goes past the SiLU, and the norm divides by nothing.

    Attributes:
        norm_weight: `[H·P]`.
        groups_normed: Into how many groups the norm takes the channels apart.
        eps: Of the norm.
        limits: Least and greatest Δ.
    """

    def __init__(self, shape: MixerShape, *, linear: bool = False) -> None:
        super().__init__()
        self.shape, self.linear = shape, linear
        self.in_proj = nn.Linear(shape.hidden_size, shape.projected)
        self.conv_weight = nn.Parameter(torch.zeros(shape.convolved, shape.taps))
        self.conv_bias: Tensor | None = nn.Parameter(torch.zeros(shape.convolved))
        self.dt_bias = nn.Parameter(torch.zeros(shape.heads))
        self.A_log = nn.Parameter(torch.zeros(shape.heads))
        self.D = nn.Parameter(torch.zeros(shape.heads))
        self.norm_weight = nn.Parameter(torch.ones(shape.inner))
        self.out_proj = nn.Linear(shape.inner, shape.hidden_size)
        self.groups_normed, self.eps = shape.groups, 1e-5
        self.limits = (0.0, float("inf"))

    @staticmethod
    def shape_of(module: Any) -> MixerShape:
        """The sizes of a transformers module."""
        return MixerShape(
            hidden_size=module.hidden_size,
            heads=module.num_heads,
            head_dim=module.head_dim,
            groups=module.n_groups,
            state=module.ssm_state_size,
            taps=module.conv_kernel_size,
        )

    @classmethod
    def of(cls, module: Any) -> Mixer:
        """The stages of a transformers module, sharing its weights.

        The three numbers per head that decide the decay are kept in fp32, whatever the module is.
        """
        shape = cls.shape_of(module)
        with torch.device("meta"):
            mixer = cls(shape)
        mixer.in_proj, mixer.out_proj = module.in_proj, module.out_proj
        mixer.conv_weight = nn.Parameter(module.conv1d.weight[:, 0], requires_grad=False)
        bias = module.conv1d.bias
        mixer.conv_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name in ("dt_bias", "A_log", "D"):
            values = getattr(module, name).detach().float()
            setattr(mixer, name, nn.Parameter(values, requires_grad=False))
        mixer.norm_weight = module.norm.weight
        # transformers 5.17 normalises all channels together, later ones by group.
        size = getattr(module.norm, "group_size", shape.inner)
        mixer.groups_normed, mixer.eps = shape.inner // size, module.norm.variance_epsilon
        mixer.limits = module.time_step_limit
        return mixer

    def project(self, hidden: Tensor) -> tuple[Tensor, Projected]:
        """z `[B, T, H·P]`, and what the scan reads, of `[B, T, hidden]`."""
        shape = self.shape
        sizes = [shape.inner, shape.convolved, shape.heads]
        z, xbc, dt = self.in_proj(hidden).split(sizes, dim=-1)
        return z, Projected(xbc, dt)

    def scan(self, new: Projected, past: Past | None = None) -> tuple[Tensor, Past]:
        """y `[B, T, H, P]` of T new tokens behind a past, and the past behind them."""
        x, dt, b, c, conv = self.convolve(new, None if past is None else past.conv)
        y, state = ssd_chunked(x, dt, self.decay, b, c, past and past.state, CHUNK)
        return self.skip(y, x), Past(conv, state)

    def step(self, new: Projected, past: Past) -> Tensor:
        """y `[B, 1, H, P]` of one new token; the past is changed in place."""
        x, dt, b, c, conv = self.convolve(new, past.conv)
        past.conv.copy_(conv)
        y = ssd_step(x[:, 0], dt[:, 0], self.decay, b[:, 0], c[:, 0], past.state)
        return self.skip(y[:, None], x)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """What goes into `out_proj`, `[B, T, H·P]`: gated, normed and weighted."""
        gated = y.flatten(2).float() * F.silu(z.float())
        if not self.linear:
            parts = gated.unflatten(-1, (self.groups_normed, -1))
            parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
            gated = parts.flatten(-2)
        weighted: Tensor = self.norm_weight * gated.to(y.dtype)
        return weighted

    def features(self, hidden: Tensor) -> Tensor:
        """Of whole texts `[B, T, hidden]`, what goes into `out_proj`."""
        z, new = self.project(hidden)
        return self.gate(self.scan(new)[0], z)

    def mix(self, hidden: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """T new tokens `[B, T, hidden]` behind a past, to the same, and the past behind them."""
        z, new = self.project(hidden)
        y, after = self.scan(new, past)
        return self.out_proj(self.gate(y, z)), after

    def forward(self, hidden: Tensor) -> Tensor:
        """Whole texts `[B, T, hidden]`, to the same."""
        result: Tensor = self.out_proj(self.features(hidden))
        return result

    @property
    def decay(self) -> Tensor:
        """A `[H]` fp32."""
        return -self.A_log.float().exp()

    def convolve(self, new: Projected, conv: Tensor | None) -> Written:
        """What the recurrence takes of T new tokens behind `conv [B, C, K - 1]`."""
        shape = self.shape
        xbc, conv = causal_conv(new.xbc, self.conv_weight, self.conv_bias, conv)
        x, bc = xbc.split([shape.inner, 2 * shape.groups * shape.state], dim=-1)
        if not self.linear:
            x = F.silu(x)
        b, c = F.silu(bc).unflatten(-1, (2, shape.groups, shape.state)).unbind(dim=-3)
        dt = self.steps(new.dt)
        return Written(x.unflatten(-1, (shape.heads, -1)), dt, b, c, conv)

    def steps(self, raw: Tensor) -> Tensor:
        """Δ fp32 of Δ' `[B, T, H]`."""
        return F.softplus(raw.float() + self.dt_bias.float()).clamp(*self.limits)

    def skip(self, y: Tensor, x: Tensor) -> Tensor:
        """S C + D x, of both `[B, T, H, P]`."""
        return (y + self.D[:, None] * x).to(y.dtype)
