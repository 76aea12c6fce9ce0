"""Plans that stretch how far Mamba-2 heads see beyond the lengths they were taught (LongMamba).

After LongMamba (arXiv 2504.16053), without training. A head is *global* if what it wrote at the
start of a text as long as those it was taught, L tokens, has not decayed to less than `GLOBAL` at
the end. Longer texts decay it further than it ever saw. So behind the first L tokens a global head
takes up only tokens whose step Δ is at least a threshold: the others write nothing and decay
nothing. The threshold lets Δ add up to L / S of what it did, for texts of S tokens; the paper
drops tokens of the whole text, whose length it has to know, where this drops none of the first L.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.projections import text_windows
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text
from kvtool.errors import UsageError
from kvtool.plan import Plan, provenance_of
from kvtool.progress import Progress, silent, telling
from kvtool.states import StatePlan

GLOBAL = 1e-3
"""Share of what was written that is left after L tokens."""


def calibrate_receptive_field(
    checkpoint: Checkpoint,
    plan: Plan,
    taught: int,
    length: int,
    data: str | None,
    tokens: int,
    seed: int,
    *,
    report: Progress = silent,
) -> Plan:
    """The plan with thresholds for the global heads of all states.

    Args:
        taught: L. length: S.

    Raises:
        UsageError: No layer keeps a state, or the length is not beyond that taught.
    """
    check_lengths(checkpoint, plan, taught, length)
    windows, offsets = text_windows(checkpoint, data, tokens, seed)
    model = WholeModel(checkpoint)
    texts = zip(windows, offsets, strict=True)
    seen = [model.steps(*text) for text in telling(report, "measuring", texts, len(windows))]
    layers, found = [], 0
    steps = iter([torch.cat(each) for each in zip(*seen, strict=True)])
    rates = iter(model.rates())
    for layer in plan.layers:
        if not isinstance(layer.kept, StatePlan):
            layers.append(layer)
            continue
        least = thresholds(next(steps), next(rates), taught, length)
        found += int((least > 0).sum())
        kept = replace(layer.kept, taught=taught, least=tuple(least.tolist()))
        layers.append(replace(layer, kept=kept))
    asked = {"taught": taught, "length": length, "data": data, "tokens": tokens, "seed": seed}
    corpus = calibration_text(data).id
    said = provenance_of("longmamba", asked, corpus, windows.numel(), global_heads=found)
    return replace(plan, layers=tuple(layers), provenance=(*plan.provenance, said))


def check_lengths(checkpoint: Checkpoint, plan: Plan, taught: int, length: int) -> None:
    """Refuses what cannot work before any weight is read.

    Raises:
        UsageError: See :func:`calibrate_receptive_field`.
    """
    if not any(isinstance(layer.kept, StatePlan) for layer in plan.layers):
        raise UsageError(f"no layer of {checkpoint.source} keeps a state")
    if not 0 < taught < length:
        raise UsageError(f"--length {length} is not beyond the {taught} tokens that were taught")


def memory_bytes(checkpoint: Checkpoint, plan: Plan, tokens: int) -> int:
    """About what the calibration holds at once, besides Python and its libraries: the model in
    fp32, and Δ of all tokens, by window and put together.
    """
    heads = sum(layer.kept.heads for layer in plan.layers if isinstance(layer.kept, StatePlan))
    return 4 * checkpoint.parameters + 2 * 4 * tokens * heads


def thresholds(steps: Tensor, rates: Tensor, taught: int, length: int) -> Tensor:
    """The least Δ that a token must have, by head; 0 for a head that is not global.

    Args:
        steps: Δ `[T, H]` of some text.
        rates: A `[H]`.
    """
    left = taught * rates * steps.mean(dim=0)
    ordered = steps.sort(dim=0).values
    dropped = ordered.cumsum(dim=0) - ordered  # if all below are
    most = (1 - taught / length) * steps.sum(dim=0)
    at = (dropped <= most).sum(dim=0) - 1
    least = ordered.gather(0, at[None])[0]
    return torch.where(left >= math.log(GLOBAL), least, 0.0)
