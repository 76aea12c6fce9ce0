"""Static scales by which heads lie in fp8 (e4m3), as engines with such a cache keep them.

A number x of a head is stored as clamp(x / s, ±448) in e4m3. With s = max |x| / 448 over a
calibration text nothing of that text is cut off (`kvtool/fp8.py`). Of a checkpoint that has scales
for vLLM, those are taken, which are one for all heads of a layer or one each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.calibrate.statistics_file import LayerStatistics, Statistics
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError
from kvtool.fp8 import LIMIT, Scales, scale, stored_scales
from kvtool.plan import Base, Plan


def measured(statistics: LayerStatistics, base: Base, window: int) -> Scales:
    """max |x| / 448 of keys and values of each head, over all positions."""
    sinks, bulk = statistics.sinks, (statistics.rotated_keys, statistics.joint)
    keys, both = (
        torch.maximum(sinks[kind].peak, of.peak)
        for kind, of in zip(("rotated_keys", "joint"), bulk, strict=True)
    )
    peaks = {"keys": keys, "values": both[base.channels :]}
    found = []
    for what, peak in peaks.items():
        heads = peak.unflatten(0, (base.kv_heads, -1))
        dead = heads.amax(dim=1, keepdim=True) == 0  # any scale will do
        found.append(scale(heads.masked_fill(dead, LIMIT), "head", f"the {what} of a layer"))
    return by_head(found, base, window)


def by_head(scales: Sequence[Tensor], base: Base, window: int) -> Scales:
    """Scales of keys and of values, one each `[1]`, or one by head `[H, 1, 1]`.

    Raises:
        CheckpointError: There is not one for each head, above 0 and finite.
    """
    for s in scales:
        if s.numel() not in (1, base.kv_heads) or not bool((s.isfinite() & (s > 0)).all()):
            raise CheckpointError(
                f"{base.source} holds scales for fp8 that are not one number above 0 for a layer, "
                f"or {base.kv_heads} for its heads."
            )
    keys, values = (tuple(s.float().flatten().expand(base.kv_heads).tolist()) for s in scales)
    return Scales(keys, values, window)


def of_checkpoint(checkpoint: Checkpoint, plan: Plan, window: int) -> Plan:
    """The plan with what keeps everything in fp8, by the scales that the checkpoint holds.

    Args:
        window: Tokens that are kept exactly as well.
    """
    return _with(plan, lambda index: by_head(stored_scales(checkpoint, index), plan.base, window))


def of_statistics(statistics: Statistics, plan: Plan, window: int) -> Plan:
    """The same by what was measured."""
    return _with(plan, lambda index: measured(statistics.layer(index), plan.base, window))


def any_scales(plan: Plan, window: int) -> Plan:
    """The same by scales that mean nothing: it takes the same bytes."""
    ones = (1.0,) * plan.base.kv_heads
    return _with(plan, lambda index: Scales(ones, ones, window))


def _with(plan: Plan, scales_of: Callable[[int], Scales]) -> Plan:
    layers = [
        # Where all heads stream, too: another slice of the plan may have some keep everything.
        replace(layer, scales=scales_of(index)) if layer.heads else layer
        for index, layer in enumerate(plan.layers)
    ]
    return replace(plan, layers=tuple(layers))
