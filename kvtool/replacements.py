"""What stands in the place of an attention module, and what of it has a closed form.

A *replacement* gives `features` of the normed hidden states, and a linear read-out `out_proj` of
them (:class:`ReadOut`).

* :func:`seeded_mixer` inherits queries, keys and values and mimics the rest of the attention, after
  mmMamba (arXiv 2502.13145): y_t = Σ_{j<=t} e^{-λ(t-j)} (C_t·B_j) x_j with C, B and x seeded from
  q, k and v before RoPE (C and B behind a SiLU), heads of a group repeated, is attention without
  its softmax whose reach 1/λ is that of the head. Most of what attention gives depends on the token
  alone, though, and copies of v, as few as KV heads, do not hold that. So every third head looks at
  the token itself at first: its x are the directions of u that leave least of the output
  unexplained beside the other heads (:class:`OwnToken`), and its B, zero, are to be learned.
* :func:`random_mixer` and :class:`Pointwise` are controls. A mixer that is no better than the first
  inherited nothing; one that is no better than the second, a linear map of the token alone, does
  not mix tokens to any use.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from kvtool.attention import GroupedQueryAttention
from kvtool.layout import AttentionLayout
from kvtool.mamba import Mixer, MixerShape

GATE_OPEN = 1.2784645427610738
"""z with SiLU(z) = 1."""
STEP_ONE = math.log(math.e - 1)
"""Δ' with softplus(Δ') = 1: what a token writes is not scaled."""
SKIP = 0.5
"""D at the start: most of what attention gives depends on the token itself."""
NEARER = (0.5, 0.125)
"""Of the reach of attention, in turn from head to head: an exponential has no peak, but a tail."""
THIRD = 3
"""One head in so many looks at the token itself."""
RIDGE = 1e-2
"""Of the read-out, relative to the square of each feature: unusual texts make some of them huge."""

NOTHING = 1e-12
"""The square of an attention that gives nothing."""


class Replacement(Protocol):
    """What stands in the place of an attention module; an `nn.Module`."""

    out_proj: nn.Linear

    def features(self, hidden: Tensor) -> Tensor:
        """`[B, T, hidden]` to `[B, T, F]`."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[B, T, hidden]` to the same."""


class Pointwise(nn.Module):
    """A linear map of each token alone: no cache, and no past."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def features(self, hidden: Tensor) -> Tensor:
        """The hidden states as they are."""
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, hidden]` to the same."""
        result: Tensor = self.out_proj(hidden)
        return result


@torch.no_grad()
def seeded_mixer(attention: GroupedQueryAttention, reach: Tensor) -> Mixer:
    """A linear mixer with the projections of an attention module; its read-out is to be fitted.

    Args:
        reach: `[Q]`, mean distance that each query head looks back, in tokens.
    """
    layout = attention.layout
    per_group = layout.heads // layout.kv_heads
    mixer = _empty(mixer_shape(attention.layout), attention.qkv.weight.device)

    def by_head(rows: Tensor) -> Tensor:
        """Rows `[H·D, ...]` of KV heads, one copy per query head that reads them."""
        heads: Tensor = rows.unflatten(0, (layout.kv_heads, layout.head_dim))
        return heads.repeat_interleave(per_group, dim=0).flatten(0, 1)

    inner, seeded = mixer.shape.inner, slice(mixer.shape.inner, 4 * mixer.shape.inner)
    q, k, v = attention.qkv.weight.split(attention.sizes)
    mixer.in_proj.weight[seeded] = torch.cat((by_head(v), by_head(k), q)).float()
    if layout.qkv_bias:
        q, k, v = attention.qkv.bias.split(attention.sizes)
        mixer.in_proj.bias[seeded] = torch.cat((by_head(v), by_head(k), q)).float()
    mixer.in_proj.bias[:inner] = GATE_OPEN
    mixer.conv_weight[:, -1] = 1
    mixer.dt_bias.fill_(STEP_ONE)
    mixer.D.fill_(SKIP)
    mixer.norm_weight.fill_(1)
    own = _own_token_heads(mixer.shape)
    x, b = (mixer.in_proj.weight[start : start + inner] for start in (inner, 2 * inner))
    x.unflatten(0, (layout.heads, -1))[own] = 0
    b.unflatten(0, (layout.heads, -1))[own] = 0
    mixer.in_proj.bias[inner : 3 * inner].unflatten(0, (2, layout.heads, -1))[:, own] = 0
    mixer.D[own] = 1
    # Heads of a group read the same keys; looking back differently far they see more of the past.
    nearer = reach.new_tensor(NEARER).repeat(layout.heads)[: layout.heads]
    mixer.A_log.copy_(-(reach * nearer).clamp(min=0.5).log())
    return mixer


def _own_token_heads(shape: MixerShape) -> slice:
    return slice(THIRD - 1, None, THIRD)


@torch.no_grad()
def random_mixer(attention: GroupedQueryAttention, generator: torch.Generator) -> Mixer:
    """The same with nothing inherited: the initialisation of Mamba-2's authors.

    Args:
        generator: On the CPU, so that all devices draw alike.
    """
    device = attention.qkv.weight.device
    mixer = _empty(mixer_shape(attention.layout), device)
    shape = mixer.shape

    def uniform(bound: float, *size: int) -> Tensor:
        return (bound * (2 * torch.rand(size, generator=generator) - 1)).to(device)

    mixer.in_proj.weight.copy_(uniform(shape.hidden_size**-0.5, *mixer.in_proj.weight.shape))
    mixer.conv_weight.copy_(uniform(shape.taps**-0.5, *mixer.conv_weight.shape))
    step = torch.exp(torch.rand(shape.heads, generator=generator) * math.log(100.0)) * 1e-3
    mixer.dt_bias.copy_(torch.log(torch.expm1(step)))
    mixer.A_log.copy_(torch.log(1 + 15 * torch.rand(shape.heads, generator=generator)))
    mixer.D.fill_(1)
    mixer.norm_weight.fill_(1)
    return mixer


