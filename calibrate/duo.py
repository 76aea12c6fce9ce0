"""DuoAttention (Xiao et al., ICLR 2025, arXiv 2410.10819): gates learn which heads must see far.

Every KV head has one gate alpha in [0, 1]; its output is alpha · full + (1 - alpha) · streaming
attention (equation 1). With the weights frozen, the gates are trained on synthetic pass-keys to
keep the final hidden states of the tail (equation 2) while an L1 penalty pulls them to 0
(equation 3). A gate that stays up belongs to a retrieval head.

The published code differs from the paper in what it mixes in: the *teacher's* full attention, so
that an error that enters a head's own keys is never seen. `mix="self"` is the paper's, `"teacher"`
the code's.

Where this differs from both: the gates act where the plan will make a difference, which with
prompts read densely is the tail only (`prefill="streamed"` gates every token, as published). A few
fixed contexts take the place of new ones at every step, with shorter keys and fewer steps, and
digits under names are asked for besides DuoAttention's ordinals. The loss is divided by the mean
square of the teacher's hidden states, which makes the penalty mean the same in every model; gates
are fp32, since bfloat16 has 256 steps below 1 and ties there; and they start a little below 1,
where the gradient of the distillation is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kvtool.calibrate.tail import Attend, Reading, TailModel, Window
from kvtool.distill import Student
from kvtool.layout import with_heads

Mix = Literal["self", "teacher"]

JITTER = 0.02
"""Gates start uniformly in [1 - JITTER, 1]."""


@dataclass(frozen=True)
class Lesson:
    """What the original model makes of one reading.

    Attributes:
        hidden: `[1, M, hidden]` behind the final norm.
        contexts: By layer with heads the full attention `[1, Q, M, D]`; empty unless the teacher's
            is mixed.
        scale: Mean square of `hidden`.
    """

    reading: Reading
    hidden: Tensor
    contexts: dict[int, Tensor]
    scale: float


class GatedModel(Student):
    """The student: the frozen model with a gate on every KV head.

    Attributes:
        alpha: `[L, H]` fp32.
    """

    def __init__(
        self,
        model: TailModel,
        window: Window,
        mix: Mix = "self",
        penalty: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # In a tuple, so that the frozen weights are no parameters of this module.
        self._model = (model,)
        self.window, self.mix, self.penalty = window, mix, penalty
        shape = (len(model.layers), with_heads(model.layouts).kv_heads)
        jitter = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        self.alpha = nn.Parameter(1 - JITTER * jitter.to(model.device))

    @torch.no_grad()
    def constrain(self) -> None:
        """Clamps the gates, before every forward pass."""
        self.alpha.clamp_(0, 1)

    def _whole(self) -> list[int]:
        """Layers that have gates: those that see the whole past."""
        layouts = enumerate(self._model[0].layouts)
        return [index for index, layout in layouts if layout.sees_all]

    def forward(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_distill + penalty · mean |alpha| (section 3.2)."""
        student = run_gated(
            self._model[0], lesson.reading, self.alpha, self.window, lesson.contexts
        )
        distance = (student - lesson.hidden).square().mean() / lesson.scale
        size = self.alpha[self._whole()].abs().mean()
        loss = distance + self.penalty * size
        return loss, {"distillation": distance.detach(), "mean_gate": size.detach()}


def run_gated(
    model: TailModel,
    reading: Reading,
    alpha: Tensor,
    window: Window,
    contexts: Mapping[int, Tensor],
) -> Tensor:
    """The tail through the gated model, `[1, M, hidden]` behind the final norm; differentiable.

    Args:
        alpha: `[L, H]`.
        contexts: Full attention by layer to mix in, where there is one, instead of its own.
    """
    hidden = model.embed(reading.ids)
    for index in range(len(model.layers)):
        full = contexts.get(index)
        attend = _gated(model, index, alpha[index], window, full)
        hidden = model.layer(index, hidden, reading, attend)
    return model.finish(hidden[:, -len(reading.sample.tail) :])


def _gated(
    model: TailModel, index: int, alpha: Tensor, window: Window, context: Tensor | None
) -> Attend:
    group = model.layouts[index].heads // len(alpha)
    gate = alpha.clamp(0, 1).repeat_interleave(group)[:, None, None]  # [Q, 1, 1]

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        full = model.dense(index)(q, k, v, start) if context is None else context
        if not model.layouts[index].sees_all:
            return full
        return gate * full + (1 - gate) * model.streamed(index, window)(q, k, v, start)

    return attend


@torch.no_grad()
def teach(model: TailModel, reading: Reading, mix: Mix) -> Lesson:
    """Runs the original over the tail of a reading."""
    contexts: dict[int, Tensor] = {}
    hidden = model.embed(reading.ids)
    for index in range(len(model.layers)):

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int, index: int = index) -> Tensor:
            full = model.dense(index)(q, k, v, start)
            if mix == "teacher":
                contexts[index] = full
            return full

        hidden = model.layer(index, hidden, reading, attend)
    hidden = model.finish(hidden[:, -len(reading.sample.tail) :])
    return Lesson(reading, hidden, contexts, float(hidden.square().mean()))
