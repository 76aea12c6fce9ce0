"""A model in memory, some of whose attention modules are replaced and taught by the original.

What stands in the place of an attention module is a *replacement*: `features` of the normed hidden
states, and a linear read-out `out_proj` of them, which has a closed form
(:meth:`HybridModel.fit_outputs`).

* :func:`seeded_mixer` inherits queries, keys and values and mimics the rest of the attention, after
  mmMamba (arXiv 2502.13145): y_t = Σ_{j<=t} e^{-λ(t-j)} (C_t·B_j) x_j with C, B and x seeded from
  q, k and v before RoPE, heads of a group repeated, is attention without its softmax whose reach
  1/λ is that of the head. Most of what attention gives depends on the token alone, though, and
  copies of v, as few as KV heads, do not hold that. So every third head looks at the token itself
  at first: its x are the directions of u that leave least of the output unexplained beside the
  other heads (:meth:`HybridModel.seed_own_tokens`), and its B, zero, are to be learned.
* :func:`random_mixer` and :class:`Pointwise` are controls. A mixer that is no better than the first
  inherited nothing; one that is no better than the second, a linear map of the token alone, does
  not mix tokens to any use.

Teaching has the stages of MOHAWK (arXiv 2408.10189): :class:`Alignment` of every replacement with
what its attention module gives on the original's own hidden states, then :class:`Distillation` of
the whole model from the original's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kvtool.attention import GroupedQueryAttention, decoder_layers
from kvtool.distill import Student, fast_bfloat16
from kvtool.divergence import Loss, divergence
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

VECTORS = 0.3
"""Learning rate of biases, taps, decays, skips and norms, relative to that of matrices."""
SMALLEST = 0.05
"""Size that a matrix has at least in that measure."""
_NOTHING = 1e-12  # the square of an attention that gives nothing

Arm = Literal["mamba", "random", "pointwise"]


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
    mixer = _empty(shape_for(attention), attention.qkv.weight.device)

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
    mixer = _empty(shape_for(attention), device)
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


def shape_for(attention: GroupedQueryAttention) -> MixerShape:
    """A group, and a state of D x D, per query head: no two heads share queries, which are C."""
    layout = attention.layout
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


class Slot(nn.Module):
    """Stands where a decoder layer expects its attention: the original, or its replacement.

    Attributes:
        teaching: Whether the original answers.
        watch: Told the normed hidden states and what the original made of them, while it answers.
    """

    def __init__(self, original: Any, replacement: Any) -> None:
        super().__init__()
        self.original, self.replacement = original, replacement
        self.teaching = False
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        if not self.teaching:
            return self.replacement(hidden_states), None
        told: Tensor = self.original(hidden_states=hidden_states, **options)[0]
        if self.watch is not None:
            self.watch(hidden_states, told)
        return told, None


class HybridModel(nn.Module):
    """A transformers model with replacements in some layers, and the original beside it.

    Both share all other weights.

    Args:
        model: As transformers loads it; changed.
        replace: Makes the replacement for a layer, from its index and attention module.
        layers: Which ones.
    """

    def __init__(
        self,
        model: Any,
        layers: Collection[int],
        replace: Callable[[int, GroupedQueryAttention], nn.Module],
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.slots: dict[int, Slot] = {}
        for index, layer in enumerate(decoder_layers(model)):
            if index in layers:
                name = f"model.layers.{index}.self_attn"
                made = replace(index, GroupedQueryAttention(layer.self_attn, name))
                layer.self_attn = self.slots[index] = Slot(layer.self_attn, made.eval())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self.model.device
        return device

    @property
    def head(self) -> Tensor:
        """`[V, hidden]`."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def states(self, ids: Tensor, replaced: Collection[int] | None = None) -> Tensor:
        """Final hidden states `[B, T, hidden]` of texts `[B, T]`.

        Args:
            replaced: The layers whose replacements answer; all of them if not given.
        """
        for index, slot in self.slots.items():
            slot.teaching = replaced is not None and index not in replaced
        states: Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def seed_own_tokens(self, windows: Tensor, batch: int = 1) -> None:
        """Chooses what the heads of seeded mixers that do not mix yet see of their token.

        Args:
            windows: Texts `[N, T]`.
        """
        sums = {index: _OwnToken(slot.replacement) for index, slot in self.slots.items()}
        self._watched(windows, batch, {i: found.see for i, found in sums.items()})
        for found in sums.values():
            found.seed()

    @torch.no_grad()
    def fit_outputs(self, windows: Tensor, batch: int = 1) -> dict[int, float]:
        """Solves the read-out of every replacement on texts `[N, T]`, in the original's states.

        Returns:
            By layer the squared error that is left, relative to that of giving nothing.
        """
        sums = {index: _ReadOut(slot.replacement) for index, slot in self.slots.items()}
        self._watched(windows, batch, {i: found.see for i, found in sums.items()})
        return {index: found.solve() for index, found in sums.items()}

    @torch.no_grad()
    def _watched(
        self, windows: Tensor, batch: int, watch: Mapping[int, Callable[[Tensor, Tensor], None]]
    ) -> None:
        """Takes texts through the original, telling what the replaced modules do."""
        for index, slot in self.slots.items():
            slot.watch = watch[index]
        try:
            for piece in windows.split(batch):
                self.states(piece.to(self.device), ())
        finally:
            for slot in self.slots.values():
                slot.watch = None


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
        penalty = (RIDGE * self.gram.diagonal()).clamp(min=_NOTHING)
        penalty[-1] = 0
        return self.gram + torch.diag(penalty)


class _ReadOut:
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
        return float(1 + fitted / moments.square.clamp(min=_NOTHING))


class _OwnToken:
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


