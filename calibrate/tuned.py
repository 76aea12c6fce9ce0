"""CSKV's codes of few bits, tuned layer by layer with the rounding in the forward pass.

CSKV (arXiv 2409.10593) trains K ≈ X A B and V ≈ X A B by the squared error of the original's own
keys (before RoPE, which keeps lengths) and values. Without rounding the optimum is closed
(`cskv.py`). With it, encoder and decoder of a part are trained from there,

    min  E |y - decode Q(encode y)|² / E |y|²,

where Q quantises per token. The paper's gradient passes straight through Q and is zero at the ends
of its range, so it does not feel that errors grow with the range: from this start it made the error
larger at 4 bits. Here the scale is differentiated too, see :func:`fake_quantise`. What is tuned is
kept if it is better on tokens that it was not tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvtool.calibrate.cskv import principal
from kvtool.calibrate.levelled import levelled
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.codes import CodePlan, Fitted, Part, Projection
from kvtool.distill import Student, Training, train
from kvtool.kernels.quantise import fake_quantise

BATCH = 1024
"""Tokens per step."""
RATE = 1e-2
"""Learning rate, of a parameter's root mean square."""


@dataclass(frozen=True)
class Tuned:
    """A part of a layer: the code that is kept, and its errors as shares of E |y|², held out.

    Attributes:
        before, after: Of the closed form, and of what was kept.
    """

    fitted: Fitted
    before: float
    after: float


def tokens_of(stream: LayerStream, layer: StreamedLayer, hidden: Tensor, sinks: int) -> Tensor:
    """Takes `hidden [N, S, hidden]` through a layer, in place.

    Returns:
        `[N, S - sinks, 2K]`: keys before RoPE, and values, of all tokens but the sinks.
    """
    seen: list[Tensor] = []

    def observe(q: Tensor, k: Tensor, v: Tensor) -> None:
        y = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)
        seen.append(y[:, sinks:].clone())

    layer.run(hidden, stream.exact_attention(layer, observe), batch=1)
    return torch.cat(seen)


def tune(y: Tensor, held: Tensor, code: CodePlan, steps: int, seed: int) -> dict[Part, Tuned]:
    """Keys and values of one layer.

    Args:
        y: `[n, 2K]`, keys and values of tokens; they are decomposed too.
        held: `[m, 2K]`, of other tokens.
        code: At the widths that are tuned; only so many rows are made.
        steps: 0 leaves the closed form.
    """
    found: dict[Part, Tuned] = {}
    both = (x.chunk(2, dim=1) for x in (y, held))
    for part, width, own, others in zip(code.parts, code.widths, *both, strict=True):
        found[part] = _tune_part(own, others, code, width, steps, seed)
    return found


def _tune_part(y: Tensor, held: Tensor, code: CodePlan, width: int, steps: int, seed: int) -> Tuned:
    double = y.double()
    second = double.T @ double / len(double)
    fitted = levelled(principal(second), second)
    fitted = Fitted(fitted.projection.cut(width), fitted.spectrum[:width])
    student = Reconstruction(fitted.projection, code, float(second.trace()))
    size = held.square().sum(dim=1).mean().clamp(min=1e-30)
    before = float(student.error(held).detach() / size)
    if not steps:
        return Tuned(fitted, before, before)

    def batches(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + index)
        return y[torch.randint(len(y), (BATCH,), generator=generator)]

    training = Training(steps, RATE, warmup=0.1, cooldown=0.8, floor=1e-3, seed=seed)
    train(student, batches, training, None)
    after = float(student.error(held).detach() / size)
    if not after < before:
        return Tuned(fitted, before, before)
    return Tuned(Fitted(student.projection, fitted.spectrum), before, after)


class Reconstruction(Student):
    """A part of a layer's code, and how well it gives back what it stores.

    Args:
        size: E |y|² of what it stores; makes the loss a share.
    """

    def __init__(self, start: Projection, code: CodePlan, size: float) -> None:
        super().__init__()
        self.bits, self.group, self.size = code.bits, code.group, max(size, 1e-30)
        self.encode, self.decode = (
            nn.Parameter(x.float().contiguous()) for x in (start.encode, start.decode)
        )
        # Not trained: about its mean a code cannot keep values that are almost zero (levelled.py).
        self.mean = start.mean.float()

    @property
    def projection(self) -> Projection:
        """As it is now."""
        return Projection(self.encode.detach().clone(), self.decode.detach().clone(), self.mean)

    def rates(self) -> Mapping[str, float]:
        """Each parameter moves in its own measure."""
        sizes = {name: x.detach().square().mean().sqrt() for name, x in self.named_parameters()}
        return {name: max(float(size), 1e-6) for name, size in sizes.items()}

    def error(self, y: Tensor) -> Tensor:
        """Mean squared error of tokens `[n, K]`, summed over channels; differentiable."""
        z = (y - self.mean) @ self.encode.T
        if self.bits is not None:
            z = fake_quantise(z, self.bits, self.group)
        return (z @ self.decode.T + self.mean - y).square().sum(dim=1).mean()

    def forward(self, y: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The share of E |y|² that is lost of a batch `[n, K]`."""
        return self.error(y) / self.size, {}