def mixer_shape(layout: AttentionLayout) -> MixerShape:
    """Of the mixer in the place of an attention layer: a group, and a state of D x D, per query
    head. Heads of a group share B and C, which are keys and queries here, and no two share queries.
    """
    return MixerShape(
        hidden_size=layout.hidden_size,
        heads=layout.heads,
        head_dim=layout.head_dim,
        groups=layout.heads,
        state=layout.head_dim,
    )


def _empty(shape: MixerShape, device: torch.device) -> Mixer:
    with torch.device(device):
        mixer = Mixer(shape, linear=True)
    for parameter in mixer.parameters():
        parameter.zero_()
    return mixer


class _Moments:
    """Σ f fᵀ, Σ f oᵀ and Σ |o|² of inputs f (with a 1 for the intercept) and outputs o, float64."""

    def __init__(self, width: int, out: nn.Linear) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=out.weight.device)
        self.gram = zero.expand(width + 1, width + 1).clone()
        self.cross = zero.expand(width + 1, out.out_features).clone()
        self.square = zero.clone()

    def add(self, inputs: Tensor, told: Tensor) -> None:
        """Inputs `[B, T, F]`, outputs `[B, T, hidden]`."""
        inputs, told = inputs.flatten(0, 1).float(), told.flatten(0, 1).float()
        inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
        self.gram += (inputs.T @ inputs).double()
        self.cross += (inputs.T @ told).double()
        self.square += told.square().sum().double()

    def ridged(self) -> Tensor:
        """The first of them with a penalty on each input in proportion to its own square."""
        penalty = (RIDGE * self.gram.diagonal()).clamp(min=NOTHING)
        penalty[-1] = 0
        return self.gram + torch.diag(penalty)


class ReadOut:
    """The closed form of `out_proj`."""

    def __init__(self, replacement: Replacement) -> None:
        self.replacement = replacement
        self.moments = _Moments(replacement.out_proj.in_features, replacement.out_proj)

    def see(self, hidden: Tensor, told: Tensor) -> None:
        self.moments.add(self.replacement.features(hidden), told)

    def solve(self) -> float:
        """argmin Σ |W f - o|² + RIDGE · Σ_i Σ f_i² · |W_i|², put into place; the error left.

        The features of a mixer are scaled to a mean square of 1 on the way: some were a hundred
        times others, and no learning rate suits the read-out of both.
        """
        moments, out = self.moments, self.replacement.out_proj
        weight = torch.linalg.solve(moments.ridged(), moments.cross)
        size = torch.ones_like(weight[:-1, 0])
        if isinstance(self.replacement, Mixer):
            size = (moments.gram.diagonal()[:-1] / moments.gram[-1, -1]).sqrt().clamp(min=1e-6)
            self.replacement.norm_weight.div_(size)
        out.weight.copy_(weight[:-1].T * size)
        out.bias.copy_(weight[-1])
        fitted = (weight * (moments.gram @ weight)).sum() - 2 * (weight * moments.cross).sum()
        return float(1 + fitted / moments.square.clamp(min=NOTHING))


class OwnToken:
    """A reduced-rank regression of what the mixing heads leave, on the hidden states.

    With S the moment of u, and C that of u and the outputs, both beside what the features of the
    mixing heads explain, S = L Lᵀ and L⁻¹ C = U Σ Vᵀ, the r directions of u from which most of the
    outputs can be read are the first columns of L⁻ᵀ U.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        heads = torch.arange(mixer.shape.heads)
        own = _own_token_heads(mixer.shape)
        self.mixing = [h for h in heads.tolist() if h not in heads[own].tolist()]
        width = len(self.mixing) * mixer.shape.head_dim + mixer.shape.hidden_size
        self.moments = _Moments(width, mixer.out_proj)

    def see(self, hidden: Tensor, told: Tensor) -> None:
        features = self.mixer.features(hidden).unflatten(-1, (self.mixer.shape.heads, -1))
        self.moments.add(torch.cat((features[..., self.mixing, :].flatten(-2), hidden), -1), told)

    def seed(self) -> None:
        """Puts the directions, scaled to a mean square of 1, into `in_proj`."""
        shape, tokens = self.mixer.shape, self.moments.gram[-1, -1]
        gram, cross = self.moments.ridged(), self.moments.cross
        split = len(gram) - 1 - shape.hidden_size
        rest = torch.arange(split, len(gram) - 1, device=gram.device)
        known = torch.cat((torch.arange(split), torch.tensor([len(gram) - 1]))).to(gram.device)
        explained = torch.linalg.solve(gram[known][:, known], gram[known][:, rest])
        left = gram[rest][:, rest] - gram[rest][:, known] @ explained
        lower = torch.linalg.cholesky(left)
        goal = cross[rest] - explained.T @ cross[known]
        goal = torch.linalg.solve_triangular(lower, goal, upper=False)
        weight = self.mixer.in_proj.weight[shape.inner : 2 * shape.inner]
        own = weight.unflatten(0, (shape.heads, -1))[_own_token_heads(shape)]
        best = torch.linalg.svd(goal, full_matrices=False).U[:, : own.shape[0] * own.shape[1]]
        directions = torch.linalg.solve_triangular(lower.T, best, upper=True)
        square = (directions * (self.moments.gram[rest][:, rest] @ directions)).sum(dim=0) / tokens
        own.copy_((directions / square.sqrt()).T.view(own.shape))
