"""KL between the predictions of two models: from log-probabilities, or from final hidden states.

From hidden states no logits are kept until the backward pass, nor computed again in it: the
gradient is taken at once, some positions at a time. With p and q the softmax of teacher and
student, and z the student's logits,

    forward   KL(p ‖ q) = Σ p log(p/q),   dKL/dz = q - p,
    reverse   KL(q ‖ p) = Σ q log(q/p),   dKL/dz = q ⊙ (log(q/p) - KL(q ‖ p)).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["forward-kl", "reverse-kl"]

SLICE = 512
"""Positions whose logits are there at once."""


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities `[..., V]`, nats `[...]`."""
    # p log p is 0 where a logit is -inf; without the mask it would be NaN.
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def divergence(
    states: Tensor,
    told: Tensor,
    head: Tensor,
    teacher_head: Tensor,
    loss: Loss = "forward-kl",
) -> Tensor:
    """Sum over positions, nats, differentiable in the student's states.

    Args:
        states, told: Final hidden states of student `[T, hidden]` and teacher `[T, hidden']`.
        head, teacher_head: Their output heads `[V, hidden]`, `[V, hidden']`.
    """
    total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        states, told, head, teacher_head, loss
    )
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, told: Tensor, head: Tensor, teacher_head: Tensor, loss: Loss
    ) -> Tensor:
        total = torch.zeros((), device=states.device)
        gradients = []
        head, teacher_head = head.to(states.dtype), teacher_head.to(told.dtype)
        for ours, theirs in zip(states.split(SLICE), told.split(SLICE), strict=True):
            q = F.linear(ours, head).float().log_softmax(dim=-1)
            p = F.linear(theirs, teacher_head).float().log_softmax(dim=-1)
            if loss == "forward-kl":
                probability = p.exp()
                total += (probability * p.sub_(q)).sum()
                logits_gradient = q.exp_().sub_(probability)
            else:
                probability = q.exp()
                q.sub_(p)
                each = (probability * q).sum(dim=-1, keepdim=True)
                total += each.sum()
                logits_gradient = q.sub_(each).mul_(probability)
            gradients.append(logits_gradient.to(states.dtype) @ head)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (states,) = ctx.saved_tensors
        return states * gradient, None, None, None, None