class Alignment(Student):
    """Every replacement against its attention module, on the original's own hidden states.

    The loss is the mean over layers of |ô - o|² / |o|² (stage 2 of MOHAWK; stages 1 and 2 of
    mmMamba).

    Args:
        inherited: Whether what mixers inherited from the attention is trained, too.
    """

    def __init__(self, hybrid: HybridModel, *, inherited: bool) -> None:
        super().__init__()
        self.hybrid = hybrid
        self._hooks = []
        for slot in hybrid.slots.values():
            slot.replacement.requires_grad_(True)
            if not inherited and isinstance(slot.replacement, Mixer):
                self._hooks += _hold_inherited(slot.replacement)

    def release(self) -> None:
        """Trains whatever requires a gradient from now on."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of texts `[B, T]`."""
        hybrid = self.hybrid
        lost: list[Tensor] = []

        def compare(slot: Slot, hidden: Tensor, told: Tensor) -> None:
            with torch.enable_grad():
                wrong = slot.replacement(hidden.detach()).float() - told.detach().float()
                square = told.float().square().sum()
                lost.append(wrong.square().sum() / square.clamp(min=_NOTHING))

        for slot in hybrid.slots.values():
            slot.watch = lambda hidden, told, slot=slot: compare(slot, hidden, told)
        try:
            with torch.no_grad(), _half_precision(hybrid.device):
                hybrid.states(ids.to(hybrid.device), ())
        finally:
            for slot in hybrid.slots.values():
                slot.watch = None
        return torch.stack(lost).mean(), {}

    def rates(self) -> Mapping[str, float]:
        """Every parameter in its own measure."""
        return _rates(self)


class Distillation(Student):
    """The whole model against the predictions of the original, or of another teacher.

    Args:
        teacher: Another model with the same vocabulary, instead of the original.
        loss: Which KL.
    """

    def __init__(
        self, hybrid: HybridModel, teacher: Any | None = None, loss: Loss = "forward-kl"
    ) -> None:
        super().__init__()
        self.hybrid, self.loss = hybrid, loss
        # In a tuple, so that its weights are no parameters of this module.
        self._teacher = (teacher,)
        for slot in hybrid.slots.values():
            slot.replacement.requires_grad_(True)

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean KL per position of texts `[B, T]`, in nats."""
        hybrid = self.hybrid
        ids = ids.to(hybrid.device)
        with _half_precision(hybrid.device):
            with torch.no_grad():
                (teacher,) = self._teacher
                if teacher is None:
                    told, head = hybrid.states(ids, ()), hybrid.head
                else:
                    teacher.to(ids.device)  # the student may have been moved
                    told = teacher.model(ids, use_cache=False).last_hidden_state
                    head = teacher.lm_head.weight
            states = hybrid.states(ids)
            size = min(len(head), len(hybrid.head))  # some are padded
            total = divergence(
                states.flatten(0, 1),
                told.flatten(0, 1),
                hybrid.head[:size],
                head[:size],
                self.loss,
            )
        return total / ids.numel(), {}

    def rates(self) -> Mapping[str, float]:
        """As in alignment."""
        return _rates(self)


def _half_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def _rates(student: Student) -> dict[str, float]:
    """Matrices move in the measure of their size, vectors in that of 1, by less."""
    trained = {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}
    return {
        n: VECTORS
        if p.dim() == 1 or n.endswith("conv_weight")
        else max(float(p.square().mean().sqrt()), SMALLEST)
        for n, p in trained.items()
    }


def _hold_inherited(mixer: Mixer) -> list[Any]:
    """Stops the gradient to the rows of x, B and C."""
    inner, projected = mixer.shape.inner, mixer.shape.convolved
    free = torch.ones(mixer.shape.projected, device=mixer.in_proj.weight.device)
    free[inner : inner + projected] = 0
    return [
        mixer.in_proj.weight.register_hook(lambda gradient: gradient * free[:, None]),
        mixer.in_proj.bias.register_hook(lambda gradient: gradient * free),
    ]


@dataclass(frozen=True)
class Judged:
    """A hybrid on held-out texts, by window: KL(original ‖ hybrid) in nats, and -log p of both."""

    kl: list[float]
    nll: list[float]
    base_nll: list[float]

    @property
    def mean_kl(self) -> float:
        """Over windows."""
        return sum(self.kl) / len(self.kl)

    @property
    def perplexity_ratio(self) -> float:
        """exp of the mean difference of -log p."""
        return math.exp((sum(self.nll) - sum(self.base_nll)) / len(self.nll))


@torch.no_grad()
def judge(hybrid: HybridModel, windows: Tensor, replaced: Collection[int] | None = None) -> Judged:
    """Compares the hybrid with the original on texts `[N, T]`, position by position, in fp32.

    Args:
        replaced: As in :meth:`HybridModel.states`.
    """
    judged = Judged([], [], [])
    for window in windows:
        ids = window[None].to(hybrid.device)
        both = [hybrid.states(ids, which)[0] for which in ((), replaced)]
        sums = torch.zeros(3, dtype=torch.float64, device=hybrid.device)
        for p, q, target in zip(
            *(states[:-1].split(256) for states in both), ids[0, 1:].split(256), strict=True
        ):
            log_p, log_q = ((x @ hybrid.head.T).float().log_softmax(dim=-1) for x in (p, q))
            sums[0] += (log_p.exp() * (log_p - log_q)).sum()
            sums[1] -= log_q.gather(1, target[:, None]).sum()
            sums[2] -= log_p.gather(1, target[:, None]).sum()
        each = (sums / (len(window) - 1)).tolist()
        for values, value in zip((judged.kl, judged.nll, judged.base_nll), each, strict=True):
            values.append(value)
    return judged
