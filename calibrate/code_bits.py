"""Bits of the codes of a plan, by the harm that rounding them does to predictions (`felt.py`).

A code is measured with its rows at the widths of the plan, levelled (`levelled.py`). What a code
leaves out is lost already, so the harm of bits is that of rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate.allocate import choose
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.felt import joined
from kvtool.calibrate.levelled import levelled_rows
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Fitted, Part, Projection
from kvtool.kernels.quantise import BITS, fake_quantise
from kvtool.plan import Plan
from kvtool.progress import Progress, telling


def harms(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Tensor,
    offsets: Sequence[int],
    seed: int,
    report: Progress,
) -> tuple[Tensor, list[dict[Part, Fitted]]]:
    """Nats per prediction that all numbers of a code do with so many bits, `[codes, widths]`,
    float64; and the codes, levelled by the first window.
    """
    model = WholeModel(checkpoint)
    ring = plan.codes[0].sink, plan.codes[0].window
    fitted = [_fitted(plan, index) for index in range(len(plan.codes))]
    levels: list[dict[Part, Fitted]] = []
    harm = torch.zeros(len(plan.codes), len(BITS), dtype=torch.float64)
    predictions = 0
    reads = zip(offsets, model.far_reads(windows, offsets, ring, seed), strict=True)
    for offset, read in telling(report, "measuring", reads, len(windows)):
        predictions += read.predictions
        for index, (code, own) in enumerate(zip(plan.codes, plan.coded_layers, strict=True)):
            both = joined(model.ropes, read, own, offset, code.kind)
            y, g = (x[ring[0] :] for x in both)
            places = torch.arange(y.shape[1]).chunk(len(code.parts))
            if index == len(levels):  # the first window
                levels.append(
                    {
                        part: _levelled(one, y[:, at])
                        for (part, one), at in zip(fitted[index].items(), places, strict=True)
                    }
                )
            coded = []
            for part, width, place in zip(code.parts, code.widths, places, strict=True):
                used = levels[index][part].projection.cut(width).to(y)
                z = (y[:, place] - used.mean) @ used.encode.T
                coded.append((z, g[:, place] @ used.decode))
            for at, bits in enumerate(BITS):
                moved = torch.zeros(len(y), dtype=torch.float64, device=y.device)
                for z, gradient in coded:
                    error = fake_quantise(z, bits, code.group) - z
                    moved += (error * gradient).sum(dim=1).double()
                harm[index, at] += float((moved * moved).sum()) / 2
    return harm / predictions, levels


def shared(
    plan: Plan, harm: Tensor, levels: list[dict[Part, Fitted]], allowed: int, itemsize: int
) -> tuple[Plan, dict[str, Any]]:
    """The plan with its codes levelled, and the bits for each that do least harm.

    Args:
        harm, levels: See :func:`harms`.
        allowed: Bytes that a token may take in all codes together.

    Returns:
        It, and the harm of each code, in nats.
    """
    costs = [
        [replace(code, bits=bits).token_bytes(itemsize) for bits in BITS] for code in plan.codes
    ]
    chosen = choose(costs, harm.tolist(), allowed)
    codes = tuple(replace(code, bits=BITS[at]) for code, at in zip(plan.codes, chosen, strict=True))
    tensors: dict[str, Tensor] = {}
    for index, parts in enumerate(levels):
        for part, one in parts.items():
            tensors |= one.tensors(index, part)
    felt = [float(x[at]) for x, at in zip(harm, chosen, strict=True)]
    return replace(plan, codes=codes, tensors=tensors), {"harm": felt}


def _fitted(plan: Plan, index: int) -> dict[Part, Fitted]:
    """The code with this index, with all rows that the plan has."""
    found: dict[Part, Fitted] = {}
    for part in plan.codes[index].parts:
        name = f"codes.{index}.{part}"
        parts = (plan.tensors[f"{name}.{x}"] for x in ("encode", "decode", "mean"))
        found[part] = Fitted(Projection(*parts), plan.tensors[f"{name}.spectrum"])
    return found


def _levelled(fitted: Fitted, y: Tensor) -> Fitted:
    """By the tokens `[T, W]` that it codes."""
    own = fitted.projection.to(y)
    z = (y - own.mean) @ own.encode.T
    return levelled_rows(fitted, z.double().square().mean(dim=0).cpu())
