"""A model in memory, some of whose attention modules are replaced and taught by the original.

What takes their place, and what of that has a closed form, is in `replacements.py`. Teaching has
the stages of MOHAWK (arXiv 2408.10189): :class:`Alignment` of every replacement with what its
attention module gives on the original's own hidden states, then :class:`Distillation` of the whole
model from the original's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvtool.attention import GroupedQueryAttention
from kvtool.distill import Student, fast_bfloat16
from kvtool.divergence import Loss, divergence, kl_divergence
from kvtool.layout import decoder_layers
from kvtool.mamba import Mixer
from kvtool.replacements import NOTHING, OwnToken, ReadOut

VECTORS = 0.3
"""Learning rate of biases, taps, decays, skips and norms, relative to that of matrices."""
SMALLEST = 0.05
"""Size that a matrix has at least in that measure."""

Arm = Literal["mamba", "random", "pointwise"]


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
    def seed_own_tokens(self, windows: Tensor) -> None:
        """Chooses what the heads of seeded mixers that do not mix yet see of their token.

        Args:
            windows: Texts `[N, T]`.
        """
        sums = {index: OwnToken(slot.replacement) for index, slot in self.slots.items()}
        self._watched(windows, {i: found.see for i, found in sums.items()})
        for found in sums.values():
            found.seed()

    @torch.no_grad()
    def fit_outputs(self, windows: Tensor) -> dict[int, float]:
        """Solves the read-out of every replacement on texts `[N, T]`, in the original's states.

        Returns:
            By layer the squared error that is left, relative to that of giving nothing.
        """
        sums = {index: ReadOut(slot.replacement) for index, slot in self.slots.items()}
        self._watched(windows, {i: found.see for i, found in sums.items()})
        return {index: found.solve() for index, found in sums.items()}

    @torch.no_grad()
    def _watched(
        self, windows: Tensor, watch: Mapping[int, Callable[[Tensor, Tensor], None]]
    ) -> None:
        """Takes texts through the original, telling what the replaced modules do."""
        for index, slot in self.slots.items():
            slot.watch = watch[index]
        try:
            for piece in windows.split(1):
                self.states(piece.to(self.device), ())
        finally:
            for slot in self.slots.values():
                slot.watch = None


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
                lost.append(wrong.square().sum() / square.clamp(min=NOTHING))

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
            sums[0] += kl_divergence(log_p, log_q).sum()
            sums[1] -= log_q.gather(1, target[:, None]).sum()
            sums[2] -= log_p.gather(1, target[:, None]).sum()
        each = (sums / (len(window) - 1)).tolist()
        for values, value in zip((judged.kl, judged.nll, judged.base_nll), each, strict=True):
            values.append(value)
    return judged
